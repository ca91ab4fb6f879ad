//! The plan: where every weight lies on the mesh, and how values move between phases.
//!
//! Owns the choices and their predicted cost. The search enumerates meshes, placements, forms of the residual stream,
//! and splits of attention, and keeps the cheapest that fits the GPU's shared memory; no model's plan is written down.
//! It must not know tiles, pages or buffers: those follow from the plan in the program.

mod search;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::arch::GpuModel;
use crate::cost::StepCost;
use crate::fuse::FusedOp;
use crate::mesh::{Mesh, Placement};

pub use search::PlanError;

/// What a program is compiled for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The GPU.
    pub gpu: GpuModel,
    /// Sequences that run at once, 1 to [`Target::MAX_COLUMNS`].
    pub batch: usize,
    /// Positions the KV cache holds for each sequence.
    pub max_seq: usize,
}

impl Target {
    /// Most columns a step computes at once.
    pub const MAX_COLUMNS: usize = 64;
    /// Most columns of a step that exchanges words: two mma operands.
    pub const MAX_WORD_COLUMNS: usize = 16;
    /// Columns that a step which exchanges rows computes together (`device/rows.cuh`, `kBlockColumns`): it has so many, or
    /// a multiple.
    pub const ROW_COLUMNS: usize = 16;

    /// Depth of context the cost model assumes: what is usual in chat, or the cache's half where that is less.
    pub fn depth(&self) -> usize {
        self.max_seq.div_ceil(2).min(1024)
    }
}

/// How the residual stream is kept between phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamForm {
    /// Every worker holds it all: one all-reduce per linear that adds to it.
    Replicated,
    /// Every worker holds a share: a reduce-scatter, then an all-gather.
    Scattered,
}

impl fmt::Display for StreamForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            StreamForm::Replicated => "replicated (all-reduce in one hop)",
            StreamForm::Scattered => "scattered (reduce-scatter, all-gather)",
        })
    }
}

/// How values go from worker to worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// In words that carry their epoch: one trip to L2, a thread's work for every six values.
    Words,
    /// In rows, with a flag for each worker: a trip more, but whole rows are copied.
    Rows,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Transport::Words => "words",
            Transport::Rows => "rows",
        })
    }
}

/// Choices of one kind of step. Prefill and decode differ in how many columns they compute at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Token positions computed at once: a power of two, at most [`Target::MAX_COLUMNS`].
    pub columns: usize,
    /// How values are exchanged. Rows need a scattered stream, and attention in one part.
    pub transport: Transport,
    /// Form of the residual stream.
    pub stream: StreamForm,
    /// Interleaved parts of a sequence's positions that different members attend to.
    pub kv_splits: usize,
    /// Contexts of fewer positions are attended to by every member of a group alike, which saves the exchange of parts.
    pub replicate_below: usize,
    /// Predicted time.
    pub cost: StepCost,
}

/// Where everything lies and how it moves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The mesh.
    pub mesh: Mesh,
    /// Placement of each node of the layer; `None` for attention, whose heads follow the groups.
    pub placements: Vec<Option<Placement>>,
    /// Query heads of one KV head that share a read of K and V.
    pub heads_per_task: usize,
    /// Steps that fill the cache with prompt tokens; the last of them makes the first token of every sequence. The cost is
    /// without the LM head.
    pub prefill: StepPlan,
    /// The same with more columns, for what of the prompts is left beyond a prefill step; where shared memory allows.
    pub wide: Option<StepPlan>,
    /// Steps that make one token for every sequence.
    pub decode: StepPlan,
    /// Bytes of weights a decode step streams.
    pub weight_bytes: u64,
    /// The time those bytes take at the GPU's streaming bandwidth, in microseconds: no plan is faster.
    pub floor: f64,
    /// How many plans were compared.
    pub considered: usize,
    /// Names of the layer's nodes, for display.
    pub nodes: Vec<String>,
}

impl Plan {
    /// All kinds of step.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, &StepPlan)> {
        let wide = self.wide.iter().map(|wide| ("wide prefill", wide));
        [("prefill", &self.prefill)]
            .into_iter()
            .chain(wide)
            .chain([("decode", &self.decode)])
    }

    /// Checks that the plan fits the graph: see the rules in the fused graph and below.
    ///
    /// 1. One placement for each linear of the layer and none for attention.
    /// 2. Linears that write the residual stream share one placement, so that every element has one owner.
    /// 3. A linear with a SwiGLU splits rows only: the epilogue is not linear in the products.
    /// 4. A linear that reads the residual stream splits rows only: every worker prepares the whole stream.
    /// 5. The groups divide the KV heads, and the linear that makes q, k and v splits rows over them.
    /// 6. Every worker has rows of the linears that write the residual stream: by waiting for those, each keeps step with
    ///    all others. One without rows could lag a layer behind and miss words that are overwritten.
    /// 7. Every worker has columns of a linear whose columns are split: others would wait for its zeros.
    pub fn verify(&self, graph: &crate::fuse::FusedGraph) -> Result<(), String> {
        use crate::fuse::{Epilogue, FusedNode, Input};
        use crate::mesh::Split;
        use crate::program::TILE;
        if self.placements.len() != graph.layer.len() {
            return Err(format!(
                "{} placements for {} nodes",
                self.placements.len(),
                graph.layer.len()
            ));
        }
        let mut residual = None;
        for (index, (node, placement)) in graph.layer.iter().zip(&self.placements).enumerate() {
            match (&node.op, placement) {
                (FusedOp::Attention(a), None) => {
                    if a.kv_heads % self.mesh.groups != 0 {
                        return Err(format!(
                            "{}: {} KV heads over {} groups",
                            node.name, a.kv_heads, self.mesh.groups
                        ));
                    }
                }
                (FusedOp::Linear(linear), Some(placement)) => {
                    let splits_columns =
                        placement.groups == Split::Columns || placement.members == Split::Columns;
                    if linear.epilogue == Epilogue::SwiGlu && splits_columns {
                        return Err(format!(
                            "{}: partial sums cannot pass through SwiGLU",
                            node.name
                        ));
                    }
                    if linear.input == Input::Residual && splits_columns {
                        return Err(format!(
                            "{}: every worker holds the whole residual stream, its columns cannot be split",
                            node.name
                        ));
                    }
                    let makes_heads =
                        |n: &FusedNode| matches!(&n.op, FusedOp::Attention(a) if a.qkv == index);
                    if placement.groups == Split::Columns && graph.layer.iter().any(makes_heads) {
                        return Err(format!(
                            "{}: a group's heads would be partial sums",
                            node.name
                        ));
                    }
                    let parts = placement.row_parts(&self.mesh);
                    if linear.epilogue == Epilogue::AddResidual && graph.hidden / TILE < parts {
                        return Err(format!(
                            "{}: {} row tiles over {parts} workers leave some without any",
                            node.name,
                            graph.hidden / TILE
                        ));
                    }
                    let tiles = graph.columns(linear) / TILE;
                    let parts = placement.column_parts(&self.mesh);
                    if tiles < parts {
                        return Err(format!(
                            "{}: {tiles} column tiles over {parts} workers leave some without any",
                            node.name
                        ));
                    }
                    if linear.epilogue == Epilogue::AddResidual
                        && *residual.get_or_insert(*placement) != *placement
                    {
                        return Err(format!(
                            "{}: writes the residual stream by another placement",
                            node.name
                        ));
                    }
                }
                _ => {
                    return Err(format!(
                        "{}: placement does not fit the node's kind",
                        node.name
                    ));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mesh: {}", self.mesh)?;
        for (name, placement) in self.nodes.iter().zip(&self.placements) {
            match placement {
                Some(placement) => writeln!(f, "  {name}: {placement}")?,
                None => writeln!(
                    f,
                    "  {name}: KV heads over groups, {} query heads a task",
                    self.heads_per_task
                )?,
            }
        }
        for (name, step) in self.steps() {
            writeln!(
                f,
                "{name}: {} columns, exchange of {}, residual stream {}, KV in {} splits{}",
                step.columns,
                step.transport,
                step.stream,
                step.kv_splits,
                match step.replicate_below {
                    0 => String::new(),
                    positions => format!(", of contexts below {positions} in every member"),
                }
            )?;
            writeln!(
                f,
                "  predicted {:.0} us: layer {:.2} (stream {:.2}, chain {:.2}), head {:.1}",
                step.cost.total,
                step.cost.layer,
                step.cost.layer_stream,
                step.cost.layer_chain,
                step.cost.head
            )?;
        }
        writeln!(
            f,
            "weights: {:.3} GB a step, floor {:.0} us; {} plans compared",
            self.weight_bytes as f64 / 1e9,
            self.floor,
            self.considered
        )
    }
}
