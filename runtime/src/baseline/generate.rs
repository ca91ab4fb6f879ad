//! Prompts to tokens: prefill, then one decode step for each further token.
//!
//! Owns the order of passes and steps. The tokens stay on the GPU from step to step; the host looks at
//! them only to stop early, and then one step late, so that the GPU never waits for it.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::forward::{Chosen, Cutoffs, Pass};
use super::request::{GenerateOutput, GenerateRequest, LaunchMode, Limits, Stops, Timings};
use super::rows::{Chunk, Prefill};
use super::{Baseline, BaselineError};
use crate::gpu::{CapturedGraph, DeviceBuffer, Event, Gpu};

impl Baseline {
    /// Generates tokens for all prompts together.
    ///
    /// # Errors
    /// [`BaselineError::Request`] or [`BaselineError::Sampling`] for a request that cannot be served, or a failing call.
    pub fn generate(&mut self, request: &GenerateRequest) -> Result<GenerateOutput, BaselineError> {
        let limits = Limits {
            batch: self.max_batch,
            seq: self.max_seq,
            vocab: self.program.vocab,
        };
        let (sampling, cutoffs) = limits.check(request)?;
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
            if stops.look(step.max(1), |slot, index| self.token(slot, index)) {
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
        self.buffers.history.words()[slot * self.max_seq + index].load(Ordering::Acquire)
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
