//! The per-op baseline: the unfused graph on the GPU, one launch for each operator.
//!
//! Owns the comparison that the megakernel's speed is measured against, made as a good engineer makes it without a
//! compiler: every linear through cuBLASLt with the algorithm that is fastest for its shape, vectorised kernels for the
//! rest, attention split over positions, the sampler on the GPU, no wait of the host between steps. Same weights, KV cache,
//! sampling definition and stop rule as the engine. It must not fuse or reorder operators, and it must not know a model:
//! it walks the [`TypedGraph`], so another decoder needs no change here.
//!
//! Numerics: weights and values bf16, residual stream too, as PyTorch runs such a model; f32 inside each operator and
//! for the logits. A sequence's tokens may depend on the batch it is in, because cuBLASLt sums in another order for
//! another number of rows; the engine's do not.
//!
//! Prefill sends the prompts' tokens through in chunks; attention shares what it reads among a tile of rows, without
//! tensor cores, so that a prompt of thousands of tokens is not as fast here as it could be.

mod blas;
mod error;
mod forward;
mod generate;
mod kernels;
mod measure;
mod program;
mod request;
mod rows;
mod weights;

use std::collections::BTreeMap;

use half::bf16;
use mirage_compiler::ops::rope::Rope;
use mirage_compiler::typed::TypedGraph;

use crate::checkpoint::Checkpoint;
use crate::gpu::{DeviceBuffer, Gpu, MappedBuffer, Stream};
use crate::pack::rope_angles;

use blas::Blas;
use kernels::{Kernels, SAMPLE_BINS, SampleState, Sampling};
use program::{Memory, Program, Step, products};
use rows::{CHUNK, matmul_rows, most_parts};
use weights::Weights;

pub use error::BaselineError;
pub use measure::{DecodeTimes, LinearTime};
pub use request::{GenerateOutput, GenerateRequest, LaunchMode, Prompt, Timings};

/// Sequences that are decoded together at most.
pub const MAX_BATCH: usize = 16;

/// A model on the GPU, ready to generate.
pub struct Baseline {
    // Dropped in this order: what uses the memory first.
    blas: Blas,
    kernels: Kernels,
    program: Program,
    buffers: Buffers,
    arena: Arena,
    stream: Stream,
    gpu: Gpu,
    max_batch: usize,
    max_seq: usize,
}

/// Memory beside weights, values and caches. Lists have an entry for each sequence unless said otherwise.
struct Buffers {
    /// Parts of split attention.
    partial: DeviceBuffer<f32>,
    /// Arrivals at each tile and KV head.
    arrived: DeviceBuffer<u32>,
    /// What each sequence asks of the sampler.
    sampling: DeviceBuffer<Sampling>,
    sample_state: DeviceBuffer<SampleState>,
    histogram: DeviceBuffer<u64>,
    /// The next input of each sequence, and its position: what a decode step reads and the sampler writes.
    tokens: DeviceBuffer<u32>,
    positions: DeviceBuffer<u32>,
    /// 0, 1, 2 …: rows, sequences.
    identity: DeviceBuffer<u32>,
    /// Tiles of one row each.
    single_tiles: DeviceBuffer<u32>,
    /// Tokens made so far.
    made: DeviceBuffer<u32>,
    /// The tokens made, `max_seq` places for each sequence, in the host's memory.
    history: MappedBuffer,
}

impl Baseline {
    /// Uploads the weights that `graph` names from `checkpoint` as bf16, and compiles the kernels, for up to `max_batch`
    /// sequences of up to `max_seq` tokens.
    ///
    /// # Errors
    /// A missing library, weights that do not fit the graph, operators of unusual shapes, too little memory.
    pub fn new(
        gpu: &Gpu,
        graph: &TypedGraph,
        checkpoint: &Checkpoint,
        max_batch: usize,
        max_seq: usize,
    ) -> Result<Self, BaselineError> {
        if !(1..=MAX_BATCH).contains(&max_batch) || max_seq == 0 {
            let rule =
                format!("the baseline takes 1 to {MAX_BATCH} sequences of at least one token");
            return Err(BaselineError::Request(format!(
                "{rule}, not {max_batch} of {max_seq}"
            )));
        }
        // First what is likeliest to be missing.
        let blas = Blas::new(gpu)?;
        let stream = Stream::new(gpu)?;
        let weights = Weights::upload(gpu, &stream, graph, checkpoint)?;
        let mut arena = Arena::new(gpu, weights, max_batch, max_seq)?;
        let program = Program::new(graph, &mut arena)?;
        let kernels = Kernels::load(gpu, &program.attention)?;
        let buffers = Buffers::new(gpu, &program, max_batch, max_seq)?;
        let gpu = gpu.clone();
        Ok(Self {
            blas,
            kernels,
            program,
            buffers,
            arena,
            stream,
            gpu,
            max_batch,
            max_seq,
        })
    }

    /// Sequences that can be decoded together.
    pub fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// Tokens that a sequence can have, prompt and answer together.
    pub fn max_seq(&self) -> usize {
        self.max_seq
    }

    /// Chooses the matrix products' algorithms for decode steps of `batch` sequences, if that was not done before. Takes
    /// some tenths of a second, so do it before anything is timed; generation does it where it is left out.
    ///
    /// # Errors
    /// More sequences than `max_batch`, or a failing call of cuBLASLt or the GPU.
    pub fn prepare(&mut self, batch: usize) -> Result<(), BaselineError> {
        if !(1..=self.max_batch).contains(&batch) {
            let limit = self.max_batch;
            return Err(BaselineError::Request(format!(
                "{batch} sequences at once, but the baseline was made for 1 to {limit}"
            )));
        }
        self.prepare_body(batch)?;
        self.prepare_head(batch)
    }

    fn prepare_body(&mut self, rows: usize) -> Result<(), BaselineError> {
        prepare(&mut self.blas, &self.stream, &self.program.body, rows)
    }

    fn prepare_head(&mut self, rows: usize) -> Result<(), BaselineError> {
        prepare(&mut self.blas, &self.stream, &self.program.head, rows)
    }

    /// Rows of a prefill's tile for which every attention kernel has room.
    fn tile(&self) -> usize {
        self.kernels
            .attention
            .iter()
            .map(|kernels| kernels.shape.tile())
            .min()
            .unwrap_or(1)
    }
}

/// Chooses the algorithms of all products of `steps`, which must be those of a laid-out program.
fn prepare(
    blas: &mut Blas,
    stream: &Stream,
    steps: &[Step],
    rows: usize,
) -> Result<(), BaselineError> {
    for (shape, operands) in products(steps) {
        // SAFETY: addresses and sizes are those that the program was laid out with, for `CHUNK` rows or, in the head,
        // `max_batch`, in memory that lives as long as the stream.
        unsafe { blas.prepare(stream, shape, matmul_rows(rows), &operands) }?;
    }
    Ok(())
}

impl Buffers {
    fn new(
        gpu: &Gpu,
        program: &Program,
        max_batch: usize,
        max_seq: usize,
    ) -> Result<Self, BaselineError> {
        let shapes = &program.attention;
        let part = shapes
            .iter()
            .map(|shape| shape.partial(shape.tile()))
            .max()
            .unwrap_or(0);
        let kv_heads = shapes.iter().map(|shape| shape.kv_heads).max().unwrap_or(0);
        let identity: Vec<u32> = (0..).take(max_batch).collect();
        let single_tiles: Vec<u32> = identity.iter().flat_map(|row| [*row, 1]).collect();
        Ok(Self {
            partial: DeviceBuffer::zeroed(gpu, most_parts(gpu.sm_count()) * part)?,
            arrived: DeviceBuffer::zeroed(gpu, CHUNK * kv_heads)?,
            sampling: DeviceBuffer::zeroed(gpu, max_batch)?,
            sample_state: DeviceBuffer::zeroed(gpu, max_batch)?,
            histogram: DeviceBuffer::zeroed(gpu, max_batch * SAMPLE_BINS)?,
            tokens: DeviceBuffer::zeroed(gpu, max_batch)?,
            positions: DeviceBuffer::zeroed(gpu, max_batch)?,
            identity: DeviceBuffer::from_slice(gpu, &identity)?,
            single_tiles: DeviceBuffer::from_slice(gpu, &single_tiles)?,
            made: DeviceBuffer::zeroed(gpu, max_batch)?,
            history: MappedBuffer::zeroed(gpu, max_batch * max_seq)?,
        })
    }
}

/// The device memory of weights, values, caches and tables.
struct Arena {
    gpu: Gpu,
    weights: Weights,
    values: Vec<DeviceBuffer<bf16>>,
    logits: DeviceBuffer<f32>,
    turns: BTreeMap<String, DeviceBuffer<[f32; 2]>>,
    max_batch: usize,
    max_seq: usize,
}

impl Arena {
    fn new(
        gpu: &Gpu,
        weights: Weights,
        max_batch: usize,
        max_seq: usize,
    ) -> Result<Self, BaselineError> {
        let (gpu, logits) = (gpu.clone(), DeviceBuffer::zeroed(gpu, 0)?);
        Ok(Self {
            gpu,
            weights,
            values: Vec::new(),
            logits,
            turns: BTreeMap::new(),
            max_batch,
            max_seq,
        })
    }

    fn keep(&mut self, elements: usize) -> Result<u64, BaselineError> {
        let buffer = DeviceBuffer::zeroed(&self.gpu, elements)?;
        let address = buffer.device_pointer();
        self.values.push(buffer);
        Ok(address)
    }
}

impl Memory for Arena {
    fn value(&mut self, width: usize) -> Result<u64, BaselineError> {
        self.keep(CHUNK * width)
    }

    fn logits(&mut self, width: usize) -> Result<u64, BaselineError> {
        self.logits = DeviceBuffer::zeroed(&self.gpu, self.max_batch * width)?;
        Ok(self.logits.device_pointer())
    }

    fn cache(&mut self, width: usize) -> Result<u64, BaselineError> {
        self.keep(self.max_batch * self.max_seq * width)
    }

    fn turns(&mut self, rope: &Rope, head_dim: usize) -> Result<u64, BaselineError> {
        // f64 is no key; its shortest exact text is.
        let key = format!("{head_dim} {rope:?}");
        if let Some(table) = self.turns.get(&key) {
            return Ok(table.device_pointer());
        }
        let table = rope_angles(rope, head_dim, self.max_seq);
        let table = DeviceBuffer::from_slice(&self.gpu, &table)?;
        let address = table.device_pointer();
        self.turns.insert(key, table);
        Ok(address)
    }

    fn weight(&self, index: usize, layer: usize) -> u64 {
        self.weights.address(index, layer)
    }
}
