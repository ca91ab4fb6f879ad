//! The plain per-op reference on the CPU: the baseline of `--device cpu`.
//!
//! One thread, f32, one operator and one token after the other: an oracle, made to be read. Like the compiled program it
//! takes in all prompts of a batch before it makes the first token; then the sequences take turns, token by token.

use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::reference::{Reference, Sequence};
use mirage_runtime::sampler::Sampler;

use super::executor::times;
use super::sampling;
use crate::model::Model;
use crate::results::{Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, Shape, Side, SideError, Work};

/// The reference of one model.
pub struct PlainReference<'a> {
    model: &'a Model,
    loaded: Option<Reference<'a>>,
}

impl<'a> PlainReference<'a> {
    /// Loads nothing yet.
    pub fn new(model: &'a Model) -> PlainReference<'a> {
        PlainReference {
            model,
            loaded: None,
        }
    }

    fn loaded(&self) -> Result<&Reference<'a>, SideError> {
        self.loaded
            .as_ref()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }
}

fn failed(error: impl Into<anyhow::Error>) -> SideError {
    SideError::Failed(error.into())
}

impl Side for PlainReference<'_> {
    fn facts(&self) -> SideFacts {
        SideFacts {
            key: "reference".to_owned(),
            label: "plain reference".to_owned(),
            description: "the unfused graph run operator by operator in f32 on one CPU thread; an oracle for correctness, \
                          not a measure of speed"
                .to_owned(),
            role: Role::Baseline,
        }
    }

    fn prepare(&mut self, _shape: Shape) -> Result<Setup, SideError> {
        let begin = Instant::now();
        if self.loaded.is_none() {
            let Model {
                typed, checkpoint, ..
            } = self.model;
            self.loaded = Some(Reference::new(typed, checkpoint).map_err(failed)?);
        }
        Ok(Setup {
            load_s: begin.elapsed().as_secs_f64(),
            ..Setup::default()
        })
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        let reference = self.loaded()?;
        let sampler = sampling(work.sampling).sampler().map_err(failed)?;
        let begin = Instant::now();
        let mut running = Vec::new();
        let mut after_prompts = Vec::new();
        for sequence in &work.sequences {
            let mut state = Sequence::default();
            let mut logits = Vec::new();
            for &token in &sequence.prompt {
                if interrupt.is_set() {
                    return Err(SideError::Interrupted);
                }
                logits = reference.step(&mut state, token).map_err(failed)?;
            }
            after_prompts.push(logits);
            running.push(Run {
                state,
                tokens: Vec::new(),
                stamps: Vec::new(),
                position: sequence.prompt.len(),
            });
        }
        let sequences = running.iter_mut().zip(&work.sequences);
        for ((run, sequence), logits) in sequences.zip(&after_prompts) {
            run.choose(logits, &sampler, sequence.stream, begin);
        }
        for _ in 1..work.max_tokens {
            for (run, sequence) in running.iter_mut().zip(&work.sequences) {
                if interrupt.is_set() {
                    return Err(SideError::Interrupted);
                }
                let Some(&last) = run
                    .tokens
                    .last()
                    .filter(|last| !work.stop_tokens.contains(last))
                else {
                    continue;
                };
                let logits = reference.step(&mut run.state, last).map_err(failed)?;
                run.choose(&logits, &sampler, sequence.stream, begin);
            }
        }
        let wall = begin.elapsed().as_secs_f64();
        Ok(Generation {
            sequences: running.iter().map(|run| times(&run.stamps)).collect(),
            tokens: running.into_iter().map(|run| run.tokens).collect(),
            wall,
            device: None,
            device_step: None,
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        let rows = self.loaded()?.logits(tokens).map_err(failed)?;
        Ok(rows.into_iter().skip(from).flatten().collect())
    }
}

/// A sequence under way.
struct Run {
    state: Sequence,
    tokens: Vec<u32>,
    stamps: Vec<f64>,
    /// That the next token will take.
    position: usize,
}

impl Run {
    fn choose(&mut self, logits: &[f32], sampler: &Sampler, stream: u32, begin: Instant) {
        // Contexts are far below 2^32.
        let position = u32::try_from(self.position).unwrap_or(u32::MAX);
        self.tokens.push(sampler.sample(logits, stream, position));
        self.stamps.push(begin.elapsed().as_secs_f64());
        self.position += 1;
    }
}
