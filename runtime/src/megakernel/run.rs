//! One launch: what goes to the device, and what comes back while the kernel runs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use mirage_compiler::program::{THREADS, step_epochs};

use super::launch::{Params, PrefillColumn, Sequence};
use super::phased::State;
use super::{Form, Megakernel, MegakernelError, timeline};
use crate::generate::{
    CancelHandle, Event, Executor, FinishReason, GenerateError, GenerateRequest, Limits, Logits,
    Widths, prefill_steps,
};
use crate::gpu::{self, DeviceBuffer, Gpu, GpuError, LaunchConfig, Stream};

/// How long the host sleeps when no token has come: short beside a step, long enough to leave the core to others.
const POLL: Duration = Duration::from_micros(20);

/// Steps of a chain of kernels that wait on the stream: enough that the GPU never waits for the host.
const STEPS_AHEAD: usize = 3;

impl Executor for Megakernel {
    fn limits(&self) -> Limits {
        Limits::of(&self.program)
    }

    fn generate(
        &mut self,
        batch: &[GenerateRequest],
        cancel: &CancelHandle,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), GenerateError> {
        self.limits().check(batch)?;
        let launch: Vec<LaunchSequence<'_>> = batch
            .iter()
            .map(|request| LaunchSequence {
                request,
                first_logits: request.prompt.len() - 1,
                logits_row: None,
            })
            .collect();
        let mut progress: Vec<Progress<'_>> = batch.iter().map(Progress::new).collect();
        let mut running = self.start(&launch, 0).map_err(executor)?;
        loop {
            let ended = progress.iter().all(|progress| progress.reason.is_some());
            let made = progress.iter().map(|progress| progress.made).max();
            if ended || cancel.is_cancelled() {
                running.launch_no_more().map_err(executor)?;
            } else {
                let steps = made.unwrap_or(0) + STEPS_AHEAD;
                running.launch_steps(steps).map_err(executor)?;
            }
            // Asked before the tokens are read: what was made before the end is seen after it.
            let done = running.is_done().map_err(executor)?;
            if cancel.is_cancelled() {
                running.cancel();
            }
            let mut idle = true;
            for (sequence, progress) in progress.iter_mut().enumerate() {
                while progress.reason.is_none() {
                    let Some(token) = running.token(sequence, progress.made) else {
                        break;
                    };
                    idle = false;
                    let index = progress.made;
                    on_event(Event::Token {
                        sequence,
                        index,
                        token,
                    });
                    progress.push(token, running.model.program.max_seq);
                    if let Some(reason) = progress.reason {
                        on_event(Event::Finished { sequence, reason });
                    }
                }
            }
            if done {
                break;
            }
            if idle {
                std::thread::sleep(POLL);
            }
        }
        running.finish().map_err(executor)?;
        for (sequence, progress) in progress.iter().enumerate() {
            if progress.reason.is_none() {
                let reason = FinishReason::Cancelled;
                on_event(Event::Finished { sequence, reason });
            }
        }
        Ok(())
    }

    fn score(&mut self, sequences: &[Vec<u32>]) -> Result<Vec<Logits>, GenerateError> {
        self.limits().check_sequences(sequences)?;
        let vocab = self.program.vocab;
        let requests: Vec<GenerateRequest> = sequences
            .iter()
            .map(|tokens| GenerateRequest::greedy(tokens.clone(), 1))
            .collect();
        let mut rows = 0;
        let launch: Vec<LaunchSequence<'_>> = requests
            .iter()
            .map(|request| {
                let row = rows;
                rows += request.prompt.len();
                LaunchSequence {
                    request,
                    first_logits: 0,
                    logits_row: Some(row),
                }
            })
            .collect();
        let mut running = self.start(&launch, rows).map_err(executor)?;
        running.launch_steps(usize::MAX).map_err(executor)?;
        let dump = running.finish().map_err(executor)?;
        let mut all = dump.to_vec(&self.stream).map_err(executor)?;
        let mut scored: Vec<Logits> = Vec::with_capacity(sequences.len());
        for tokens in sequences {
            let rest = all.split_off(tokens.len() * vocab);
            scored.push(Logits { vocab, values: all });
            all = rest;
        }
        Ok(scored)
    }
}

fn executor<E: Into<MegakernelError>>(error: E) -> GenerateError {
    GenerateError::Executor(Box::new(error.into()))
}

/// What the host has seen of a sequence.
struct Progress<'a> {
    request: &'a GenerateRequest,
    made: usize,
    reason: Option<FinishReason>,
}

impl<'a> Progress<'a> {
    fn new(request: &'a GenerateRequest) -> Progress<'a> {
        Progress {
            request,
            made: 0,
            reason: None,
        }
    }

    /// Follows the kernel's own rules (`device/generate.cuh`, `advance`).
    fn push(&mut self, token: u32, context: usize) {
        self.made += 1;
        if self.request.stop_tokens.contains(&token) {
            self.reason = Some(FinishReason::Stop);
        } else if self.made >= self.request.max_new_tokens {
            self.reason = Some(FinishReason::Length);
        } else if self.request.prompt.len() + self.made > context {
            self.reason = Some(FinishReason::Context);
        }
    }
}

/// One sequence of a launch.
struct LaunchSequence<'a> {
    request: &'a GenerateRequest,
    /// The first position whose logits are of use: the last of a prompt that is gone through by prefill steps, or 0 where
    /// all go through decode steps.
    first_logits: usize,
    /// Row of the logits dump for position 0.
    logits_row: Option<usize>,
}

impl Megakernel {
    fn set_cancelled(&self, cancelled: bool) {
        for word in self.cancel.words() {
            word.store(u32::from(cancelled), Ordering::Relaxed);
        }
    }

    /// Starts the kernel. The sequences were checked against the limits; `rows` of logits are dumped.
    fn start(
        &mut self,
        batch: &[LaunchSequence<'_>],
        rows: usize,
    ) -> Result<Running<'_>, MegakernelError> {
        let (slots, context) = (self.program.slots, self.program.max_seq);
        let mut prompts = vec![0; slots * context];
        let mut stop_tokens = Vec::new();
        let mut sequences = Vec::with_capacity(batch.len());
        for (slot, sequence) in batch.iter().enumerate() {
            let request = sequence.request;
            prompts[slot * context..][..request.prompt.len()].copy_from_slice(&request.prompt);
            let temperature = request.sampling.temperature;
            sequences.push(Sequence {
                prompt_length: request.prompt.len() as u32,
                first_logits: sequence.first_logits as u32,
                max_new: u32::try_from(request.max_new_tokens).unwrap_or(u32::MAX),
                top_k: request.sampling.top_k,
                inverse_temperature: if temperature > 0.0 {
                    1.0 / temperature
                } else {
                    0.0
                },
                top_p: request.sampling.top_p,
                seed: request.sampling.seed,
                stream: request.stream,
                logits_row: sequence.logits_row.map_or(-1, |row| row as i32),
                stop_begin: stop_tokens.len() as u32,
                stop_count: request.stop_tokens.len() as u32,
            });
            stop_tokens.extend(&request.stop_tokens);
        }
        // Logits of every position need decode steps alone.
        let prefilled: Vec<&[u32]> = batch
            .iter()
            .filter(|sequence| sequence.logits_row.is_none())
            .map(|sequence| &sequence.request.prompt[..])
            .collect();
        let mut widths = Widths::of(&self.program);
        if self.form == Form::Phased {
            widths.wide = None; // the chain has no kernels for them
        }
        let steps = prefill_steps(&prefilled, widths);
        let wide = steps.iter().filter(|step| Some(step.len()) == widths.wide);
        let wide_steps = wide.count();
        let columns: Vec<PrefillColumn> = steps
            .iter()
            .flatten()
            .copied()
            .map(PrefillColumn::from)
            .collect();
        let decode_steps = batch
            .iter()
            .map(|s| {
                let prompt = s.request.prompt.len();
                let new = s.request.max_new_tokens.min(context + 1 - prompt);
                prompt - 1 - s.first_logits + new
            })
            .max()
            .unwrap_or(0);
        let epochs = (steps.len() + decode_steps + 1) * step_epochs(self.program.layers);
        // Steps are at most twice 2^20, layers at most 2^10: the product needs 64 bits only in theory.
        let epochs = u32::try_from(epochs).unwrap_or(u32::MAX);
        if self
            .epoch
            .checked_add(epochs)
            .is_none_or(|last| last > i32::MAX as u32)
        {
            // Epochs start anew; no word may carry one of the old ones.
            self.exchange.clear(&self.stream)?;
            self.epoch = 0;
        }
        for word in self.tokens_out.words() {
            word.store(0, Ordering::Relaxed);
        }
        self.set_cancelled(false);

        let (gpu, stream) = (&self.gpu, &self.stream);
        stage(&mut self.staged.prompts, gpu, stream, &prompts)?;
        stage(&mut self.staged.sequences, gpu, stream, &sequences)?;
        stage(&mut self.staged.prefill, gpu, stream, &columns)?;
        stage(&mut self.staged.stop_tokens, gpu, stream, &stop_tokens)?;
        if let Some(trace) = &mut self.trace {
            trace.clear(stream)?;
        }
        let logits_dump = DeviceBuffer::zeroed(gpu, rows * self.program.vocab)?;
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
            logits_dump: logits_dump.device_pointer(),
            prompts: self.staged.prompts.device_pointer(),
            sequences: self.staged.sequences.device_pointer(),
            prefill: self.staged.prefill.device_pointer(),
            stop_tokens: self.staged.stop_tokens.device_pointer(),
            tokens_out: self.tokens_out.device_pointer(),
            cancel: self.cancel.device_pointer(),
            wide_steps: wide_steps as u32,
            prefill_steps: (steps.len() - wide_steps) as u32,
            batch: batch.len() as u32,
            epoch: self.epoch,
            trace_events: if self.trace.is_some() {
                timeline::EVENTS as u32
            } else {
                0
            },
            padding: 0,
            trace: self.trace.as_ref().map_or(0, DeviceBuffer::device_pointer),
        };
        let state = self.first_state(batch, &params);
        self.epoch = self.epoch.saturating_add(epochs);
        let config = LaunchConfig {
            grid: [self.program.mesh.ctas as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            dynamic_shared_bytes: self.program.shared.bytes as u32,
        };
        let (begin, end) = (gpu::Event::new(&self.gpu)?, gpu::Event::new(&self.gpu)?);
        let mut running = Running {
            model: self,
            logits_dump: Some(logits_dump),
            begin,
            end,
            launched: 0,
            steps: 0,
        };
        let model = &mut *running.model;
        match (model.form, &mut model.chain) {
            (Form::Phased, Some(chain)) => {
                chain.prepare(&model.stream, &model.program, &params, state)?;
                running.begin.record(&model.stream)?;
                for step in 0..params.prefill_steps {
                    chain.prefill_step(&model.stream, step + 1 == params.prefill_steps)?;
                }
                running.steps = decode_steps;
                // The last prefill step makes the first tokens.
                running.launched = usize::from(params.prefill_steps > 0);
                if running.launched == running.steps {
                    running.end.record(&model.stream)?;
                }
            }
            (Form::Persistent, _) | (Form::Phased, None) => {
                running.begin.record(&model.stream)?;
                // SAFETY: `Params` is the twin of the kernel's parameter; all buffers have the sizes the program gives
                // them, and live in the model and in `running`, which waits until the stream has passed the kernel.
                unsafe {
                    model
                        .function
                        .launch_cooperative(&model.stream, config, &params)?;
                }
                running.end.record(&model.stream)?;
            }
        }
        Ok(running)
    }

    /// The columns of the first decode step, as `begin_decode` in `device/generate.cuh` sets them.
    fn first_state(&self, batch: &[LaunchSequence<'_>], params: &Params) -> State {
        let mut state = State::zeroed();
        state.epoch = params.epoch;
        state.slot = [-1; _];
        let vocab = self.program.vocab;
        for (slot, sequence) in batch.iter().enumerate() {
            let position = sequence.first_logits;
            state.slot[slot] = slot as i32;
            state.position[slot] = position as u32;
            state.token[slot] = sequence.request.prompt[position];
            state.first[slot] = slot as u32;
            let row = |base: u64, row: usize| base + (row * vocab * size_of::<f32>()) as u64;
            state.logits[slot] = match sequence.logits_row {
                Some(first) => row(params.logits_dump, first + position),
                None if sequence.request.sampling.temperature > 0.0 => row(params.logits, slot),
                None => 0,
            };
        }
        state
    }
}

/// What a generation is given, in device memory that is kept from one to the next.
pub(super) struct Staged {
    prompts: DeviceBuffer<u32>,
    sequences: DeviceBuffer<Sequence>,
    prefill: DeviceBuffer<PrefillColumn>,
    stop_tokens: DeviceBuffer<u32>,
}

impl Staged {
    pub(super) fn new(gpu: &Gpu) -> Result<Staged, GpuError> {
        Ok(Staged {
            prompts: DeviceBuffer::zeroed(gpu, 0)?,
            sequences: DeviceBuffer::zeroed(gpu, 0)?,
            prefill: DeviceBuffer::zeroed(gpu, 0)?,
            stop_tokens: DeviceBuffer::zeroed(gpu, 0)?,
        })
    }
}

/// Puts data on the device, in a new buffer only where the old one is too short.
fn stage<T: Pod>(
    buffer: &mut DeviceBuffer<T>,
    gpu: &Gpu,
    stream: &Stream,
    data: &[T],
) -> Result<(), GpuError> {
    if buffer.len() < data.len() {
        *buffer = DeviceBuffer::zeroed(gpu, data.len().next_power_of_two())?;
    }
    buffer.copy_from(stream, 0, data)
}

/// A generation under way. Dropping it cancels it and waits.
struct Running<'a> {
    model: &'a mut Megakernel,
    logits_dump: Option<DeviceBuffer<f32>>,
    begin: gpu::Event,
    end: gpu::Event,
    /// Steps with logits, of a chain of kernels, that are on the stream.
    launched: usize,
    /// All there will be; 0 where one kernel does all.
    steps: usize,
}

impl Running<'_> {
    /// Token `index` of sequence `slot`, once it is made.
    fn token(&self, slot: usize, index: usize) -> Option<u32> {
        let at = slot * self.model.program.max_seq + index;
        let word = self.model.tokens_out.words().get(at)?;
        word.load(Ordering::Acquire).checked_sub(1)
    }

    /// Puts decode steps on the stream until so many were.
    fn launch_steps(&mut self, up_to: usize) -> Result<(), GpuError> {
        let model = &mut *self.model;
        if let Some(chain) = &mut model.chain {
            while self.launched < self.steps.min(up_to) {
                chain.decode_step(&model.stream)?;
                self.launched += 1;
                if self.launched == self.steps {
                    self.end.record(&model.stream)?;
                }
            }
        }
        Ok(())
    }

    /// Leaves it at the steps that are on the stream.
    fn launch_no_more(&mut self) -> Result<(), GpuError> {
        if self.launched < self.steps {
            self.steps = self.launched;
            self.end.record(&self.model.stream)?;
        }
        Ok(())
    }

    /// Whether the generation has ended. A fault of a kernel is an error here.
    fn is_done(&self) -> Result<bool, GpuError> {
        if self.launched < self.steps {
            return Ok(false);
        }
        self.end.is_passed()
    }

    /// Asks the kernel to end after the step under way.
    fn cancel(&self) {
        self.model.set_cancelled(true);
    }

    /// Waits for the end and hands over the dumped logits.
    fn finish(mut self) -> Result<DeviceBuffer<f32>, MegakernelError> {
        self.end.synchronize()?;
        self.model.kernel_ms = Some(self.end.milliseconds_since(&self.begin)?);
        match self.logits_dump.take() {
            Some(logits_dump) => Ok(logits_dump),
            None => Ok(DeviceBuffer::zeroed(&self.model.gpu, 0)?),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.logits_dump.is_some() {
            self.cancel();
            // A failure here has its cause in the kernel, and shows at the next call on the device.
            let _ = self.model.stream.synchronize();
        }
    }
}
