//! What the benchmark and the checks ask of the baseline besides tokens: times of decode steps, of matrix products, and
//! logits.

use std::time::Instant;

use super::forward::{Chosen, Cutoffs};
use super::generate::PrefillLists;
use super::kernels::Sampling;
use super::program::products;
use super::request::LaunchMode;
use super::rows::{Prefill, matmul_rows};
use super::{Baseline, BaselineError};
use crate::gpu::{DeviceBuffer, Event};

/// Steps before the timed ones.
const WARM_UP: usize = 3;

/// Times of decode steps.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeTimes {
    /// GPU milliseconds of each step, from the end of the one before. Launch by launch this includes the gaps in which
    /// the GPU waits for the host; from a CUDA graph there are hardly any.
    pub steps: Vec<f64>,
    /// Host milliseconds of all of them together.
    pub wall: f64,
}

/// Time of one shape of matrix product.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearTime {
    /// Names of the results in the graph, each once.
    pub values: Vec<String>,
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns of the matrix.
    pub inputs: usize,
    /// How often a step multiplies such a matrix.
    pub launches: usize,
    /// Bytes of one matrix.
    pub bytes: usize,
    /// GPU microseconds of one product, the mean over all matrices of the shape one after the other, so that they come
    /// from memory wherever together they exceed the L2 cache.
    pub microseconds: f64,
}

impl LinearTime {
    /// Matrix bytes read, in GB/s.
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.microseconds / 1e3
    }
}

impl Baseline {
    /// Times `steps` greedy decode steps of `batch` sequences that have `position` tokens each before the first of them.
    /// What the cache holds does not matter for the time, and is not set.
    ///
    /// # Errors
    /// More sequences or positions than the baseline was made for, or a failing call.
    pub fn decode_steps_timed(
        &mut self,
        batch: usize,
        position: usize,
        steps: usize,
        mode: LaunchMode,
    ) -> Result<DecodeTimes, BaselineError> {
        self.prepare(batch)?;
        let longest = position.saturating_add(WARM_UP).saturating_add(steps);
        let Some(first) = u32::try_from(position)
            .ok()
            .filter(|_| longest <= self.max_seq)
        else {
            let text = format!(
                "{WARM_UP} + {steps} steps from position {position} pass the context of {}; raise it",
                self.max_seq
            );
            return Err(BaselineError::Request(text));
        };
        let greedy = Sampling {
            seed: 0,
            inverse_temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            sequence: 0,
        };
        self.buffers
            .sampling
            .copy_from(&self.stream, 0, &vec![greedy; batch])?;
        self.buffers.tokens.clear(&self.stream)?;
        self.buffers
            .positions
            .copy_from(&self.stream, 0, &vec![first; batch])?;
        self.buffers.made.clear(&self.stream)?;
        let cutoffs = Cutoffs::default();
        let mut graph = match mode {
            LaunchMode::Graph => Some(self.record_step(batch, longest, cutoffs)?),
            LaunchMode::Eager => None,
        };
        for step in 0..WARM_UP {
            self.launch_step(graph.as_mut(), batch, position + step + 1, cutoffs)?;
        }
        self.stream.synchronize()?;
        let events = (0..=steps)
            .map(|_| Event::new(&self.gpu))
            .collect::<Result<Vec<_>, _>>()?;
        let started = Instant::now();
        events[0].record(&self.stream)?;
        for (step, event) in events[1..].iter().enumerate() {
            self.launch_step(
                graph.as_mut(),
                batch,
                position + WARM_UP + step + 1,
                cutoffs,
            )?;
            event.record(&self.stream)?;
        }
        self.stream.synchronize()?;
        let wall = 1e3 * started.elapsed().as_secs_f64();
        let times = events
            .windows(2)
            .map(|pair| pair[1].milliseconds_since(&pair[0]).map(f64::from));
        Ok(DecodeTimes {
            steps: times.collect::<Result<_, _>>()?,
            wall,
        })
    }

    /// Times of the matrix products of a decode step of `batch` sequences, by shape.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn linears(&mut self, batch: usize) -> Result<Vec<LinearTime>, BaselineError> {
        self.prepare(batch)?;
        let program = &self.program;
        let steps: Vec<_> = program.body.iter().chain(&program.head).collect();
        let mut times = Vec::new();
        for part in [&program.body, &program.head] {
            for (shape, operands) in products(part) {
                let Some(microseconds) = self.blas.microseconds(shape, matmul_rows(batch)) else {
                    continue;
                };
                let mut values: Vec<String> = Vec::new();
                for step in &steps {
                    if step.is_product_of(shape) && !values.contains(&step.value) {
                        values.push(step.value.clone());
                    }
                }
                let (outputs, inputs, launches) = (shape.outputs, shape.inputs, operands.len());
                let bytes = 2 * outputs * inputs;
                times.push(LinearTime {
                    values,
                    outputs,
                    inputs,
                    launches,
                    bytes,
                    microseconds,
                });
            }
        }
        Ok(times)
    }

    /// Logits after each of the positions `range` of one sequence, teacher-forced: row after row, `vocab` f32 each.
    ///
    /// # Errors
    /// A sequence that is empty or too long, a range outside of it, or a failing call.
    pub fn logits(
        &mut self,
        tokens: &[u32],
        range: std::ops::Range<usize>,
    ) -> Result<Vec<f32>, BaselineError> {
        let vocab = self.program.vocab;
        let known = tokens.iter().all(|token| (*token as usize) < vocab);
        if tokens.is_empty() || tokens.len() > self.max_seq || range.end > tokens.len() || !known {
            let text = format!(
                "logits of positions {range:?} of {} tokens: give 1 to {} tokens below {vocab}, and positions among them",
                tokens.len(),
                self.max_seq
            );
            return Err(BaselineError::Request(text));
        }
        let plan = Prefill::new(&[tokens], self.tile());
        let lists = PrefillLists::upload(&self.gpu, &plan)?;
        let mut all = vec![0f32; range.len() * vocab];
        let mut filled = 0;
        for chunk in &plan.chunks {
            self.prepare_body(chunk.rows.len())?;
            let pass = lists.pass(chunk);
            self.run_body(&pass)?;
            let wanted: Vec<usize> = chunk
                .rows
                .clone()
                .filter(|row| range.contains(row))
                .collect();
            for rows in wanted.chunks(self.max_batch) {
                self.prepare_head(rows.len())?;
                let index: Vec<u32> = rows
                    .iter()
                    .map(|row| (row - chunk.rows.start) as u32)
                    .collect();
                let index = DeviceBuffer::from_slice(&self.gpu, &index)?;
                let chosen = Chosen {
                    rows: rows.len(),
                    index: index.device_pointer(),
                    all: false,
                    cutoffs: Cutoffs::default(),
                };
                self.run_head(&pass, &chosen, false)?;
                let out = &mut all[filled..filled + rows.len() * vocab];
                self.arena.logits.copy_to(&self.stream, 0, out)?;
                filled += out.len();
            }
        }
        Ok(all)
    }
}
