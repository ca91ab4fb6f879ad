//! One pass of rows through the launches of the [`Program`].
//!
//! Owns grids, blocks and parameters of every launch. It must not decide which rows pass, nor wait for anything: what it
//! does can be recorded as a CUDA graph.

use super::kernels::{
    ATTENTION_THREADS, AttentionParams, ElementwiseParams, KvAppendParams, RmsNormParams,
    RopeParams, SAMPLE_THREADS, SELECT_DIGITS, SampleParams, SampleSelectParams, TakeRowsParams,
    VECTOR,
};
use super::program::{Launch, Operands, Step};
use super::rows::{matmul_rows, splits};
use super::{Baseline, BaselineError};
use crate::gpu::{Function, GpuError, LaunchConfig};

/// Blocks of sampling for each row: the vocabulary is read by many multiprocessors.
const SAMPLE_BLOCKS: u32 = 64;

/// Where the rows of a pass are described: device addresses of u32 lists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    /// Rows.
    pub(super) rows: usize,
    /// Token of each.
    pub(super) tokens: u64,
    /// Sequence of each.
    pub(super) slots: u64,
    /// Position of each.
    pub(super) positions: u64,
    /// First row and number of rows of each tile.
    pub(super) tiles: u64,
    /// Tiles.
    pub(super) tile_count: usize,
    /// Whether a tile may have more than one row.
    pub(super) tiled: bool,
    /// Positions that attention must reach in this pass and, if it is recorded, in every replay.
    pub(super) longest: usize,
}

/// What the sampler has to do beyond the largest logit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cutoffs {
    /// Some sequence samples with top-k.
    pub(super) top_k: bool,
    /// Some sequence samples with top-p.
    pub(super) top_p: bool,
}

/// Which rows of a pass get tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    /// How many.
    pub(super) rows: usize,
    /// Their indices in the pass: device address of a u32 list.
    pub(super) index: u64,
    /// Whether they are all rows in order, so that nothing need be gathered.
    pub(super) all: bool,
    /// What the sampler needs.
    pub(super) cutoffs: Cutoffs,
}

impl Baseline {
    /// Tokens to the last state, for all rows.
    pub(super) fn run_body(&self, pass: &Pass) -> Result<(), BaselineError> {
        self.program
            .body
            .iter()
            .try_for_each(|step| self.run(step, pass, pass.rows, None))
    }

    /// Last state to logits and tokens, for the chosen rows. Without `sample` it ends with the logits.
    pub(super) fn run_head(
        &self,
        pass: &Pass,
        chosen: &Chosen,
        sample: bool,
    ) -> Result<(), BaselineError> {
        let steps = if chosen.all {
            &self.program.head
        } else {
            self.take_rows(
                self.program.state,
                chosen.index,
                self.program.gathered,
                self.program.width,
                chosen.rows,
            )?;
            &self.program.gathered_head
        };
        let wanted = |step: &&Step| sample || !matches!(step.launch, Launch::Sample { .. });
        steps
            .iter()
            .filter(wanted)
            .try_for_each(|step| self.run(step, pass, chosen.rows, Some(chosen)))
    }

    /// Launches of one decode step for greedy sampling, matrix products counted as one each.
    pub fn launches_per_step(&self) -> usize {
        self.program.body.len() + self.program.head.len()
    }

    fn run(
        &self,
        step: &Step,
        pass: &Pass,
        rows: usize,
        chosen: Option<&Chosen>,
    ) -> Result<(), BaselineError> {
        let kernels = &self.kernels;
        match step.launch {
            Launch::Embedding { table, out, width } => {
                self.take_rows(table, pass.tokens, out, width, rows)
            }
            Launch::RmsNorm {
                input,
                gamma,
                out,
                groups,
                width,
                eps,
            } => {
                let (groups, vectors) = (small(rows * groups), small(width / VECTOR));
                let params = RmsNormParams {
                    input,
                    gamma,
                    out,
                    groups,
                    vectors,
                    eps,
                };
                if vectors <= 32 && vectors.is_power_of_two() {
                    self.launch(
                        &kernels.rms_norm_narrow,
                        items(u64::from(groups) * u64::from(vectors), 128),
                        &params,
                    )
                } else {
                    let threads = vectors.next_multiple_of(32).min(1024);
                    self.launch(
                        &kernels.rms_norm_wide,
                        LaunchConfig::linear(groups, threads),
                        &params,
                    )
                }
            }
            Launch::Matmul {
                matrix,
                input,
                out,
                shape,
            } => {
                // SAFETY: the addresses are those of live buffers with room for `matmul_rows` rows.
                unsafe {
                    self.blas.multiply(
                        &self.stream,
                        shape,
                        matmul_rows(rows),
                        Operands { matrix, input, out },
                    )
                }
            }
            Launch::Rope {
                input,
                out,
                turns,
                heads,
                head_dim,
            } => {
                let (rows, heads, half_vectors) =
                    (small(rows), small(heads), small(head_dim / (2 * VECTOR)));
                let position = pass.positions;
                let params = RopeParams {
                    input,
                    out,
                    turns,
                    position,
                    rows,
                    heads,
                    half_vectors,
                };
                let count = u64::from(rows) * u64::from(heads) * u64::from(half_vectors);
                self.launch(&kernels.rope, items(count, 128), &params)
            }
            Launch::KvAppend {
                k,
                v,
                keys,
                values,
                kv_heads,
                head_dim,
            } => {
                let (rows, kv_heads, vectors) =
                    (small(rows), small(kv_heads), small(head_dim / VECTOR));
                let (slot, position, positions) = (pass.slots, pass.positions, small(self.max_seq));
                let params = KvAppendParams {
                    k,
                    v,
                    keys,
                    values,
                    slot,
                    position,
                    rows,
                    kv_heads,
                    vectors,
                    positions,
                };
                let count = u64::from(rows) * u64::from(kv_heads) * u64::from(vectors);
                self.launch(&kernels.kv_append, items(count, 128), &params)
            }
            Launch::Attention {
                q,
                keys,
                values,
                out,
                kernel,
                scale,
            } => {
                let kernel = &kernels.attention[kernel];
                let blocks = pass.tile_count * kernel.shape.kv_heads;
                let splits = splits(blocks, pass.longest, self.gpu.sm_count());
                let params = AttentionParams {
                    q,
                    keys,
                    values,
                    out,
                    partial: self.buffers.partial.device_pointer(),
                    arrived: self.buffers.arrived.device_pointer(),
                    tiles: pass.tiles,
                    slot: pass.slots,
                    position: pass.positions,
                    positions: small(self.max_seq),
                    scale: scale * std::f32::consts::LOG2_E,
                };
                let config = LaunchConfig {
                    grid: [
                        small(splits),
                        small(kernel.shape.kv_heads),
                        small(pass.tile_count),
                    ],
                    block: [ATTENTION_THREADS, 1, 1],
                    dynamic_shared_bytes: 0,
                };
                self.launch(
                    if pass.tiled {
                        &kernel.tiled
                    } else {
                        &kernel.single
                    },
                    config,
                    &params,
                )
            }
            Launch::Silu { input, out, width } => {
                self.elementwise(&kernels.silu, [input, 0, out], rows * width)
            }
            Launch::Mul { a, b, out, width } => {
                self.elementwise(&kernels.mul, [a, b, out], rows * width)
            }
            Launch::Add { a, b, out, width } => {
                self.elementwise(&kernels.add, [a, b, out], rows * width)
            }
            Launch::Sample { logits, vocab } => match chosen {
                Some(chosen) => self.sample(logits, vocab, pass, chosen),
                None => Ok(()),
            },
        }
    }

    fn take_rows(
        &self,
        table: u64,
        index: u64,
        out: u64,
        width: usize,
        rows: usize,
    ) -> Result<(), BaselineError> {
        let vectors = small(width / VECTOR);
        let threads = vectors.next_multiple_of(32).min(256);
        let params = TakeRowsParams {
            table,
            index,
            out,
            vectors,
        };
        self.launch(
            &self.kernels.take_rows,
            LaunchConfig::linear(small(rows), threads),
            &params,
        )
    }

    fn elementwise(
        &self,
        kernel: &Function,
        [a, b, out]: [u64; 3],
        elements: usize,
    ) -> Result<(), BaselineError> {
        let vectors = (elements / VECTOR) as u64;
        self.launch(
            kernel,
            items(vectors, 128),
            &ElementwiseParams { a, b, out, vectors },
        )
    }

    fn sample(
        &self,
        logits: u64,
        vocab: usize,
        pass: &Pass,
        chosen: &Chosen,
    ) -> Result<(), BaselineError> {
        let buffers = &self.buffers;
        let sample = SampleParams {
            logits,
            sampling: buffers.sampling.device_pointer(),
            state: buffers.sample_state.device_pointer(),
            histogram: buffers.histogram.device_pointer(),
            row: chosen.index,
            slot: pass.slots,
            position: pass.positions,
            next_token: buffers.tokens.device_pointer(),
            next_position: buffers.positions.device_pointer(),
            made: buffers.made.device_pointer(),
            history: buffers.history.device_pointer(),
            vocab: small(vocab),
            capacity: small(self.max_seq),
        };
        let config = LaunchConfig {
            grid: [SAMPLE_BLOCKS, small(chosen.rows), 1],
            block: [SAMPLE_THREADS, 1, 1],
            dynamic_shared_bytes: 0,
        };
        let select = |weighted: u32| {
            (0..SELECT_DIGITS).try_for_each(|digit| {
                self.launch(
                    &self.kernels.sample_select,
                    config,
                    &SampleSelectParams {
                        sample,
                        digit,
                        weighted,
                    },
                )
            })
        };
        if chosen.cutoffs.top_k {
            select(0)?;
        }
        if chosen.cutoffs.top_p {
            self.launch(&self.kernels.sample_max, config, &sample)?;
            select(1)?;
        }
        self.launch(&self.kernels.sample_pick, config, &sample)
    }

    fn launch<P: Copy>(
        &self,
        kernel: &Function,
        config: LaunchConfig,
        params: &P,
    ) -> Result<(), BaselineError> {
        // SAFETY: parameters have the layout of their namesakes (asserted at compilation), and their addresses are those
        // of buffers that live as long as `self`, of the sizes that `Baseline::new` gave them for `max_batch`,
        // `max_seq` and a chunk.
        unsafe { kernel.launch(&self.stream, config, params) }.map_err(GpuError::into)
    }
}

/// A thread for each item.
fn items(count: u64, threads: u32) -> LaunchConfig {
    LaunchConfig::linear(
        u32::try_from(count.div_ceil(u64::from(threads))).unwrap_or(u32::MAX),
        threads,
    )
}

/// Sizes that the graph's and the request's limits keep far below 2^32.
fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
