//! Mirage's compiled program on the CPU executor.
//!
//! Times are host times: from the call with token ids to each token's event.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::arch::GpuModel;
use mirage_compiler::driver::compile;
use mirage_compiler::plan::Target;
use mirage_runtime::cpu::CpuModel;
use mirage_runtime::generate::{CancelHandle, Event, Executor, GenerateRequest};

use super::{compiled_context, sampling};
use crate::model::Model;
use crate::results::{Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, SequenceTimes, Shape, Side, SideError, Work};

/// The CPU executor of one model.
pub struct MirageCpu<'a> {
    model: &'a Model,
    loaded: Option<CpuModel>,
}

impl<'a> MirageCpu<'a> {
    /// Loads nothing yet.
    pub fn new(model: &'a Model) -> MirageCpu<'a> {
        MirageCpu {
            model,
            loaded: None,
        }
    }

    fn loaded(&mut self) -> Result<&mut CpuModel, SideError> {
        self.loaded
            .as_mut()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }
}

impl Side for MirageCpu<'_> {
    fn facts(&self) -> SideFacts {
        SideFacts {
            key: "mirage".to_owned(),
            label: "mirage (CPU executor)".to_owned(),
            description: "the compiled program, its exchanges and weight streams run by CPU threads; made to show and check \
                          the program, not to be fast"
                .to_owned(),
            role: Role::Mirage,
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        self.loaded = None;
        let begin = Instant::now();
        let max_seq = compiled_context(shape.context, self.model.facts.context);
        let target = Target {
            gpu: GpuModel::cpu(),
            batch: shape.batch,
            max_seq,
        };
        let compilation = compile(
            &self.model.graph_text,
            &self.model.graph_name,
            &self.model.config,
            &target,
        )
        .map_err(|error| SideError::Failed(error.into()))?;
        let compile_s = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let loaded = CpuModel::load(compilation.program, &self.model.checkpoint)
            .map_err(|error| SideError::Failed(error.into()))?;
        self.loaded = Some(loaded);
        Ok(Setup {
            compile_s: Some(compile_s),
            load_s: begin.elapsed().as_secs_f64(),
            ..Setup::default()
        })
    }

    fn release(&mut self) {
        self.loaded = None;
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        let requests = requests(work);
        let cancel = CancelHandle::new();
        let executor = self.loaded()?;
        let mut stamps: Vec<Vec<f64>> = vec![Vec::new(); requests.len()];
        let mut tokens: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
        let begin = Instant::now();
        let result = executor.generate(&requests, &cancel, &mut |event| match event {
            Event::Token {
                sequence, token, ..
            } => {
                stamps[sequence].push(begin.elapsed().as_secs_f64());
                tokens[sequence].push(token);
                if interrupt.is_set() {
                    cancel.cancel();
                }
            }
            Event::Finished { .. } => {}
        });
        let wall = begin.elapsed().as_secs_f64();
        result.map_err(|error| SideError::Failed(error.into()))?;
        if interrupt.is_set() {
            return Err(SideError::Interrupted);
        }
        Ok(Generation {
            tokens,
            wall,
            device: None,
            device_step: None,
            sequences: stamps.iter().map(|s| times(s)).collect(),
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        let scored = self
            .loaded()?
            .score(&[tokens.to_vec()])
            .map_err(|error| SideError::Failed(error.into()))?;
        let logits = scored
            .into_iter()
            .next()
            .ok_or_else(|| anyhow!("no logits came back"))?;
        Ok(logits
            .values
            .get(from * logits.vocab..)
            .unwrap_or_default()
            .to_vec())
    }
}

fn requests(work: &Work) -> Vec<GenerateRequest> {
    let request = |sequence: &crate::side::Sequence| GenerateRequest {
        prompt: sequence.prompt.clone(),
        max_new_tokens: work.max_tokens,
        sampling: sampling(work.sampling),
        stream: sequence.stream,
        stop_tokens: work.stop_tokens.iter().copied().collect::<BTreeSet<u32>>(),
    };
    work.sequences.iter().map(request).collect()
}

/// First, last and gaps of the moments at which a sequence's tokens came.
pub(super) fn times(stamps: &[f64]) -> SequenceTimes {
    SequenceTimes {
        first: stamps.first().copied().unwrap_or(0.0),
        last: stamps.last().copied().unwrap_or(0.0),
        gaps: stamps.windows(2).map(|pair| pair[1] - pair[0]).collect(),
    }
}
