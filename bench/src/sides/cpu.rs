//! Mirage's compiled program on the CPU executor.
//!
//! Times are host times: from the call with token ids to each token's event.

use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::arch::GpuModel;
use mirage_compiler::driver::{CompileError, compile};
use mirage_compiler::plan::Target;
use mirage_runtime::cpu::CpuModel;

use super::{compiled_context, executor};
use crate::model::Model;
use crate::results::{Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, Shape, Side, SideError, Work};

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
        .map_err(|error| match error {
            CompileError::Target { .. } => SideError::NoRoom(error.to_string()),
            CompileError::Diagnosed(_) | CompileError::Nvrtc(_) | CompileError::Fault(_) => {
                SideError::Failed(error.into())
            }
        })?;
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
        executor::generate(self.loaded()?, work, interrupt)
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        executor::logits(self.loaded()?, tokens, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_beyond_the_plans_is_refused_and_does_not_end_the_run() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let model = Model::open(tiny, None).expect("the small model");
        let shape = Shape {
            batch: 1 << 10,
            context: 64,
        };
        match MirageCpu::new(&model).prepare(shape) {
            Err(SideError::NoRoom(reason)) => assert!(reason.contains("batch"), "{reason}"),
            Ok(_) | Err(SideError::Interrupted | SideError::Failed(_)) => panic!("not refused"),
        }
    }
}
