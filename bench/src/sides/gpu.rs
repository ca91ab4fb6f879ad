//! Mirage's megakernel on an NVIDIA GPU.
//!
//! Host time is from the call with token ids, the copy of the prompts to the device and the launch included, to the moment
//! the host has seen each token; device time is the one kernel's, between two events.

use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::driver::{CompileError, compile};
use mirage_compiler::plan::Target;
use mirage_runtime::gpu::{Gpu, GpuError};
use mirage_runtime::megakernel::{Megakernel, MegakernelError};

use super::{compiled_context, executor};
use crate::model::Model;
use crate::results::{Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, Shape, Side, SideError, Work};

/// The megakernel of one model.
pub struct MirageGpu<'a> {
    model: &'a Model,
    gpu: Gpu,
    loaded: Option<Megakernel>,
}

impl<'a> MirageGpu<'a> {
    /// Loads nothing yet.
    pub fn new(model: &'a Model, gpu: &Gpu) -> MirageGpu<'a> {
        MirageGpu {
            model,
            gpu: gpu.clone(),
            loaded: None,
        }
    }

    fn loaded(&mut self) -> Result<&mut Megakernel, SideError> {
        self.loaded
            .as_mut()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }
}

pub(super) fn gpu_error(error: GpuError) -> SideError {
    match error {
        GpuError::OutOfMemory { .. } => SideError::NoRoom(error.to_string()),
        error => SideError::Failed(error.into()),
    }
}

fn megakernel_error(error: MegakernelError) -> SideError {
    match error {
        MegakernelError::Gpu(error) => gpu_error(error),
        error => SideError::Failed(error.into()),
    }
}

impl Side for MirageGpu<'_> {
    fn facts(&self) -> SideFacts {
        SideFacts {
            key: "mirage".to_owned(),
            label: "mirage".to_owned(),
            description:
                "one persistent kernel: prefill, all decode steps and sampling in one launch"
                    .to_owned(),
            role: Role::Mirage,
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        self.loaded = None;
        let begin = Instant::now();
        let model = self.model;
        let target = Target {
            gpu: self
                .gpu
                .properties()
                .model()
                .map_err(|error| SideError::Failed(error.into()))?,
            batch: shape.batch,
            max_seq: compiled_context(shape.context, model.facts.context),
        };
        let (text, name) = (&model.graph_text, &model.graph_name);
        let compilation = compile(text, name, &model.config, &target)
            .and_then(|compilation| Ok((compilation.build()?, compilation)));
        let (build, compilation) = compilation.map_err(|error| match error {
            CompileError::Target { .. } => SideError::NoRoom(error.to_string()),
            error => SideError::Failed(error.into()),
        })?;
        let compile_s = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let (program, cubin) = (build.artifact.manifest.program, build.artifact.cubin);
        let loaded = Megakernel::load(
            &self.gpu,
            program,
            &cubin,
            &model.checkpoint,
            &mut |_, _| {},
        );
        self.loaded = Some(loaded.map_err(megakernel_error)?);
        Ok(Setup {
            compile_s: Some(compile_s),
            compile_cached: build.from_cache,
            load_s: begin.elapsed().as_secs_f64(),
            launches: Some("1 launch a generation".to_owned()),
            predicted_step_us: Some(compilation.plan.decode.cost.total),
        })
    }

    fn release(&mut self) {
        self.loaded = None;
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        let megakernel = self.loaded()?;
        let mut generation = executor::generate(megakernel, work, interrupt)?;
        // The kernel does not tell its steps apart; the tokens' arrivals at the host do.
        generation.device = megakernel.kernel_ms().map(|time| f64::from(time) / 1e3);
        Ok(generation)
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        executor::logits(self.loaded()?, tokens, from)
    }
}
