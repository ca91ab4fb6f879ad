//! The GPU executor: a compiled program's one kernel, its weights and its KV cache on a device.
//!
//! Owns the device memory of a loaded model; `run.rs` launches. One launch is one generation of a whole batch, from
//! prompts to last tokens; tokens appear in host memory while it runs. It must not know graphs, text or how requests are
//! queued.

mod launch;
mod phased;
mod run;
pub mod timeline;

use half::bf16;
use mirage_compiler::emit::{ENTRY, PhasedSource};
use mirage_compiler::program::{Program, THREADS, WORD_BYTES};
use rayon::prelude::*;

use self::phased::Chain;
use self::run::Staged;
use self::timeline::Timeline;
use crate::checkpoint::Checkpoint;
use crate::gpu::{DeviceBuffer, Function, Gpu, GpuError, MappedBuffer, Module, Stream};
use crate::pack::{PackError, Packer, rope_table};

/// Packed weights that wait in host memory to be sent, at most.
const STAGED_BYTES: usize = 2 << 30;

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
}

impl Megakernel {
    /// Loads a compiled program and a checkpoint's weights. `progress` hears of the bytes of weights that are on the
    /// device, and of all there are.
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
        let function = resident_function(gpu, &program, cubin)?;
        let packer = Packer::new(&program, checkpoint)?;
        let stream = Stream::new(gpu)?;
        // The largest array first: where memory is short, it is short before minutes of packing.
        let offsets = program.stream_offsets();
        let total = offsets[program.mesh.ctas];
        let mut weights = DeviceBuffer::<u8>::zeroed(gpu, total as usize)?;
        let keys = DeviceBuffer::zeroed(gpu, program.cache_elements())?;
        let values = DeviceBuffer::zeroed(gpu, program.cache_elements())?;
        // A batch of streams is packed on all cores, then sent; what is staged stays small beside the model.
        let ctas: Vec<usize> = (0..program.mesh.ctas).collect();
        let largest = ctas.iter().map(|&cta| program.stream_bytes(cta)).max();
        let at_once = (STAGED_BYTES / largest.unwrap_or(1).max(1))
            .min(rayon::current_num_threads())
            .max(1);
        for batch in ctas.chunks(at_once) {
            let packed: Vec<Vec<u8>> = batch
                .par_iter()
                .map(|&cta| {
                    let mut bytes = vec![0; program.stream_bytes(cta)];
                    packer.pack_stream(cta, &mut bytes).map(|()| bytes)
                })
                .collect::<Result<_, PackError>>()?;
            for (&cta, bytes) in batch.iter().zip(&packed) {
                weights.copy_from(&stream, offsets[cta] as usize, bytes)?;
                progress(offsets[cta + 1], total);
            }
        }
        let mut table = vec![bf16::ZERO; program.vocab * program.hidden];
        packer.pack_embedding(0, &mut table)?;
        let mut norms = vec![bf16::ZERO; program.norms.len];
        packer.pack_norms(&mut norms)?;
        Ok(Megakernel {
            weights,
            stream_offsets: DeviceBuffer::from_slice(gpu, &offsets)?,
            embedding: DeviceBuffer::from_slice(gpu, &table)?,
            norms: DeviceBuffer::from_slice(gpu, &norms)?,
            rope: DeviceBuffer::from_slice(gpu, &rope_table(&program))?,
            keys,
            values,
            exchange: DeviceBuffer::zeroed(gpu, program.exchange.words * WORD_BYTES / 4)?,
            logits: DeviceBuffer::zeroed(gpu, program.slots * program.vocab)?,
            tokens_out: MappedBuffer::zeroed(gpu, program.slots * program.max_seq)?,
            cancel: MappedBuffer::zeroed(gpu, 1)?,
            staged: Staged::new(gpu)?,
            epoch: 0,
            form: Form::Persistent,
            chain: None,
            kernel_ms: None,
            trace: None,
            gpu: gpu.clone(),
            stream,
            function,
            program,
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

/// The kernel's function, once it is sure that all its CTAs run at the same time.
fn resident_function(
    gpu: &Gpu,
    program: &Program,
    cubin: &[u8],
) -> Result<Function, MegakernelError> {
    let needed = program.mesh.ctas;
    let gpu_name = || gpu.name().to_owned();
    if needed > gpu.sm_count() {
        return Err(MegakernelError::TooFewSms {
            gpu: gpu_name(),
            needed,
            found: gpu.sm_count(),
        });
    }
    let function = Module::load(gpu, cubin)?.function(ENTRY)?;
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
    Ok(function)
}
