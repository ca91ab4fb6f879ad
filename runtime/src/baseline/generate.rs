//! Prompts to tokens: prefill, then one decode step for each further token.
//!
//! Owns requests, their limits and the order of steps. The tokens stay on the GPU from step to step; the host looks at
//! them only to stop early, and then one step late, so that the GPU never waits for it.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::forward::{Chosen, Cutoffs, Pass};
use super::kernels::Sampling;
use super::rows::{Chunk, Prefill};
use super::{Baseline, BaselineError};
use crate::gpu::{CapturedGraph, DeviceBuffer, Event, Gpu};
use crate::sampler::SamplingParams;

/// How a decode step is put on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaunchMode {
    /// One launch after the other, by the host.
    #[default]
    Eager,
    /// All launches of a step at once, as a CUDA graph recorded before.
    Graph,
}

/// A prompt and how its answer is sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Greedy, temperature, top-k, top-p, seed.
    pub sampling: SamplingParams,
    /// Tells prompts of the same seed apart.
    pub sequence: u32,
}

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// One for each sequence, up to `max_batch`.
    pub prompts: Vec<Prompt>,
    /// Tokens for each, at least one.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence; with none, each gets `max_new_tokens`.
    pub stop_tokens: Vec<u32>,
    /// How decode steps are launched.
    pub mode: LaunchMode,
}

/// What was generated, and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOutput {
    /// The new tokens of each sequence, with the stop token that ended it, if one did.
    pub tokens: Vec<Vec<u32>>,
    /// Times of the whole request.
    pub timings: Timings,
}

/// Times in milliseconds. Copying the prompts to the GPU, choosing algorithms and recording graphs are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Host time until the first token of every sequence was there.
    pub time_to_first_token: f64,
    /// Host time until the last token was there.
    pub total: f64,
    /// GPU time of the prefill, to its sampled tokens.
    pub prefill: f64,
    /// GPU time of the decode steps, gaps between launches included.
    pub decode: f64,
    /// Decode steps, each of one token for every sequence.
    pub decode_steps: usize,
}

impl Baseline {
    /// Generates tokens for all prompts together.
    ///
    /// # Errors
    /// [`BaselineError::Request`] or [`BaselineError::Sampling`] for a request that cannot be served, or a failing call.
    pub fn generate(&mut self, request: &GenerateRequest) -> Result<GenerateOutput, BaselineError> {
        let (sampling, cutoffs) = self.check(request)?;
        let batch = request.prompts.len();
        let prompts: Vec<&[u32]> = request
            .prompts
            .iter()
            .map(|prompt| prompt.tokens.as_slice())
            .collect();
        let plan = Prefill::new(&prompts, self.tile());
        for chunk in &plan.chunks {
            self.prepare_body(chunk.rows.len())?;
            if !chunk.ends.is_empty() {
                self.prepare_head(chunk.ends.len())?;
            }
        }
        self.prepare(batch)?;
        let lists = PrefillLists::upload(&self.gpu, &plan)?;
        self.buffers
            .sampling
            .copy_from(&self.stream, 0, &sampling)?;
        self.buffers.made.clear(&self.stream)?;
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let steps = request.max_new_tokens - 1;
        let mut graph = match request.mode {
            LaunchMode::Graph if steps > 0 => {
                Some(self.record_step(batch, longest + steps, cutoffs)?)
            }
            LaunchMode::Graph | LaunchMode::Eager => None,
        };
        self.stream.synchronize()?;

        let events = [
            Event::new(&self.gpu)?,
            Event::new(&self.gpu)?,
            Event::new(&self.gpu)?,
            Event::new(&self.gpu)?,
        ];
        let [start, prefilled, decode_start, end] = &events;
        let started = Instant::now();
        start.record(&self.stream)?;
        for chunk in &plan.chunks {
            let pass = lists.pass(chunk);
            self.run_body(&pass)?;
            if !chunk.ends.is_empty() {
                let index = lists.ends(chunk);
                self.run_head(
                    &pass,
                    &Chosen {
                        rows: chunk.ends.len(),
                        index,
                        all: false,
                        cutoffs,
                    },
                    true,
                )?;
            }
        }
        prefilled.record(&self.stream)?;
        prefilled.synchronize()?;
        let time_to_first_token = 1e3 * started.elapsed().as_secs_f64();

        decode_start.record(&self.stream)?;
        let mut stops = Stops::new(&request.stop_tokens, batch);
        // Of the last two steps.
        let passed = [Event::new(&self.gpu)?, Event::new(&self.gpu)?];
        let mut made = 1;
        for step in 0..steps {
            if step >= 2 && !request.stop_tokens.is_empty() {
                // The step before the last one launched; the GPU is busy with that.
                passed[step % 2].synchronize()?;
            }
            if stops.look(self, step.max(1)) {
                break;
            }
            self.launch_step(graph.as_mut(), batch, longest + step + 1, cutoffs)?;
            passed[step % 2].record(&self.stream)?;
            made += 1;
        }
        end.record(&self.stream)?;
        self.stream.synchronize()?;
        let timings = Timings {
            time_to_first_token,
            total: 1e3 * started.elapsed().as_secs_f64(),
            prefill: prefilled.milliseconds_since(start)?.into(),
            decode: end.milliseconds_since(decode_start)?.into(),
            decode_steps: made - 1,
        };
        let tokens = (0..batch)
            .map(|slot| stops.cut((0..made).map(|index| self.token(slot, index))))
            .collect();
        Ok(GenerateOutput { tokens, timings })
    }

    /// Records a decode step for sequences of up to `longest` tokens.
    pub(super) fn record_step(
        &self,
        batch: usize,
        longest: usize,
        cutoffs: Cutoffs,
    ) -> Result<CapturedGraph, BaselineError> {
        self.stream
            .capture(|| self.decode_step(batch, longest, cutoffs))
    }

    /// Puts a decode step on the GPU, as recorded or launch by launch.
    pub(super) fn launch_step(
        &self,
        graph: Option<&mut CapturedGraph>,
        batch: usize,
        longest: usize,
        cutoffs: Cutoffs,
    ) -> Result<(), BaselineError> {
        match graph {
            // SAFETY: its launches point to the memory of `self`, which waits for the GPU before it frees any.
            Some(graph) => Ok(unsafe { graph.launch(&self.stream) }?),
            None => self.decode_step(batch, longest, cutoffs),
        }
    }

    /// One token for each of `batch` sequences, from the tokens and positions that the last step left.
    fn decode_step(
        &self,
        batch: usize,
        longest: usize,
        cutoffs: Cutoffs,
    ) -> Result<(), BaselineError> {
        let buffers = &self.buffers;
        let identity = buffers.identity.device_pointer();
        let pass = Pass {
            rows: batch,
            tokens: buffers.tokens.device_pointer(),
            slots: identity,
            positions: buffers.positions.device_pointer(),
            tiles: buffers.single_tiles.device_pointer(),
            tile_count: batch,
            tiled: false,
            longest,
        };
        self.run_body(&pass)?;
        self.run_head(
            &pass,
            &Chosen {
                rows: batch,
                index: identity,
                all: true,
                cutoffs,
            },
            true,
        )
    }

    /// Token `index` made for a sequence; it must be there.
    fn token(&self, slot: usize, index: usize) -> u32 {
        self.buffers.history.atomics()[slot * self.max_seq + index].load(Ordering::Acquire)
    }

    /// What the sampler is told, if the request can be served.
    fn check(&self, request: &GenerateRequest) -> Result<(Vec<Sampling>, Cutoffs), BaselineError> {
        let refuse = |text: String| Err(BaselineError::Request(text));
        let (batch, new) = (request.prompts.len(), request.max_new_tokens);
        if batch == 0 || batch > self.max_batch {
            return refuse(format!(
                "{batch} prompts, but the baseline was made for 1 to {}",
                self.max_batch
            ));
        }
        if new == 0 {
            return refuse("max_new_tokens is 0; ask for at least one token".to_owned());
        }
        let mut cutoffs = Cutoffs::default();
        let mut sampling = Vec::new();
        for (index, prompt) in request.prompts.iter().enumerate() {
            let length = prompt.tokens.len();
            if length == 0 {
                return refuse(format!(
                    "prompt {index} is empty; give it at least one token"
                ));
            }
            if length.saturating_add(new) > self.max_seq {
                return refuse(format!(
                    "prompt {index} has {length} tokens, and with {new} new ones it passes the context of {}; \
                     shorten it, ask for fewer tokens or raise the context",
                    self.max_seq
                ));
            }
            if let Some(token) = prompt
                .tokens
                .iter()
                .find(|token| **token as usize >= self.program.vocab)
            {
                let vocab = self.program.vocab;
                return refuse(format!(
                    "prompt {index} holds token {token}, but there are {vocab}; use the model's tokenizer"
                ));
            }
            let params = prompt.sampling;
            let sampler = params.sampler().map_err(|error| BaselineError::Sampling {
                prompt: index,
                error,
            })?;
            cutoffs.top_k |= !params.is_greedy() && params.top_k > 0;
            cutoffs.top_p |= !params.is_greedy() && params.top_p < 1.0;
            sampling.push(Sampling {
                seed: params.seed,
                inverse_temperature: sampler.inverse_temperature(),
                top_p: params.top_p,
                top_k: params.top_k,
                sequence: prompt.sequence,
            });
        }
        Ok((sampling, cutoffs))
    }
}

/// The lists of a [`Prefill`] on the GPU.
pub(super) struct PrefillLists {
    tokens: DeviceBuffer<u32>,
    slots: DeviceBuffer<u32>,
    positions: DeviceBuffer<u32>,
    tiles: DeviceBuffer<u32>,
    ends: DeviceBuffer<u32>,
}

impl PrefillLists {
    pub(super) fn upload(gpu: &Gpu, plan: &Prefill) -> Result<Self, BaselineError> {
        Ok(Self {
            tokens: DeviceBuffer::from_slice(gpu, &plan.tokens)?,
            slots: DeviceBuffer::from_slice(gpu, &plan.slots)?,
            positions: DeviceBuffer::from_slice(gpu, &plan.positions)?,
            tiles: DeviceBuffer::from_slice(gpu, plan.tiles.as_flattened())?,
            ends: DeviceBuffer::from_slice(gpu, &plan.ends)?,
        })
    }

    /// The pass of one chunk.
    pub(super) fn pass(&self, chunk: &Chunk) -> Pass {
        let from =
            |list: &DeviceBuffer<u32>, first: usize| list.device_pointer() + 4 * first as u64;
        Pass {
            rows: chunk.rows.len(),
            tokens: from(&self.tokens, chunk.rows.start),
            slots: from(&self.slots, chunk.rows.start),
            positions: from(&self.positions, chunk.rows.start),
            tiles: from(&self.tiles, 2 * chunk.tiles.start),
            tile_count: chunk.tiles.len(),
            tiled: true,
            longest: chunk.longest,
        }
    }

    /// Address of the rows that end a prompt.
    fn ends(&self, chunk: &Chunk) -> u64 {
        self.ends.device_pointer() + 4 * chunk.ends.start as u64
    }
}

/// Which sequences have met a stop token.
struct Stops<'a> {
    tokens: &'a [u32],
    stopped: Vec<bool>,
    seen: usize,
}

impl<'a> Stops<'a> {
    fn new(tokens: &'a [u32], batch: usize) -> Self {
        Self {
            tokens,
            stopped: vec![false; batch],
            seen: 0,
        }
    }

    /// Looks at the tokens up to number `made`; whether all sequences have stopped.
    fn look(&mut self, baseline: &Baseline, made: usize) -> bool {
        if self.tokens.is_empty() {
            return false;
        }
        for index in self.seen..made {
            for (slot, stopped) in self.stopped.iter_mut().enumerate() {
                *stopped |= self.tokens.contains(&baseline.token(slot, index));
            }
        }
        self.seen = self.seen.max(made);
        self.stopped.iter().all(|stopped| *stopped)
    }

    /// Tokens up to the first stop token, that one included.
    fn cut(&self, tokens: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut kept = Vec::new();
        for token in tokens {
            kept.push(token);
            if self.tokens.contains(&token) {
                break;
            }
        }
        kept
    }
}
