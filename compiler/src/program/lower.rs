//! From a plan to a program: tiles, phases, exchanges.

mod norms;
mod phases;

use thiserror::Error;

use norms::NormTable;
use phases::{LayerShape, side_by_side, stream_exchange};

use super::layout::{self, Words};
use super::{
    Attention, CHUNK, CONSUMER_WARPS, Linear, MOST_PRODUCTS, Program, Ring, RowOrder, Rows, Step,
    TILE, TILE_BYTES, Tiling, Wide, stream_share,
};
use crate::fuse::{Epilogue, FusedAttention, FusedGraph, FusedLinear, FusedOp, Input, WeightId};
use crate::mesh::{Placement, Share, Split};
use crate::plan::{Plan, StepPlan, StreamForm, Target, Transport};

/// Why a plan cannot become a program.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ProgramError {
    /// A size that the tiles do not divide.
    #[error(
        "{node}: {what} is {size}, which is no multiple of {multiple}; the tensor cores' tiles need it to be"
    )]
    Tile {
        /// The fused node.
        node: String,
        /// Which size.
        what: &'static str,
        /// Its value.
        size: usize,
        /// What should divide it.
        multiple: usize,
    },
    /// A head width without device code.
    #[error("{node}: heads of {head_dim} elements; 64, 128 and 256 are supported")]
    HeadDim {
        /// The fused node.
        node: String,
        /// Elements of a head.
        head_dim: usize,
    },
    /// A layer whose dataflow the phases cannot express.
    #[error("{node}: {reason}")]
    Dataflow {
        /// The fused node.
        node: String,
        /// What is the matter.
        reason: String,
    },
    /// More than the GPU's shared memory, or a CTA's threads.
    #[error(
        "the activations of {columns} columns leave no room for the weight ring in {limit} bytes of shared memory, or a worker's share of their residual stream does not fit its threads"
    )]
    SharedMemory {
        /// Columns of the larger step.
        columns: usize,
        /// The GPU's limit.
        limit: usize,
    },
}

/// How much of the ring a linear's page takes, and how many row tiles a warp holds: from the fastest down to what fits
/// wide models and small SMs.
const TILINGS: [(usize, usize); 4] = [(16 * 1024, 4), (8 * 1024, 2), (16 * 1024, 2), (4 * 1024, 1)];
/// A ring of this size is good enough not to try smaller pages.
const GOOD_RING: usize = 64 * 1024;

impl Program {
    /// Makes the plan concrete for a target. The plan must fit the graph (`Plan::verify`).
    pub fn new(graph: &FusedGraph, plan: &Plan, target: &Target) -> Result<Program, ProgramError> {
        let mut best: Option<Program> = None;
        for (page_bytes, tiles_per_warp) in TILINGS {
            let program = Lowering {
                graph,
                plan,
                target,
                page_bytes,
                tiles_per_warp,
            }
            .program()?;
            if let Some(program) = program {
                let ring = |p: &Program| p.ring.pages * p.ring.page_bytes;
                let good = ring(&program) >= GOOD_RING;
                if best.as_ref().is_none_or(|best| ring(best) < ring(&program)) {
                    best = Some(program);
                }
                if good {
                    break;
                }
            }
        }
        best.ok_or(ProgramError::SharedMemory {
            columns: plan.prefill.columns.max(plan.decode.columns),
            limit: target.gpu.smem_per_block_optin as usize,
        })
    }
}

struct Lowering<'a> {
    graph: &'a FusedGraph,
    plan: &'a Plan,
    target: &'a Target,
    page_bytes: usize,
    tiles_per_warp: usize,
}

impl Lowering<'_> {
    /// `None` where the shared memory or a worker's threads do not suffice.
    fn program(&self) -> Result<Option<Program>, ProgramError> {
        let (graph, plan, mesh) = (self.graph, self.plan, &self.plan.mesh);
        let mut norms = NormTable::new(graph);
        let mut linears = Vec::new();
        // Index in `linears` of each linear node of the layer.
        let mut index_of = vec![None; graph.layer.len()];
        let mut attention = None;
        for (i, node) in graph.layer.iter().enumerate() {
            match (&node.op, plan.placements[i]) {
                (FusedOp::Linear(linear), Some(placement)) => {
                    index_of[i] = Some(linears.len());
                    let heads = graph
                        .layer
                        .iter()
                        .any(|n| matches!(&n.op, FusedOp::Attention(a) if a.qkv == i));
                    linears.push(self.linear(
                        &node.name,
                        &node.sources,
                        linear,
                        placement,
                        heads,
                        &mut norms,
                    )?);
                }
                (FusedOp::Attention(a), _) => attention = Some((i, node, a)),
                (FusedOp::Linear(_), None) => {
                    return Err(dataflow(&node.name, "the plan gives it no placement"));
                }
            }
        }
        let Some((attention_node, node, fused)) = attention else {
            return Err(dataflow(&graph.name, "a layer without attention"));
        };
        let qkv = index_of[fused.qkv]
            .ok_or_else(|| dataflow(&node.name, "q, k and v do not come from a linear"))?;
        let mut attention = self.attention(&node.name, &node.sources, fused, qkv, &mut norms)?;
        let mut head = self.head(&graph.head, &mut norms)?;
        // What prepares the stream for one prepares it for the other.
        if linears
            .first()
            .is_some_and(|first| first.norm.is_some() != head.norm.is_some())
        {
            return Err(dataflow(
                "head",
                "the LM head and the layer's first linear must both norm the residual stream, or neither",
            ));
        }
        let norms = norms.finish(graph, &mut linears, &mut head, &mut attention);

        let mut words = Words::new();
        let columns = plan.steps().map(|(_, step)| step.columns);
        let columns = columns.max().unwrap_or(0);
        for linear in &mut linears {
            linear.words_at = words.take(mesh.workers() * columns * linear.words());
        }
        let step_of = |plan: &StepPlan| Step {
            columns: plan.columns,
            transport: plan.transport,
            stream: plan.stream,
            kv_splits: plan.kv_splits,
            replicate_below: plan.replicate_below,
            layer: Vec::new(),
        };
        let (mut prefill, mut decode) = (step_of(&plan.prefill), step_of(&plan.decode));
        let mut wide = plan.wide.as_ref().map(step_of);
        let task_words = |step: &Step| {
            attention.tasks(step) * attention.heads_per_task * attention.task_words(step)
        };
        let most_task_words = [&prefill, &decode].into_iter().chain(&wide).map(task_words);
        attention.words_at = words.take(mesh.groups * most_task_words.max().unwrap_or(0));

        // The stream's units: words of the linears that write it, those that lie side by side.
        let layer = LayerShape {
            graph,
            linears: &linears,
            index_of: &index_of,
            attention_node,
        };
        let writers: Vec<usize> = (0..linears.len())
            .filter(|&l| linears[l].epilogue == Epilogue::AddResidual)
            .collect();
        let gathered: Vec<(usize, usize)> = writers
            .iter()
            .map(|&l| {
                let exchange = stream_exchange(l, &linears[l]);
                (
                    l,
                    words.take(
                        side_by_side(&exchange, mesh) * columns * linears[l].gathered_words(),
                    ),
                )
            })
            .collect();
        for step in [&mut prefill, &mut decode].into_iter().chain(&mut wide) {
            step.layer = layer.phases(step.stream, &gathered)?;
        }
        let producers_and_linear = gathered.first().map(|&(l, _)| {
            let linear = &linears[l];
            (side_by_side(&stream_exchange(l, linear), mesh), linear)
        });
        let fits = |step: &Step| match (step.transport, step.stream) {
            (Transport::Rows, _) => {
                stream_share(graph.hidden, step.columns, mesh.workers()) <= CONSUMER_WARPS * 32
            }
            (Transport::Words, StreamForm::Replicated) => true,
            (Transport::Words, StreamForm::Scattered) => {
                producers_and_linear.is_none_or(|(producers, linear)| {
                    let runs = producers * linear.tiling.passes * step.columns;
                    runs.div_ceil(mesh.workers()) <= linear.run_slots()
                })
            }
        };
        let steps = || [&prefill, &decode].into_iter().chain(&wide);
        if !steps().all(fits) {
            return Ok(None);
        }
        let stream_units = producers_and_linear.map_or(0, |(n, linear)| n * linear.words());
        let stream_words =
            producers_and_linear.map_or(0, |(n, linear)| n * linear.gathered_words());
        let of_rows = steps().filter(|s| s.transport == Transport::Rows);
        if let Some(columns) = of_rows.map(|step| step.columns).max() {
            for linear in &mut linears {
                let outputs = columns * linear.outputs();
                linear.rows = words.rows(linear.partials(mesh) * outputs, 0, mesh);
                if linear.epilogue == Epilogue::AddResidual {
                    linear.stream_rows = words.rows(outputs, outputs / CHUNK, mesh);
                }
            }
            let heads = columns * attention.outputs() * mesh.groups;
            attention.rows = words.rows(heads, 0, mesh);
        }
        let exchange = words.finish(mesh, stream_words * columns, decode.columns);

        let main = [&prefill, &decode];
        let parts = layout::parts(
            &linears,
            &head,
            &attention,
            main,
            wide.as_ref(),
            stream_units,
        );
        let page = linears
            .iter()
            .chain([&head])
            .map(|l| l.tiling.page_bytes())
            .max()
            .unwrap_or(TILE_BYTES);
        let limit = self.target.gpu.smem_per_block_optin as usize;
        let stream_bound = plan.decode.cost.stream_bound();
        let Some(((shared, ring), of_wide)) =
            layout::shared_memory(&parts, page, limit, stream_bound)
        else {
            return Ok(None);
        };
        let wide = wide
            .zip(of_wide)
            .map(|(step, (shared, ring))| Wide { step, ring, shared });
        let fit = |step: &Step, ring: &Ring| products_fit(step, &linears, ring);
        if !fit(&prefill, &ring)
            || !fit(&decode, &ring)
            || !wide.as_ref().is_none_or(|wide| fit(&wide.step, &wide.ring))
        {
            return Ok(None);
        }
        Ok(Some(Program {
            name: graph.name.clone(),
            plan: plan.clone(),
            mesh: *mesh,
            layers: graph.layers,
            hidden: graph.hidden,
            vocab: graph.vocab,
            slots: self.target.batch,
            max_seq: self.target.max_seq,
            weights: graph.weights.clone(),
            embedding: graph.embedding,
            linears,
            attention,
            head,
            norms,
            prefill,
            wide,
            decode,
            exchange,
            ring,
            shared,
        }))
    }

    fn linear(
        &self,
        name: &str,
        sources: &[String],
        linear: &FusedLinear,
        placement: Placement,
        makes_heads: bool,
        norms: &mut NormTable,
    ) -> Result<Linear, ProgramError> {
        let mesh = &self.plan.mesh;
        if linear.norm.is_some() && linear.input != Input::Residual {
            return Err(dataflow(
                name,
                "it norms another value than the residual stream; such a layer is not supported yet",
            ));
        }
        let parts = self.parts(linear);
        if (1..parts.len()).any(|i| parts[..i].iter().any(|(weight, _)| *weight == parts[i].0)) {
            return Err(dataflow(name, "two of its parts have the same weight"));
        }
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        let columns = self.graph.columns(linear);
        tile(name, "the input's width", columns, TILE)?;
        let (order, row_units, unit_tiles) = if makes_heads {
            tile(name, "a group's rows", rows / mesh.groups, TILE)?;
            (
                RowOrder::ByGroup {
                    groups: mesh.groups,
                },
                mesh.groups,
                rows / mesh.groups / TILE,
            )
        } else if linear.epilogue == Epilogue::SwiGlu {
            tile(name, "the output's width", parts[0].1, TILE)?;
            (RowOrder::Interleaved, parts[0].1 / TILE, 2)
        } else {
            tile(name, "the output's width", rows, TILE)?;
            (RowOrder::Stacked, rows / TILE, 1)
        };
        let mut lowered = Linear {
            name: name.to_owned(),
            sources: sources.to_vec(),
            parts,
            columns,
            order,
            epilogue: linear.epilogue,
            norm: linear.norm.map(|norm| norms.add(norm)),
            placement,
            row_units,
            unit_tiles,
            k_tiles: columns / TILE,
            tiling: EMPTY_TILING,
            words_at: 0,
            rows: Rows::default(),
            stream_rows: Rows::default(),
        };
        let slices: Vec<(Share, Share)> = (0..mesh.workers())
            .map(|cta| mesh.coordinates(cta))
            .map(|(group, member)| lowered.slice(mesh, group, member))
            .collect();
        lowered.tiling = self.tiling(&slices, 1);
        Ok(lowered)
    }

    fn head(&self, head: &FusedLinear, norms: &mut NormTable) -> Result<Linear, ProgramError> {
        let columns = self.graph.hidden;
        tile("head", "the input's width", columns, TILE)?;
        let mut lowered = Linear {
            name: "head".to_owned(),
            sources: Vec::new(),
            parts: self.parts(head),
            columns,
            order: RowOrder::Stacked,
            epilogue: Epilogue::Store,
            norm: head.norm.map(|norm| norms.add_last(norm)),
            placement: Placement {
                groups: Split::Rows,
                members: Split::Rows,
            },
            row_units: self.graph.vocab.div_ceil(TILE),
            unit_tiles: 1,
            k_tiles: columns / TILE,
            tiling: EMPTY_TILING,
            words_at: 0,
            rows: Rows::default(),
            stream_rows: Rows::default(),
        };
        let ctas = self.plan.mesh.ctas;
        let slices: Vec<(Share, Share)> = (0..ctas)
            .map(|cta| {
                (
                    crate::mesh::share(lowered.row_units, ctas, cta),
                    Share {
                        begin: 0,
                        count: lowered.k_tiles,
                    },
                )
            })
            .collect();
        // Whole rows to a warp: the many rows of a head need no sum over the warps.
        lowered.tiling = self.tiling(&slices, CONSUMER_WARPS);
        Ok(lowered)
    }

    fn parts(&self, linear: &FusedLinear) -> Vec<(WeightId, usize)> {
        linear
            .parts
            .iter()
            .map(|&weight| (weight, self.graph.weights[weight.0 as usize].shape[0]))
            .collect()
    }

    fn attention(
        &self,
        name: &str,
        sources: &[String],
        fused: &FusedAttention,
        qkv: usize,
        norms: &mut NormTable,
    ) -> Result<Attention, ProgramError> {
        if ![64, 128, 256].contains(&fused.head_dim) {
            return Err(ProgramError::HeadDim {
                node: name.to_owned(),
                head_dim: fused.head_dim,
            });
        }
        Ok(Attention {
            name: name.to_owned(),
            sources: sources.to_vec(),
            qkv,
            heads: fused.heads / self.plan.mesh.groups,
            kv_heads: fused.kv_heads / self.plan.mesh.groups,
            head_dim: fused.head_dim,
            heads_per_task: self.plan.heads_per_task,
            scale: fused.scale,
            q_norm: fused.q_norm.map(|norm| norms.add(norm)),
            k_norm: fused.k_norm.map(|norm| norms.add(norm)),
            rope: fused.rope,
            words_at: 0,
            rows: Rows::default(),
        })
    }

    fn tiling(&self, slices: &[(Share, Share)], warp_rows: usize) -> Tiling {
        let rows = slices
            .iter()
            .map(|(rows, _)| rows.count)
            .max()
            .unwrap_or(0)
            .max(1);
        let k = slices
            .iter()
            .map(|(_, k)| k.count)
            .max()
            .unwrap_or(0)
            .max(1);
        let page_tiles = self.page_bytes / TILE_BYTES;
        let warp_k = CONSUMER_WARPS / warp_rows;
        // A page holds at least one column tile of every warp.
        let most = if warp_rows == 1 {
            self.tiles_per_warp.min(page_tiles / warp_k)
        } else {
            1
        };
        let passes = rows.div_ceil(most * warp_rows);
        let tiles_per_warp = rows.div_ceil(passes * warp_rows);
        let pass_tiles = tiles_per_warp * warp_rows;
        let of_warp = (page_tiles / (pass_tiles * warp_k)).clamp(1, k.div_ceil(warp_k));
        let page_k = warp_k * of_warp;
        Tiling {
            rows,
            k,
            rows_exact: rows % pass_tiles == 0 && slices.iter().all(|(r, _)| r.count == rows),
            k_exact: k % page_k == 0 && slices.iter().all(|(_, s)| s.count == k),
            passes,
            pass_tiles,
            tiles_per_warp,
            warp_rows,
            page_k,
        }
    }
}

/// Whether a warp holds the products of all columns, or of half of them while a pass's pages stay in the ring
/// (`device/rows.cuh`, `linear_rows`).
fn products_fit(step: &Step, linears: &[Linear], ring: &Ring) -> bool {
    linears.iter().all(|linear| {
        let t = &linear.tiling;
        let products = t.tiles_per_warp * (step.columns / 8);
        step.transport == Transport::Words
            || products <= MOST_PRODUCTS
            || (products <= 2 * MOST_PRODUCTS && t.k.div_ceil(t.page_k) <= ring.pages)
    })
}

const EMPTY_TILING: Tiling = Tiling {
    rows: 0,
    k: 0,
    rows_exact: false,
    k_exact: false,
    passes: 0,
    pass_tiles: 0,
    tiles_per_warp: 0,
    warp_rows: 1,
    page_k: 0,
};

fn tile(node: &str, what: &'static str, size: usize, multiple: usize) -> Result<(), ProgramError> {
    if size == 0 || !size.is_multiple_of(multiple) {
        return Err(ProgramError::Tile {
            node: node.to_owned(),
            what,
            size,
            multiple,
        });
    }
    Ok(())
}

fn dataflow(node: &str, reason: &str) -> ProgramError {
    ProgramError::Dataflow {
        node: node.to_owned(),
        reason: reason.to_owned(),
    }
}
