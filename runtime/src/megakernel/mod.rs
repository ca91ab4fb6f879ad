//! The GPU executor: a compiled program's one kernel, its weights and its KV cache on a device.
//!
//! Owns the device memory of a loaded model and the launch. One launch is one generation of a whole batch, from prompts
//! to last tokens; tokens appear in host memory while it runs. It must not know graphs, text or how requests are queued.

mod launch;

use std::sync::atomic::Ordering;

use half::bf16;
use mirage_compiler::emit::ENTRY;
use mirage_compiler::program::{Program, THREADS, WORD_BYTES, step_epochs};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::gpu::{DeviceBuffer, Event, Function, Gpu, GpuError, LaunchConfig, MappedBuffer, Module, Stream};
use crate::pack::{PackError, Packer, rope_table};
use crate::sampler::SamplingParams;
use launch::{Params, PrefillColumn, Sequence, prefill_columns};

/// Stop tokens a launch takes.
pub const MAX_STOP_TOKENS: usize = 64;

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
    /// Another program holds a part of the SMs or of their shared memory.
    #[error("the kernel's {needed} CTAs do not fit {gpu} at the same time (room for {found}); is it compiled for this GPU?")]
    NotResident {
        /// The device.
        gpu: String,
        /// CTAs of the program's mesh.
        needed: usize,
        /// CTAs that fit at once.
        found: usize,
    },
    /// The request does not fit the compiled program.
    #[error("{0}")]
    Request(String),
}

/// One sequence of a launch.
#[derive(Clone, Debug)]
pub struct SequenceRequest<'a> {
    /// Its given tokens; at least one.
    pub prompt: &'a [u32],
    /// How many of them come through prefill steps; the rest, at least one, are computed one a decode step.
    pub prefill: usize,
    /// Tokens to make, at least one.
    pub max_new: usize,
    /// How they are chosen.
    pub sampling: SamplingParams,
    /// Index among the sequences of the same seed.
    pub stream: u32,
    /// Whether to keep the logits of every decode position.
    pub logits: bool,
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
    logits: DeviceBuffer<f32>,
    tokens_out: MappedBuffer<u32>,
    cancel: MappedBuffer<u32>,
    epoch: u32,
}

impl Megakernel {
    /// Loads a compiled program and a checkpoint's weights. `progress` hears of the bytes of weights that are on the
    /// device, and of all there are.
    pub fn load(
        gpu: &Gpu,
        program: Program,
        cubin: &[u8],
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Megakernel, MegakernelError> {
        let needed = program.mesh.ctas;
        let gpu_name = || gpu.name().to_owned();
        if needed > gpu.sm_count() {
            return Err(MegakernelError::TooFewSms { gpu: gpu_name(), needed, found: gpu.sm_count() });
        }
        let module = Module::load(gpu, cubin)?;
        let function = module.function(ENTRY)?;
        function.set_dynamic_shared_bytes(program.shared.bytes)?;
        let found = function.max_blocks_per_sm(THREADS, program.shared.bytes)? * gpu.sm_count();
        if found < needed {
            return Err(MegakernelError::NotResident { gpu: gpu_name(), needed, found });
        }

        let stream = Stream::new(gpu)?;
        let packer = Packer::new(&program, checkpoint)?;
        let offsets = program.stream_offsets();
        let total = offsets[needed];
        let mut weights = DeviceBuffer::<u8>::zeroed(gpu, total as usize)?;
        // A batch of streams is packed on all cores, then sent; what is staged stays small beside the model.
        let ctas: Vec<usize> = (0..needed).collect();
        for batch in ctas.chunks(rayon::current_num_threads().max(1)) {
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
            keys: DeviceBuffer::zeroed(gpu, program.cache_elements())?,
            values: DeviceBuffer::zeroed(gpu, program.cache_elements())?,
            exchange: DeviceBuffer::zeroed(gpu, program.exchange.words * WORD_BYTES / 4)?,
            logits: DeviceBuffer::zeroed(gpu, program.slots * program.vocab)?,
            tokens_out: MappedBuffer::zeroed(gpu, program.slots * program.max_seq)?,
            cancel: MappedBuffer::zeroed(gpu, 1)?,
            epoch: 0,
            gpu: gpu.clone(),
            stream,
            function,
            program,
        })
    }

    /// What it was compiled as.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Starts a generation: one launch for the whole batch.
    pub fn start(
        &mut self,
        requests: &[SequenceRequest<'_>],
        stop_tokens: &[u32],
    ) -> Result<Running<'_>, MegakernelError> {
        self.check(requests, stop_tokens)?;
        let program = &self.program;
        let mut rows = 0;
        let mut prompts = vec![0; program.slots * program.max_seq];
        let mut sequences = Vec::new();
        for (slot, request) in requests.iter().enumerate() {
            prompts[slot * program.max_seq..][..request.prompt.len()].copy_from_slice(request.prompt);
            let logits_row = if request.logits {
                // Rows count from position 0, though only decode positions are written.
                let at = rows;
                rows += request.prompt.len() + request.max_new - 1;
                at as i32
            } else {
                -1
            };
            let temperature = request.sampling.temperature;
            sequences.push(Sequence {
                prompt_length: request.prompt.len() as u32,
                first_decode: request.prefill as u32,
                max_new: request.max_new as u32,
                top_k: request.sampling.top_k,
                inverse_temperature: if temperature > 0.0 { 1.0 / temperature } else { 0.0 },
                top_p: request.sampling.top_p,
                seed: request.sampling.seed,
                stream: request.stream,
                logits_row,
            });
            let out = &self.tokens_out.atomics()[slot * program.max_seq..][..program.max_seq];
            out.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        let tokens: Vec<&[u32]> = requests.iter().map(|request| request.prompt).collect();
        let first: Vec<u32> = sequences.iter().map(|sequence| sequence.first_decode).collect();
        let columns = prefill_columns(&tokens, &first, program.prefill.columns);
        let prefill_steps = columns.len() / program.prefill.columns;
        let decode_steps =
            requests.iter().map(|r| r.prompt.len() - r.prefill + r.max_new).max().unwrap_or(0);
        let epochs = ((prefill_steps + decode_steps + 1) * step_epochs(program.layers)) as u32;
        if self.epoch.checked_add(epochs).is_none() {
            // Epochs start anew; no word may carry one of the old ones.
            self.exchange.clear(&self.stream)?;
            self.epoch = 0;
        }
        self.cancel.write(0, 0);

        let data = LaunchData {
            prompts: DeviceBuffer::from_slice(&self.gpu, &prompts)?,
            sequences: DeviceBuffer::from_slice(&self.gpu, &sequences)?,
            prefill: DeviceBuffer::<PrefillColumn>::from_slice(&self.gpu, &columns)?,
            stop_tokens: DeviceBuffer::from_slice(&self.gpu, stop_tokens)?,
            logits_dump: DeviceBuffer::zeroed(&self.gpu, rows * program.vocab)?,
        };
        let params = Params {
            weights: self.weights.device_pointer(),
            stream_offsets: self.stream_offsets.device_pointer(),
            embedding: self.embedding.device_pointer(),
            norms: self.norms.device_pointer(),
            rope: self.rope.device_pointer(),
            keys: self.keys.device_pointer(),
            values: self.values.device_pointer(),
            exchange: self.exchange.device_pointer(),
            logits: self.logits.device_pointer(),
            logits_dump: data.logits_dump.device_pointer(),
            prompts: data.prompts.device_pointer(),
            sequences: data.sequences.device_pointer(),
            prefill: data.prefill.device_pointer(),
            stop_tokens: data.stop_tokens.device_pointer(),
            tokens_out: self.tokens_out.device_pointer(),
            cancel: self.cancel.device_pointer(),
            stop_count: stop_tokens.len() as u32,
            prefill_steps: prefill_steps as u32,
            batch: requests.len() as u32,
            epoch: self.epoch,
        };
        self.epoch += epochs;
        let config = LaunchConfig {
            grid: [program.mesh.ctas as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            dynamic_shared_bytes: program.shared.bytes as u32,
        };
        let (begin, end) = (Event::new(&self.gpu)?, Event::new(&self.gpu)?);
        begin.record(&self.stream)?;
        // SAFETY: `Params` is the twin of the kernel's parameter; all buffers have the sizes the program gives them, and
        // live in `self` and in `data`, which `Running` holds until the stream has passed the kernel.
        unsafe { self.function.launch_cooperative(&self.stream, config, &params)? };
        end.record(&self.stream)?;
        Ok(Running { model: self, data: Some(data), begin, end })
    }

    fn check(&self, requests: &[SequenceRequest<'_>], stop_tokens: &[u32]) -> Result<(), MegakernelError> {
        let program = &self.program;
        let fail = |reason: String| Err(MegakernelError::Request(reason));
        if requests.is_empty() || requests.len() > program.slots {
            return fail(format!(
                "{} sequences at once, but the kernel was compiled for 1 to {} (mirage-compile --batch)",
                requests.len(),
                program.slots
            ));
        }
        if stop_tokens.len() > MAX_STOP_TOKENS {
            return fail(format!("{} stop tokens, at most {MAX_STOP_TOKENS} are supported", stop_tokens.len()));
        }
        for (slot, request) in requests.iter().enumerate() {
            if request.prompt.is_empty() || request.max_new == 0 || request.prefill >= request.prompt.len() {
                return fail(format!("sequence {slot}: needs a prompt token to start from and at least one new token"));
            }
            // The last new token is only read by who asked for it.
            let positions = request.prompt.len() + request.max_new - 1;
            if positions > program.max_seq {
                return fail(format!(
                    "sequence {slot}: {} prompt tokens and {} new ones exceed the context of {} (mirage-compile --max-seq)",
                    request.prompt.len(),
                    request.max_new,
                    program.max_seq
                ));
            }
            if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= program.vocab) {
                return fail(format!("sequence {slot}: token {token} is outside the vocabulary of {}", program.vocab));
            }
            if let Err(error) = request.sampling.validate() {
                return fail(format!("sequence {slot}: {error}"));
            }
        }
        Ok(())
    }
}

/// Device memory that lives as long as a launch.
struct LaunchData {
    prompts: DeviceBuffer<u32>,
    sequences: DeviceBuffer<Sequence>,
    prefill: DeviceBuffer<PrefillColumn>,
    stop_tokens: DeviceBuffer<u32>,
    logits_dump: DeviceBuffer<f32>,
}

/// A generation under way. Dropping it cancels it and waits.
pub struct Running<'a> {
    model: &'a mut Megakernel,
    data: Option<LaunchData>,
    begin: Event,
    end: Event,
}

/// What a generation leaves behind beside its tokens.
pub struct Finished {
    /// Time of the kernel on the device, in milliseconds.
    pub kernel_ms: f32,
    /// Logits `[rows, vocab]` in f32: for each sequence that asked for them, a row of every position.
    logits: Option<(DeviceBuffer<f32>, Stream)>,
}

impl Finished {
    /// The logits, `[rows, vocab]` row after row.
    pub fn logits(&self) -> Result<Vec<f32>, GpuError> {
        match &self.logits {
            Some((buffer, stream)) => buffer.to_vec(stream),
            None => Ok(Vec::new()),
        }
    }
}

impl Running<'_> {
    /// Token `index` of sequence `slot`, once it is made.
    pub fn token(&self, slot: usize, index: usize) -> Option<u32> {
        let word = self.model.tokens_out.atomics().get(slot * self.model.program.max_seq + index)?;
        word.load(Ordering::Acquire).checked_sub(1)
    }

    /// Whether the kernel has ended. A fault of the kernel is an error here.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        self.end.is_passed()
    }

    /// Asks the kernel to end after the current step.
    pub fn cancel(&self) {
        self.model.cancel.write(0, 1);
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Result<Finished, MegakernelError> {
        self.end.synchronize()?;
        let kernel_ms = self.end.milliseconds_since(&self.begin)?;
        let logits = match self.data.take() {
            Some(data) if !data.logits_dump.is_empty() => Some((data.logits_dump, Stream::new(&self.model.gpu)?)),
            _ => None,
        };
        Ok(Finished { kernel_ms, logits })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.data.is_some() {
            self.cancel();
            // A failure here has its cause in the kernel, and shows at the next call on the device.
            let _ = self.end.synchronize();
        }
    }
}
