//! The GPU executor: a compiled program's one kernel, its weights and its KV cache on a device.
//!
//! Owns the device memory of a loaded model; `upload.rs` fills it and `run.rs` launches. One launch is one generation of a
//! whole batch, from prompts to last tokens; tokens appear in host memory while it runs. It must not know graphs, text or
//! how requests are queued.

mod launch;
mod phased;
mod run;
pub mod timeline;
mod upload;

use std::time::Instant;

use half::bf16;
use mirage_compiler::emit::{ENTRY, PhasedSource, REPACK_ENTRY};
use mirage_compiler::program::{Program, THREADS, WORD_BYTES};

use self::phased::Chain;
use self::run::Staged;
use self::timeline::Timeline;
use self::upload::Upload;
use crate::checkpoint::Checkpoint;
use crate::gpu::{DeviceBuffer, Function, Gpu, GpuError, MappedBuffer, Module, Stream};
use crate::pack::{HostWeights, PackError, Packer, rope_table};

pub use self::upload::{LoadReport, Staging};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum MegakernelError {
    /// The device or its driver.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// The checkpoint.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The program was compiled for a GPU with more SMs.
    #[error(
        "the kernel was compiled for {needed} SMs, but {gpu} has {found}; compile it for this GPU (mirage-compile --arch)"
    )]
    TooFewSms {
        /// The device.
        gpu: String,
        /// CTAs of the program's mesh.
        needed: usize,
        /// SMs of the device.
        found: usize,
    },
    /// The CTAs cannot all run at the same time.
    #[error(
        "the kernel's {needed} CTAs do not fit {gpu} at the same time (room for {found}); compile it for this GPU (mirage-compile --arch)"
    )]
    NotResident {
        /// The device.
        gpu: String,
        /// CTAs of the program's mesh.
        needed: usize,
        /// CTAs that fit at once.
        found: usize,
    },
}

/// How a generation is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// One launch.
    #[default]
    Persistent,
    /// The same phases as kernels of their own, a step as a CUDA graph, to compare with. Needs [`Megakernel::add_phased`].
    Phased,
}

/// A model on a GPU, ready to generate.
pub struct Megakernel {
    gpu: Gpu,
    stream: Stream,
    function: Function,
    program: Program,
    weights: DeviceBuffer<u8>,
    stream_offsets: DeviceBuffer<u64>,
    embedding: DeviceBuffer<bf16>,
    norms: DeviceBuffer<bf16>,
    rope: DeviceBuffer<[f32; 2]>,
    keys: DeviceBuffer<bf16>,
    values: DeviceBuffer<bf16>,
    exchange: DeviceBuffer<u32>,
    /// `[slots, vocab]`, for sequences that sample.
    logits: DeviceBuffer<f32>,
    /// `[slots, max_seq]`, a token plus one where one was made.
    tokens_out: MappedBuffer,
    /// One word, not zero where the host has cancelled.
    cancel: MappedBuffer,
    staged: Staged,
    /// Every epoch used so far is at most this one.
    epoch: u32,
    form: Form,
    chain: Option<Chain>,
    kernel_ms: Option<f32>,
    /// `[ctas, EVENTS, 2]`, of a kernel with a timeline.
    trace: Option<DeviceBuffer<u32>>,
    load_report: LoadReport,
}

impl Megakernel {
    /// Loads a compiled program and a checkpoint's weights. `progress` hears of the bytes of the weights' streams and of the
    /// embedding table that are on the device, and of all there are.
    ///
    /// # Errors
    /// A checkpoint that does not fit the program, a GPU that does not, too little memory, or a failing driver call.
    pub fn load(
        gpu: &Gpu,
        program: Program,
        cubin: &[u8],
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Megakernel, MegakernelError> {
        let staging = Staging::default();
        Self::load_through(gpu, program, cubin, checkpoint, staging, progress)
    }

    /// As [`Self::load`], through staging memory of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_through(
        gpu: &Gpu,
        program: Program,
        cubin: &[u8],
        checkpoint: &Checkpoint,
        staging: Staging,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Megakernel, MegakernelError> {
        let begin = Instant::now();
        let (function, repack) = kernels(gpu, &program, cubin)?;
        let packer = Packer::new(&program, checkpoint)?;
        // All memory first: where it is short, it is short before the weights are read.
        let offsets = program.stream_offsets();
        let total = offsets[program.mesh.ctas];
        let mut weights = DeviceBuffer::<u8>::zeroed(gpu, total as usize)?;
        let keys = DeviceBuffer::zeroed(gpu, program.cache_elements())?;
        let values = DeviceBuffer::zeroed(gpu, program.cache_elements())?;
        let mut embedding = DeviceBuffer::zeroed(gpu, program.vocab * program.hidden)?;
        let exchange = DeviceBuffer::zeroed(gpu, program.exchange.words * WORD_BYTES / 4)?;
        let logits = DeviceBuffer::zeroed(gpu, program.slots * program.vocab)?;
        let upload = Upload::new(gpu, &packer, &repack, staging, &mut weights, &mut embedding);
        let prepare = begin.elapsed();
        let uploaded = upload.run(progress)?;
        let mut norms = vec![bf16::ZERO; program.norms.len];
        packer.pack_norms(&mut norms)?;
        let mut model = Megakernel {
            weights,
            stream_offsets: DeviceBuffer::from_slice(gpu, &offsets)?,
            embedding,
            norms: DeviceBuffer::from_slice(gpu, &norms)?,
            rope: DeviceBuffer::from_slice(gpu, &rope_table(&program))?,
            keys,
            values,
            exchange,
            logits,
            tokens_out: MappedBuffer::zeroed(gpu, program.slots * program.max_seq)?,
            cancel: MappedBuffer::zeroed(gpu, 1)?,
            staged: Staged::new(gpu)?,
            epoch: 0,
            form: Form::Persistent,
            chain: None,
            kernel_ms: None,
            trace: None,
            load_report: uploaded,
            gpu: gpu.clone(),
            stream: Stream::new(gpu)?,
            function,
            program,
        };
        model.load_report.prepare = prepare;
        model.load_report.total = begin.elapsed();
        Ok(model)
    }

    /// What loading took.
    pub fn load_report(&self) -> LoadReport {
        self.load_report
    }

    /// The weights as they lie on the device, to compare them with [`HostWeights::pack`]: all of them, in host memory.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn read_weights(&self) -> Result<HostWeights, MegakernelError> {
        Ok(HostWeights {
            streams: self.weights.to_vec(&self.stream)?,
            stream_offsets: self.stream_offsets.to_vec(&self.stream)?,
            embedding: self.embedding.to_vec(&self.stream)?,
            norms: self.norms.to_vec(&self.stream)?,
            rope: self.rope.to_vec(&self.stream)?,
        })
    }

    /// Adds the chain of kernels of [`Form::Phased`], compiled from the same program.
    ///
    /// # Errors
    /// A cubin that is not for this GPU, or a failing driver call.
    pub fn add_phased(
        &mut self,
        source: &PhasedSource,
        cubin: &[u8],
    ) -> Result<(), MegakernelError> {
        self.chain = Some(Chain::load(&self.gpu, &self.program, source, cubin)?);
        Ok(())
    }

    /// Makes room for the timeline of a kernel that was compiled with one (`CudaSource::traced`).
    ///
    /// # Errors
    /// Too little memory.
    pub fn record_timeline(&mut self) -> Result<(), MegakernelError> {
        let words = self.program.mesh.ctas * timeline::EVENTS * 2;
        self.trace = Some(DeviceBuffer::zeroed(&self.gpu, words)?);
        Ok(())
    }

    /// The timeline of the last generation; empty where none is recorded.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn timeline(&self) -> Result<Timeline, MegakernelError> {
        let words = match &self.trace {
            Some(trace) => trace.to_vec(&self.stream)?,
            None => Vec::new(),
        };
        Ok(Timeline::new(&self.program, &words))
    }

    /// Chooses how the next generations run. Without a chain all are persistent.
    pub fn set_form(&mut self, form: Form) {
        self.form = form;
    }

    /// Kernels that a decode step takes in [`Form::Phased`].
    pub fn phased_launches(&self) -> Option<usize> {
        let chain = self.chain.as_ref()?;
        Some(chain.launches(&self.program))
    }

    /// What it was compiled as.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Time of the last finished generation on the device, in milliseconds.
    pub fn kernel_ms(&self) -> Option<f32> {
        self.kernel_ms
    }
}

/// The kernel, once it is sure that all its CTAs run at the same time, and the one that repacks weights for it.
fn kernels(
    gpu: &Gpu,
    program: &Program,
    cubin: &[u8],
) -> Result<(Function, Function), MegakernelError> {
    let needed = program.mesh.ctas;
    let gpu_name = || gpu.name().to_owned();
    if needed > gpu.sm_count() {
        return Err(MegakernelError::TooFewSms {
            gpu: gpu_name(),
            needed,
            found: gpu.sm_count(),
        });
    }
    let module = Module::load(gpu, cubin)?;
    let function = module.function(ENTRY)?;
    function.set_dynamic_shared_bytes(program.shared.bytes)?;
    let per_sm = function.max_blocks_per_sm(THREADS, program.shared.bytes)?;
    let found = per_sm * gpu.sm_count();
    if found < needed {
        return Err(MegakernelError::NotResident {
            gpu: gpu_name(),
            needed,
            found,
        });
    }
    Ok((function, module.function(REPACK_ENTRY)?))
}
