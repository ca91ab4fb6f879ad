//! The search for the cheapest plan: enumerate, predict, keep the best that fits.

use thiserror::Error;

use super::{Plan, StepPlan, StreamForm, Target};
use crate::cost::{Machine, StepCost};
use crate::fuse::{Epilogue, FusedAttention, FusedGraph, FusedLinear, FusedOp, Input};
use crate::mesh::{Mesh, Placement, Split};
use crate::program::{
    CONSUMER_WARPS, Linear, MOST_HEADS, Program, ProgramError, STRIPE, TILE, TILE_BYTES,
    VALUES_PER_WORD,
};

/// Why there is no plan.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum PlanError {
    /// The batch is outside what a step's columns hold.
    #[error(
        "batch {batch} is not supported: 1 to {} sequences run at once",
        Target::MAX_COLUMNS
    )]
    Batch {
        /// The batch asked for.
        batch: usize,
    },
    /// The context is empty or beyond 32-bit positions.
    #[error("a context of {max_seq} positions is not supported: 1 to {limit}", limit = Plan::MAX_SEQ)]
    MaxSeq {
        /// The context asked for.
        max_seq: usize,
    },
    /// A layer without attention, or with more than one.
    #[error("{graph}: a layer has {found} attention nodes; exactly one is supported")]
    Attention {
        /// The graph.
        graph: String,
        /// How many it has.
        found: usize,
    },
    /// A layer whose linears could be placed in too many ways.
    #[error(
        "{graph}: the linears of a layer can be placed in more than {} ways",
        MOST_PLACEMENTS
    )]
    Placements {
        /// The graph.
        graph: String,
    },
    /// No plan becomes a program; the reason of the cheapest.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

/// Words of the replicated residual stream that a thread may keep: 48 KB of shared memory for all of them.
const STREAM_WORDS: usize = 8;
/// Keys and values that every member of a group may read from L2 in a layer to spare itself an exchange of attention's parts.
const REPLICATED_BYTES: usize = 64 * 1024;
/// Placements of all linears of a layer that are enumerated, at most: each is tried on every mesh. The usual decoder has 4;
/// each linear beside the usual ones multiplies them by up to 4.
const MOST_PLACEMENTS: usize = 256;
/// How many of the cheapest plans become programs, at most.
const TRIES: usize = 2048;

impl Plan {
    /// Longest supported context.
    pub const MAX_SEQ: usize = 1 << 20;

    /// Finds the cheapest plan for a target, and the program it becomes.
    pub fn search(graph: &FusedGraph, target: &Target) -> Result<(Plan, Program), PlanError> {
        if target.batch == 0 || target.batch > Target::MAX_COLUMNS {
            return Err(PlanError::Batch {
                batch: target.batch,
            });
        }
        if target.max_seq == 0 || target.max_seq > Plan::MAX_SEQ {
            return Err(PlanError::MaxSeq {
                max_seq: target.max_seq,
            });
        }
        let attentions: Vec<&FusedAttention> = graph
            .layer
            .iter()
            .filter_map(|node| {
                if let FusedOp::Attention(a) = &node.op {
                    Some(a)
                } else {
                    None
                }
            })
            .collect();
        let [attention] = attentions[..] else {
            return Err(PlanError::Attention {
                graph: graph.name.clone(),
                found: attentions.len(),
            });
        };
        let search = Search {
            graph,
            target,
            attention,
            machine: Machine::of(&target.gpu),
        };
        let mut plans = search.plans()?;
        plans.sort_by(|a, b| objective(a).total_cmp(&objective(b)));
        let considered = plans.len();
        // What a plan is predicted to take can only grow with what its program's ring costs: once the next plan is not
        // better than the best program, none that follows is.
        let mut best: Option<(Plan, Program)> = None;
        let mut reason = None;
        for mut plan in plans.into_iter().take(TRIES) {
            if best
                .as_ref()
                .is_some_and(|(best, _)| objective(best) <= objective(&plan))
            {
                break;
            }
            plan.considered = considered;
            match Program::new(graph, &plan, target) {
                Ok(mut program) => {
                    search.add_ring(&mut plan, &program);
                    if best
                        .as_ref()
                        .is_none_or(|(best, _)| objective(&plan) < objective(best))
                    {
                        program.plan = plan.clone();
                        best = Some((plan, program));
                    }
                }
                Err(error) => reason = reason.or(Some(error)),
            }
        }
        best.ok_or_else(|| {
            reason
                .unwrap_or(ProgramError::SharedMemory {
                    columns: target.batch,
                    limit: target.gpu.smem_per_block_optin as usize,
                })
                .into()
        })
    }
}

/// What the search minimises: a decode step, and a little of the prefill of a token.
fn objective(plan: &Plan) -> f64 {
    plan.decode.cost.total + plan.prefill.cost.total / plan.prefill.columns as f64
}

struct Search<'a> {
    graph: &'a FusedGraph,
    target: &'a Target,
    attention: &'a FusedAttention,
    machine: Machine,
}

/// What all plans of one set of placements share.
struct Frame<'a> {
    mesh: Mesh,
    placements: &'a [Option<Placement>],
    heads_per_task: usize,
}

impl Search<'_> {
    fn plans(&self) -> Result<Vec<Plan>, PlanError> {
        let mut plans = Vec::new();
        let decode_columns = self.target.batch.next_power_of_two();
        let all_placements = self.placements()?;
        for mesh in self.meshes() {
            for placements in &all_placements {
                if !self.gives_all_a_part(&mesh, placements) {
                    continue;
                }
                let shared = self.attention.heads / self.attention.kv_heads;
                for heads_per_task in divisors(shared).into_iter().filter(|&h| h <= MOST_HEADS) {
                    let frame = Frame {
                        mesh,
                        placements,
                        heads_per_task,
                    };
                    let decodes = self.steps(&frame, decode_columns, true);
                    let prefills: Vec<StepPlan> = [16, 8, 4, 2, 1]
                        .iter()
                        .flat_map(|&columns| self.steps(&frame, columns, false))
                        .collect();
                    for decode in &decodes {
                        for prefill in &prefills {
                            plans.push(self.plan(&frame, prefill.clone(), decode.clone()));
                        }
                    }
                }
            }
        }
        Ok(plans)
    }

    fn plan(&self, frame: &Frame<'_>, prefill: StepPlan, decode: StepPlan) -> Plan {
        let weight_bytes = self.weight_bytes();
        Plan {
            mesh: frame.mesh,
            placements: frame.placements.to_vec(),
            heads_per_task: frame.heads_per_task,
            prefill,
            decode,
            weight_bytes,
            floor: weight_bytes as f64 / self.machine.stream,
            considered: 0,
            nodes: self
                .graph
                .layer
                .iter()
                .map(|node| node.name.clone())
                .collect(),
        }
    }

    /// Groups divide the KV heads, so that a head lives in one group; members are all that is left, or fewer for models
    /// too small to share out.
    fn meshes(&self) -> Vec<Mesh> {
        let ctas = self.target.gpu.sms as usize;
        let mut meshes = Vec::new();
        for groups in divisors(self.attention.kv_heads)
            .into_iter()
            .filter(|&groups| groups <= ctas)
        {
            let most = ctas / groups;
            let fewer = (0..).map(|i| 1 << i).take_while(|&members| members < most);
            meshes.extend(fewer.chain([most]).map(|members| Mesh {
                groups,
                members,
                ctas,
            }));
        }
        meshes
    }

    /// All placements of the layer's linears that obey the plan's rules.
    fn placements(&self) -> Result<Vec<Vec<Option<Placement>>>, PlanError> {
        let mut all: Vec<Vec<Option<Placement>>> = vec![Vec::new()];
        for (i, node) in self.graph.layer.iter().enumerate() {
            let options: Vec<Option<Placement>> = match &node.op {
                FusedOp::Attention(_) => vec![None],
                FusedOp::Linear(linear) => {
                    let makes_heads = self.attention.qkv == i;
                    Placement::ALL
                        .into_iter()
                        .filter(|p| {
                            // The stream's reader holds all of its input; heads stay in their group; SwiGLU needs sums.
                            let whole = linear.input == Input::Residual
                                || linear.epilogue == Epilogue::SwiGlu;
                            (p.groups == Split::Rows || !(makes_heads || whole))
                                && (p.members == Split::Rows || !whole)
                        })
                        .map(Some)
                        .collect()
                }
            };
            all = all
                .iter()
                .flat_map(|chosen: &Vec<Option<Placement>>| {
                    options
                        .iter()
                        .map(|option| chosen.iter().copied().chain([*option]).collect())
                })
                .filter(|placements: &Vec<_>| self.writers_agree(placements))
                .collect();
            if all.len() > MOST_PLACEMENTS {
                return Err(PlanError::Placements {
                    graph: self.graph.name.clone(),
                });
            }
        }
        Ok(all)
    }

    /// Whether the linears placed so far that write the stream share one placement.
    fn writers_agree(&self, placements: &[Option<Placement>]) -> bool {
        let mut writers =
            self.graph
                .layer
                .iter()
                .zip(placements)
                .filter_map(|(node, placement)| match &node.op {
                    FusedOp::Linear(FusedLinear {
                        epilogue: Epilogue::AddResidual,
                        ..
                    }) => *placement,
                    _ => None,
                });
        let first = writers.next();
        writers.all(|placement| Some(placement) == first)
    }

    /// Rules 6 and 7 of [`Plan::verify`]: rows of the stream's writers for every worker, and columns where they are split.
    fn gives_all_a_part(&self, mesh: &Mesh, placements: &[Option<Placement>]) -> bool {
        self.graph
            .layer
            .iter()
            .zip(placements)
            .all(|(node, placement)| match (&node.op, placement) {
                (FusedOp::Linear(linear), Some(placement)) => {
                    let writes_stream = linear.epilogue == Epilogue::AddResidual;
                    (!writes_stream
                        || placement.row_parts(mesh) <= self.graph.hidden.div_ceil(TILE))
                        && placement.column_parts(mesh) <= self.graph.columns(linear).div_ceil(TILE)
                }
                _ => true,
            })
    }

    fn steps(&self, frame: &Frame<'_>, columns: usize, decode: bool) -> Vec<StepPlan> {
        let heads_at_once =
            columns * self.attention.heads / frame.mesh.groups / frame.heads_per_task;
        let kv_splits = (frame.mesh.members / heads_at_once).clamp(1, 16);
        [StreamForm::Replicated, StreamForm::Scattered]
            .into_iter()
            .filter(|form| self.stream_fits(frame, columns, *form))
            .map(|stream| {
                let mut step = StepPlan {
                    columns,
                    stream,
                    kv_splits,
                    replicate_below: if decode {
                        self.replicate_below(frame, columns)
                    } else {
                        0
                    },
                    cost: StepCost::default(),
                };
                step.cost = self.cost(frame, &step, decode);
                step
            })
            .collect()
    }

    /// Contexts below which every member of a group attends to all of its heads. Only where the next linear takes no more
    /// than its own group's, and where that spares most sequences the exchange.
    fn replicate_below(&self, frame: &Frame<'_>, columns: usize) -> usize {
        let a = self.attention;
        let heads_of_group = a.kv_heads / frame.mesh.groups;
        let of_position = columns * heads_of_group * 2 * a.head_dim * 2;
        let positions = REPLICATED_BYTES / of_position / 64 * 64;
        match self.stream_placement(frame).groups {
            Split::Columns => positions,
            Split::Rows => 0,
        }
    }

    /// Units of the residual stream that its readers take side by side, for one column; never too few.
    fn stream_units(&self, frame: &Frame<'_>) -> usize {
        let placement = self.stream_placement(frame);
        let producers = placement.row_parts(&frame.mesh);
        // At most: a pass of one tile wastes the most of its last word.
        let tiles = (self.graph.hidden / TILE).div_ceil(producers).max(1);
        producers * tiles * TILE.div_ceil(VALUES_PER_WORD)
    }

    fn stream_placement(&self, frame: &Frame<'_>) -> Placement {
        self.graph
            .layer
            .iter()
            .zip(frame.placements)
            .find_map(|(node, placement)| match &node.op {
                FusedOp::Linear(FusedLinear {
                    epilogue: Epilogue::AddResidual,
                    ..
                }) => *placement,
                _ => None,
            })
            .unwrap_or(Placement::ALL[0])
    }

    fn stream_fits(&self, frame: &Frame<'_>, columns: usize, form: StreamForm) -> bool {
        let units = self.stream_units(frame);
        let threads = CONSUMER_WARPS * 32;
        match form {
            StreamForm::Replicated => {
                let per_thread = (columns * units)
                    .div_ceil(threads)
                    .max(columns.div_ceil(CONSUMER_WARPS));
                per_thread <= STREAM_WORDS
            }
            StreamForm::Scattered => {
                // What a pass, of up to four tiles, of one producer gives of a column takes half a warp.
                let producers = self.stream_placement(frame).row_parts(&frame.mesh);
                let tiles = (self.graph.hidden / TILE).div_ceil(producers).max(1);
                let runs = columns * producers * tiles.div_ceil(4);
                runs.div_ceil(frame.mesh.workers()) <= 2 * CONSUMER_WARPS
            }
        }
    }

    fn weight_bytes(&self) -> u64 {
        let bytes = |linear: &FusedLinear| -> u64 {
            linear
                .parts
                .iter()
                .map(|w| {
                    self.graph.weights[w.0 as usize]
                        .shape
                        .iter()
                        .product::<usize>() as u64
                        * 2
                })
                .sum()
        };
        let layer: u64 = self
            .graph
            .layer
            .iter()
            .map(|node| {
                if let FusedOp::Linear(linear) = &node.op {
                    bytes(linear)
                } else {
                    0
                }
            })
            .sum();
        layer * self.graph.layers as u64 + bytes(&self.graph.head)
    }

    fn cost(&self, frame: &Frame<'_>, step: &StepPlan, decode: bool) -> StepCost {
        let (mesh, machine) = (&frame.mesh, &self.machine);
        let threads = CONSUMER_WARPS * 32;
        let (mut tiles, mut chain) = (0, 0.0);
        for (i, node) in self.graph.layer.iter().enumerate() {
            let (linear, placement) = match (&node.op, frame.placements[i]) {
                (FusedOp::Linear(linear), Some(placement)) => (linear, placement),
                _ => {
                    chain += self.attention_cost(frame, step);
                    continue;
                }
            };
            let rows: usize = linear
                .parts
                .iter()
                .map(|w| self.graph.weights[w.0 as usize].shape[0])
                .sum();
            let columns = self.graph.columns(linear);
            // The largest slice decides.
            let over = |size: usize, split: Split| {
                let groups = if placement.groups == split {
                    mesh.groups
                } else {
                    1
                };
                let members = if placement.members == split {
                    mesh.members
                } else {
                    1
                };
                (size / TILE).div_ceil(groups).div_ceil(members)
            };
            let (row_tiles, k_tiles) = (over(rows, Split::Rows), over(columns, Split::Columns));
            tiles += row_tiles * k_tiles;
            chain += machine.linear + machine.pass * row_tiles.div_ceil(4).saturating_sub(1) as f64;
            let outputs = if linear.epilogue == Epilogue::SwiGlu {
                rows / 2
            } else {
                rows
            };
            chain += self.exchange_cost(frame, step, linear, placement, outputs, threads);
        }
        let positions = if decode {
            self.target.batch * self.target.depth()
        } else {
            self.target.depth()
        };
        let kv_bytes = positions * 2 * self.attention.kv_heads * self.attention.head_dim * 2;
        let layer_stream = (tiles * TILE_BYTES * mesh.workers() + kv_bytes) as f64 / machine.stream;
        let layer = machine.overlap(layer_stream, chain);
        let head = if decode {
            let head_tiles =
                (self.graph.vocab / TILE).div_ceil(mesh.ctas) * self.graph.hidden / TILE;
            (head_tiles * TILE_BYTES * mesh.ctas) as f64 / machine.stream + 2.0 * machine.hop
        } else {
            machine.hop
        };
        let total = layer * self.graph.layers as f64 + head;
        StepCost {
            layer_stream,
            layer_chain: chain,
            layer,
            head,
            total,
        }
    }

    /// Adds to the prediction what the program's ring costs: small pages keep too few bytes in flight, and each is some
    /// work to use up.
    fn add_ring(&self, plan: &mut Plan, program: &Program) {
        let (machine, ring, mesh) = (&self.machine, &program.ring, &plan.mesh);
        let pages = |linear: &Linear| {
            let t = &linear.tiling;
            t.passes * t.k.div_ceil(t.page_k)
        };
        let stretched = |stream: f64, ctas: usize, pages: usize, in_flight: usize| {
            let rate = machine.ring_rate(in_flight * ring.page_bytes, ctas);
            (stream * machine.stream / rate).max(pages as f64 * machine.page)
        };
        let of_layer: usize = program.linears.iter().map(pages).sum();
        let [prefill, decode] = program.steps().map(|(_, step)| program.exchanges(step));
        for (step, exchanges, with_head) in [
            (&mut plan.prefill, prefill, false),
            (&mut plan.decode, decode, true),
        ] {
            let cost = &mut step.cost;
            cost.layer_stream =
                stretched(cost.layer_stream, mesh.workers(), of_layer, ring.in_flight)
                    + machine.stalls(ring, exchanges, mesh.workers());
            cost.layer = machine.overlap(cost.layer_stream, cost.layer_chain);
            if with_head {
                cost.head = stretched(
                    cost.head,
                    mesh.ctas,
                    pages(&program.head),
                    ring.head_in_flight,
                );
            }
            cost.total = cost.layer * self.graph.layers as f64 + cost.head;
        }
    }

    /// What it takes to bring a linear's output to its reader.
    fn exchange_cost(
        &self,
        frame: &Frame<'_>,
        step: &StepPlan,
        linear: &FusedLinear,
        placement: Placement,
        outputs: usize,
        threads: usize,
    ) -> f64 {
        let (mesh, machine) = (&frame.mesh, &self.machine);
        let partials = |split: Split, size: usize| if split == Split::Columns { size } else { 1 };
        let sums =
            partials(placement.groups, mesh.groups) * partials(placement.members, mesh.members);
        let words = step.columns * outputs.div_ceil(VALUES_PER_WORD);
        match linear.epilogue {
            Epilogue::AddResidual => match step.stream {
                StreamForm::Replicated => machine.exchange(words * sums, threads),
                StreamForm::Scattered => {
                    machine.exchange((words * sums).div_ceil(mesh.workers()), threads)
                        + machine.exchange(words, threads)
                }
            },
            // Read by the group, or by all where the next linear does not split its columns over the groups.
            Epilogue::SwiGlu | Epilogue::Store => {
                let reader = self.stream_placement(frame);
                let all = linear.epilogue == Epilogue::SwiGlu && reader.groups == Split::Rows;
                let parts = if all { 1 } else { mesh.groups };
                machine.exchange(words.div_ceil(parts) * sums, threads)
            }
        }
    }

    fn attention_cost(&self, frame: &Frame<'_>, step: &StepPlan) -> f64 {
        let (mesh, machine, a) = (&frame.mesh, &self.machine, self.attention);
        let heads = a.heads / mesh.groups;
        let tasks = step.columns * heads / frame.heads_per_task * step.kv_splits;
        let stripes = self.target.depth().div_ceil(STRIPE);
        let active = stripes.min(step.kv_splits);
        let of_batch = machine.kv_batch + machine.kv_head * frame.heads_per_task as f64;
        let task = stripes.div_ceil(active) as f64 * of_batch;
        let heads_of_reader = if self.stream_placement(frame).groups == Split::Rows {
            a.heads
        } else {
            heads
        };
        let copies = if step.kv_splits > 1 { 2 * active } else { 1 };
        let words = step.columns * heads_of_reader * a.head_dim.div_ceil(VALUES_PER_WORD) * copies;
        machine.attention * tasks.div_ceil(mesh.members) as f64
            + task * tasks.div_ceil(mesh.members) as f64
            + machine.exchange(words, CONSUMER_WARPS * 32)
    }
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|d| n.is_multiple_of(*d)).collect()
}

#[cfg(test)]
mod tests;
