//! The search for the cheapest plan: enumerate, predict, keep the best that fits.

use thiserror::Error;

use super::{Plan, StepPlan, StreamForm, Target, Transport};
use crate::cost::{Machine, SearchConstants, StepCost};
use crate::fuse::{Epilogue, FusedAttention, FusedGraph, FusedLinear, FusedOp, Input};
use crate::mesh::{Mesh, Placement, Split};
use crate::program::{
    CONSUMER_WARPS, MOST_HEADS, Program, ProgramError, TILE, VALUES_PER_WORD, stream_share,
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
/// Columns of wide prefill steps, the widest first.
const WIDTHS: [usize; 2] = [64, 32];
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
        let machine = Machine::of(&target.gpu);
        let search = Search {
            graph,
            target,
            attention,
            machine,
            costs: machine.search,
        };
        let mut plans = search.plans()?;
        plans.sort_by(|a, b| objective(a).total_cmp(&objective(b)));
        let considered = plans.len();
        // What a plan is predicted to take can only grow with what its program's ring costs: once the next plan is not
        // better than the best program, none that follows is.
        let mut best: Option<Best> = None;
        let mut reason = None;
        for plan in plans.into_iter().take(TRIES) {
            if best
                .as_ref()
                .is_some_and(|best| objective(&best.plan) <= objective(&plan))
            {
                break;
            }
            let bound = Plan { considered, ..plan };
            match Program::new(graph, &bound, target) {
                Ok(program) => {
                    let mut plan = bound.clone();
                    search.add_ring(&mut plan, &program);
                    if best
                        .as_ref()
                        .is_none_or(|best| objective(&plan) < objective(&best.plan))
                    {
                        best = Some(Best {
                            bound,
                            plan,
                            program,
                        });
                    }
                }
                Err(error) => reason = reason.or(Some(error)),
            }
        }
        let best = best.map(|best| search.widened(best));
        let best = best.map(|(mut plan, mut program)| {
            search.predict(&mut plan, &program);
            program.plan = plan.clone();
            (plan, program)
        });
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

/// The best so far: a plan as it was enumerated, with what its program's ring costs added, and that program.
struct Best {
    bound: Plan,
    plan: Plan,
    program: Program,
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
    costs: SearchConstants,
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
                    let prefills: Vec<StepPlan> = [64, 32, 16, 8, 4, 2, 1]
                        .into_iter()
                        // The last prefill step holds every sequence's last position.
                        .filter(|&columns| {
                            columns >= decode_columns && columns <= decode_columns.max(16)
                        })
                        .flat_map(|columns| self.steps(&frame, columns, false))
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

    /// Adds the widest prefill steps for which there is room, if all else can stay as it is.
    fn widened(&self, best: Best) -> (Plan, Program) {
        let Best {
            bound,
            mut plan,
            mut program,
        } = best;
        // Smaller batches have not been measured with them.
        if self.target.batch <= Target::MAX_WORD_COLUMNS {
            return (plan, program);
        }
        let frame = Frame {
            mesh: plan.mesh,
            placements: &bound.placements,
            heads_per_task: plan.heads_per_task,
        };
        let of_rows = |columns: usize| {
            let mut step = self.step_of_rows(&frame, columns)?;
            step.cost = self.cost(&frame, &step, false);
            Some(step)
        };
        // A column must not depend on how wide its step is, which follows from the other prompts: with any, all prefill steps
        // exchange rows.
        let narrow = if self.target.batch == 1 {
            Some(bound.prefill.clone())
        } else {
            of_rows(bound.prefill.columns)
        };
        let widths = WIDTHS.into_iter();
        let found = widths
            .filter(|&columns| columns > bound.prefill.columns)
            .find_map(|columns| {
                let with = Plan {
                    prefill: narrow.clone()?,
                    wide: Some(of_rows(columns)?),
                    ..bound.clone()
                };
                let program = &program;
                let made = Program::new(self.graph, &with, self.target).ok()?;
                let tilings = |p: &Program| p.linears.iter().map(|l| l.tiling).collect::<Vec<_>>();
                let alike = made.ring == program.ring && tilings(&made) == tilings(program);
                alike.then_some((with, made))
            });
        if let Some((with, made)) = found {
            if self.target.batch > 1 {
                plan.prefill = with.prefill;
            }
            plan.wide = with.wide;
            program = made;
        }
        program.plan = plan.clone();
        (plan, program)
    }

    fn plan(&self, frame: &Frame<'_>, prefill: StepPlan, decode: StepPlan) -> Plan {
        let weight_bytes = self.weight_bytes();
        Plan {
            mesh: frame.mesh,
            placements: frame.placements.to_vec(),
            heads_per_task: frame.heads_per_task,
            prefill,
            wide: None,
            decode,
            weight_bytes,
            floor: weight_bytes as f64 / self.machine.stream_rate(),
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
        // Words are faster as far as they go.
        let by_words = columns <= Target::MAX_WORD_COLUMNS;
        let of_words = [StreamForm::Replicated, StreamForm::Scattered]
            .into_iter()
            .filter(|form| by_words && self.stream_fits(frame, columns, *form))
            .map(|stream| StepPlan {
                columns,
                transport: Transport::Words,
                stream,
                kv_splits,
                replicate_below: if decode {
                    self.replicate_below(frame, columns)
                } else {
                    0
                },
                cost: StepCost::default(),
            });
        let of_rows = (!by_words)
            .then(|| self.step_of_rows(frame, columns))
            .flatten();
        of_words
            .chain(of_rows)
            .map(|mut step| {
                step.cost = self.cost(frame, &step, decode);
                step
            })
            .collect()
    }

    /// A step that exchanges rows, where a worker's share of the stream fits its threads; its cost is open.
    fn step_of_rows(&self, frame: &Frame<'_>, columns: usize) -> Option<StepPlan> {
        let whole = columns.is_multiple_of(Target::ROW_COLUMNS);
        (whole && self.rows_fit(frame, columns)).then_some(StepPlan {
            columns,
            transport: Transport::Rows,
            stream: StreamForm::Scattered,
            kv_splits: 1,
            replicate_below: 0,
            cost: StepCost::default(),
        })
    }

    fn rows_fit(&self, frame: &Frame<'_>, columns: usize) -> bool {
        let workers = frame.mesh.workers();
        stream_share(self.graph.hidden, columns, workers) <= CONSUMER_WARPS * 32
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
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|d| n.is_multiple_of(*d)).collect()
}

mod predict;
#[cfg(test)]
mod tests;
