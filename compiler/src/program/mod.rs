//! The program: the plan made concrete. Tiles, pages, buffers, phases: everything the executors and the emitter need.
//!
//! Owns the types; `lower.rs` makes them, `layout.rs` places them in memory, `stream.rs` orders the weights, `verify.rs`
//! checks them. Every CTA runs the same phases on its own slices, so there is one list of phases for all of them.
//!
//! A program is plain data and serialises: it is the manifest that goes with a cubin, and all the runtime sees of a graph.

mod display;
mod layout;
mod lower;
mod stream;
mod verify;

use serde::{Deserialize, Serialize};

use crate::fuse::{Epilogue, Rope, Weight, WeightId};
use crate::mesh::{Mesh, Placement, Share, Split, share};
use crate::plan::{Plan, StreamForm, Transport};

pub use layout::{CHOICE_BYTES, DRAW_BYTES, QUEUE_BYTES, Region, SharedLayout};
pub use lower::ProgramError;
pub use stream::{Block, Element, TILE_BYTES, Tile};
pub use verify::{Rule, Violation};

/// Values an exchange word carries (`device/words.cuh`).
pub const VALUES_PER_WORD: usize = 6;
/// Warps of a CTA that compute.
pub const CONSUMER_WARPS: usize = 8;
/// Positions that attention of a CTA works on at once, and the grain in which they go to the splits
/// (`device/kv_cache.cuh`, `kStripe`).
pub const STRIPE: usize = 8 * CONSUMER_WARPS;
/// Query heads of an attention task, at most: the columns of the tensor core's operand (`device/attention.cuh`,
/// `kMostHeads`).
pub const MOST_HEADS: usize = 8;
/// Threads of a CTA: the warps that compute, and one that streams weights (`device/prelude.cuh`, `kThreads`).
pub const THREADS: usize = (CONSUMER_WARPS + 1) * 32;
/// Products that a warp holds in a step that exchanges rows, in tiles of 16 rows and 8 columns (`device/rows.cuh`,
/// `kMostProducts`).
pub const MOST_PRODUCTS: usize = 24;
/// Rows and columns of a weight tile.
pub const TILE: usize = 16;
/// Bytes of an exchange word.
pub const WORD_BYTES: usize = 16;

/// A compiled decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// The graph's name.
    pub name: String,
    /// The plan it follows.
    pub plan: Plan,
    /// The mesh.
    pub mesh: Mesh,
    /// Times the layer runs in a step.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of tokens.
    pub vocab: usize,
    /// Sequences that run at once.
    pub slots: usize,
    /// Positions of a sequence, at most.
    pub max_seq: usize,
    /// The checkpoint's tensors.
    pub weights: Vec<Weight>,
    /// The embedding table.
    pub embedding: WeightId,
    /// Linears of a layer, in the order of the weight stream.
    pub linears: Vec<Linear>,
    /// The layer's attention.
    pub attention: Attention,
    /// The LM head.
    pub head: Linear,
    /// Vectors of one layer (gammas) one after the other, `[length]` each; then those of the head.
    pub norms: Norms,
    /// Steps that fill the KV cache.
    pub prefill: Step,
    /// Prefill steps of more columns, for long prompts, where there is room for them.
    pub wide: Option<Wide>,
    /// Steps that make tokens.
    pub decode: Step,
    /// Words of the exchange area in global memory.
    pub exchange: ExchangeLayout,
    /// Ring and shared memory.
    pub ring: Ring,
    /// Regions of shared memory.
    pub shared: SharedLayout,
}

/// Where each gamma lies in the array of norms. Units: elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Norms {
    /// Weights of one layer and where they begin in the layer's part.
    pub layer: Vec<(WeightId, usize)>,
    /// Elements of a layer's part.
    pub layer_stride: usize,
    /// The final norm's weight; it begins at `layers * layer_stride`.
    pub last: Option<WeightId>,
    /// All elements.
    pub len: usize,
}

/// RMSNorm ahead of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Norm {
    /// Which gamma it is.
    pub gamma: WeightId,
    /// First element of gamma in the array of norms, for layer 0.
    pub gamma_at: usize,
    /// Elements from one layer's gamma to the next's; zero for the head.
    pub gamma_stride: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Which rows of which parts the rows of a linear's packed weight are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RowOrder {
    /// The parts one after the other.
    Stacked,
    /// For each of `groups`: that group's rows of every part, so that a group's heads lie together.
    ByGroup {
        /// Groups of the mesh.
        groups: usize,
    },
    /// Eight rows of the first part, eight of the second, in turns: SwiGLU's two factors meet in one thread.
    Interleaved,
}

/// A matrix product of the layer, or the LM head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// Name of the fused node, an identifier.
    pub name: String,
    /// Graph operators it stands for, and where the first stands, for people.
    pub sources: Vec<String>,
    /// The matrices and their rows.
    pub parts: Vec<(WeightId, usize)>,
    /// Their columns.
    pub columns: usize,
    /// Order of the packed rows.
    pub order: RowOrder,
    /// What happens to the product.
    pub epilogue: Epilogue,
    /// RMSNorm ahead of it.
    pub norm: Option<Norm>,
    /// Placement on the mesh; the head's rows are split over all CTAs instead.
    pub placement: Placement,
    /// Row tiles in units that a group's share may not break.
    pub row_units: usize,
    /// Row tiles of a unit.
    pub unit_tiles: usize,
    /// Column tiles.
    pub k_tiles: usize,
    /// How a CTA works through its slice.
    pub tiling: Tiling,
    /// First of its words in the exchange area.
    pub words_at: usize,
    /// Where it hands on rows.
    pub rows: Rows,
    /// Where the residual stream after it is handed on in rows.
    pub stream_rows: Rows,
}

/// A buffer for rows in the exchange area, offsets in words. Zeros where no step exchanges rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// The rows, and the sums of squares of those of the residual stream.
    pub at: usize,
    /// Flags, 32 bits a CTA.
    pub flags_at: usize,
}

/// How a CTA works through its slice of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tiling {
    /// Row tiles of the largest slice.
    pub rows: usize,
    /// Column tiles of the largest slice.
    pub k: usize,
    /// Whether all slices have `rows` and these fill whole passes.
    pub rows_exact: bool,
    /// Whether all slices have `k` and these fill whole pages.
    pub k_exact: bool,
    /// Passes over the columns.
    pub passes: usize,
    /// Row tiles of a pass.
    pub pass_tiles: usize,
    /// Row tiles of one warp in a pass.
    pub tiles_per_warp: usize,
    /// Warps that split a pass's rows; the others split a page's columns.
    pub warp_rows: usize,
    /// Column tiles of a page.
    pub page_k: usize,
}

impl Tiling {
    /// Warps that split a page's columns.
    pub fn warp_k(&self) -> usize {
        CONSUMER_WARPS / self.warp_rows
    }

    /// Bytes of a full page.
    pub fn page_bytes(&self) -> usize {
        self.pass_tiles * self.page_k * TILE_BYTES
    }
}

impl Linear {
    /// Packed rows, tiles' padding included.
    pub fn rows(&self) -> usize {
        self.row_units * self.unit_tiles * TILE
    }

    /// Outputs: rows, or half of them after SwiGLU.
    pub fn outputs(&self) -> usize {
        self.rows() / TILE * self.outputs_per_tile()
    }

    /// Outputs of one row tile.
    pub fn outputs_per_tile(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu {
            TILE / 2
        } else {
            TILE
        }
    }

    /// Partial sums of each output.
    pub fn partials(&self, mesh: &Mesh) -> usize {
        self.placement.column_parts(mesh)
    }

    /// Words of one column of one CTA for one pass.
    pub fn pass_words(&self) -> usize {
        (self.tiling.pass_tiles * self.outputs_per_tile()).div_ceil(VALUES_PER_WORD)
    }

    /// Words of one column of one CTA.
    pub fn words(&self) -> usize {
        self.tiling.passes * self.pass_words()
    }

    /// Words of a producer's part of a handed-on residual stream, for one column: the next input, and of each pass the
    /// sum of squares (`device/residual.cuh`, `Gathered`).
    pub fn gathered_words(&self) -> usize {
        self.words() + self.tiling.passes
    }

    /// Runs of a scattered residual stream, what one pass of one producer gives of a column, that a worker's warps have
    /// room for: each in a power of two of a warp's lanes (`device/residual.cuh`, `Scattered`).
    pub fn run_slots(&self) -> usize {
        match self.pass_words().next_power_of_two() {
            slot @ ..=32 => CONSUMER_WARPS * 32 / slot,
            _ => 0,
        }
    }

    /// Elements of the widest input slice.
    pub fn width(&self) -> usize {
        self.tiling.k * TILE
    }

    /// The tiles of one worker: row tiles and column tiles.
    pub fn slice(&self, mesh: &Mesh, group: usize, member: usize) -> (Share, Share) {
        let mut rows = Share {
            begin: 0,
            count: self.row_units,
        };
        let mut k = Share {
            begin: 0,
            count: self.k_tiles,
        };
        match self.placement.groups {
            Split::Rows => rows = share(self.row_units, mesh.groups, group),
            Split::Columns => k = share(self.k_tiles, mesh.groups, group),
        }
        rows = Share {
            begin: rows.begin * self.unit_tiles,
            count: rows.count * self.unit_tiles,
        };
        let of_member = |whole: Share| {
            let part = share(whole.count, mesh.members, member);
            Share {
                begin: whole.begin + part.begin,
                count: part.count,
            }
        };
        match self.placement.members {
            Split::Rows => rows = of_member(rows),
            Split::Columns => k = of_member(k),
        }
        (rows, k)
    }

    /// Row tiles of pass `pass` of a slice with `rows` of them.
    pub fn pass_rows(&self, rows: usize, pass: usize) -> usize {
        rows.saturating_sub(pass * self.tiling.pass_tiles)
            .min(self.tiling.pass_tiles)
    }
}

/// Attention of the layer. The group's rows of q, k and v come in the order of [`RowOrder::ByGroup`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Name of the fused node.
    pub name: String,
    /// Graph operators it stands for.
    pub sources: Vec<String>,
    /// Index of the linear that makes q, k and v.
    pub qkv: usize,
    /// Query heads of a group.
    pub heads: usize,
    /// KV heads of a group.
    pub kv_heads: usize,
    /// Elements of a head: 64, 128 or 256.
    pub head_dim: usize,
    /// Query heads of one KV head that one task handles.
    pub heads_per_task: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// RMSNorm of q per head.
    pub q_norm: Option<Norm>,
    /// RMSNorm of k per head.
    pub k_norm: Option<Norm>,
    /// Rotary embedding.
    pub rope: Rope,
    /// First of its words in the exchange area.
    pub words_at: usize,
    /// Where it hands on rows.
    pub rows: Rows,
}

impl Attention {
    /// Rows of q, k and v of a group.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Elements of a group's heads.
    pub fn outputs(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Words of one head's values.
    pub fn value_words(&self) -> usize {
        self.head_dim.div_ceil(VALUES_PER_WORD)
    }

    /// Tasks of a group in a step.
    pub fn tasks(&self, step: &Step) -> usize {
        step.columns * (self.heads / self.heads_per_task) * step.kv_splits
    }

    /// Words of one head of one task: values, and the maximum and sum where several splits are merged.
    pub fn task_words(&self, step: &Step) -> usize {
        self.value_words() + usize::from(step.kv_splits > 1)
    }
}

/// How a reader combines what the coordinates of one mesh axis published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Along {
    /// Its own coordinate's values.
    Own,
    /// All coordinates' values side by side.
    Concat,
    /// The sum over the coordinates.
    Sum,
}

/// A reader's view of a linear's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Index of the linear that is read.
    pub source: usize,
    /// Along the groups.
    pub groups: Along,
    /// Along the members.
    pub members: Along,
}

/// The linear that a phase prepares the input of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Next {
    /// A linear of the same layer.
    SameLayer(usize),
    /// The first linear of the next layer; after the last layer, the head.
    NextLayer,
}

/// What all workers do together, one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// Multiply and publish.
    Linear(usize),
    /// Collect q, k and v, attend, publish; or keep the result as the input of a linear, where a column is replicated
    /// ([`Step::replicate_below`]).
    Attention {
        /// What is read.
        exchange: Exchange,
        /// The linear that multiplies the heads.
        next: usize,
    },
    /// Collect and merge the heads as the input of a linear. With `all_groups`, those of every group.
    CollectHeads {
        /// The linear that multiplies them.
        next: usize,
        /// Whether the linear needs the heads of all groups.
        all_groups: bool,
    },
    /// Collect a linear's output as the input of another.
    Collect {
        /// What is read.
        exchange: Exchange,
        /// The linear that multiplies it.
        next: usize,
    },
    /// Add a linear's output to the replicated residual stream and prepare the next input.
    AddToStream {
        /// What is read.
        exchange: Exchange,
        /// What is prepared.
        next: Next,
    },
    /// Add a linear's output to the worker's share of the stream and publish that as the next input.
    ReduceScatter {
        /// What is read.
        exchange: Exchange,
        /// First of the words it publishes.
        words_at: usize,
        /// What is prepared.
        next: Next,
    },
    /// Collect the next input from the workers' shares of the stream.
    GatherStream {
        /// The exchange whose scattered sums were published.
        exchange: Exchange,
        /// First of the words it reads.
        words_at: usize,
        /// What is prepared.
        next: Next,
    },
}

/// One kind of step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Token positions computed at once.
    pub columns: usize,
    /// How values are exchanged.
    pub transport: Transport,
    /// Form of the residual stream.
    pub stream: StreamForm,
    /// Parts of a sequence's positions.
    pub kv_splits: usize,
    /// A column below this position is attended to by every member of its group, for itself.
    pub replicate_below: usize,
    /// Phases of a layer.
    pub layer: Vec<Phase>,
}

/// Wide prefill steps. They come before all others, and have a ring of their own: their activation takes most of the memory
/// that is later the ring's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wide {
    /// The step; in rows, as the other prefill steps then are, and the same to the bit. Only where there is one sequence
    /// these may exchange words.
    pub step: Step,
    /// Its ring.
    pub ring: Ring,
    /// Regions of shared memory during these steps.
    pub shared: SharedLayout,
}

/// The exchange area: offsets in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExchangeLayout {
    /// The replicated stream of the last layer, for the CTAs that are no workers.
    pub stream_at: usize,
    /// Candidates of the LM head, of even steps and then of odd ones.
    pub candidates_at: usize,
    /// Sums over the tokens above a column's draws.
    pub sums_at: usize,
    /// Candidates of the sampler.
    pub samples_at: usize,
    /// The grid barrier.
    pub barrier_at: usize,
    /// The sampler's histograms.
    pub histograms_at: usize,
    /// All words.
    pub words: usize,
}

/// The ring through which weights stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Pages.
    pub pages: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Pages asked for and not yet there, at most, in the layers.
    pub in_flight: usize,
    /// The same in the head, where nothing but the stream is waited for.
    pub head_in_flight: usize,
}

/// Elements of 16 bytes of bf16, in which rows are handed on (`device/stream_rows.cuh`, `kChunk`).
pub const CHUNK: usize = 8;

/// Threads that a worker's share of the residual stream takes where it is handed on in rows: one for each chunk, whole runs
/// of them (`device/stream_rows.cuh`, `StreamRows::fits`).
pub fn stream_share(hidden: usize, columns: usize, workers: usize) -> usize {
    let chunks = hidden / CHUNK;
    let run = [32, 16, 8, 4, 2, 1]
        .into_iter()
        .find(|run| chunks.is_multiple_of(*run));
    let run = run.unwrap_or(1);
    (columns * (chunks / run)).div_ceil(workers.max(1)) * run
}

/// Epochs that one step uses: one a layer, the head's, and the sampler's barriers (`device/sampling.cuh`).
pub fn step_epochs(layers: usize) -> usize {
    layers + 2 + 8
}

impl Program {
    /// All kinds of step.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, &Step)> + Clone {
        let wide = self.wide.iter().map(|wide| ("wide prefill", &wide.step));
        [("prefill", &self.prefill)]
            .into_iter()
            .chain(wide)
            .chain([("decode", &self.decode)])
    }

    /// The ring of wide prefill steps, and that of all others.
    pub fn rings(&self) -> impl Iterator<Item = &Ring> {
        let wide = self.wide.iter().map(|wide| &wide.ring);
        [&self.ring].into_iter().chain(wide)
    }

    /// Columns of the widest step.
    pub fn most_columns(&self) -> usize {
        self.steps()
            .map(|(_, step)| step.columns)
            .max()
            .unwrap_or(0)
    }

    /// Exchange hops of a layer in a step.
    pub fn exchanges(&self, step: &Step) -> usize {
        step.layer
            .iter()
            .filter(|phase| !matches!(phase, Phase::Linear(_)))
            .count()
    }

    /// Elements of the key cache, and of the value cache.
    pub fn cache_elements(&self) -> usize {
        self.layers
            * self.slots
            * self.attention.kv_heads
            * self.mesh.groups
            * self.max_seq
            * self.attention.head_dim
    }

    /// The head's row tiles of a CTA.
    pub fn head_rows(&self, cta: usize) -> Share {
        share(self.head.row_units, self.mesh.ctas, cta)
    }
}
