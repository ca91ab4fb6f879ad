//! Mirage's compiled program on an NVIDIA GPU: as one persistent kernel, and as a chain of kernels to compare with (B2).
//!
//! Host time is from the call with token ids, the copy of the prompts to the device and the launch included, to the moment
//! the host has seen each token; device time is that of all kernels between two events, gaps included.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::arch::GpuModel;
use mirage_compiler::cubin_cache;
use mirage_compiler::driver::{CompileError, compile};
use mirage_compiler::emit::phased_source;
use mirage_compiler::nvrtc::{Options, Source};
use mirage_compiler::plan::Target;
use mirage_compiler::profile::Profile;
use mirage_runtime::gpu::{Gpu, GpuError};
use mirage_runtime::megakernel::{Form, Megakernel, MegakernelError};

use super::{compiled_context, executor};
use crate::model::Model;
use crate::results::{Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, Shape, Side, SideError, Work};

/// The compiled program of one model, which its two forms share.
pub struct SharedMirage<'a> {
    model: &'a Model,
    gpu: Gpu,
    profile: Option<&'a Profile>,
    loaded: Option<Loaded>,
}

/// What is on the GPU.
struct Loaded {
    shape: Shape,
    kernel: Megakernel,
    setup: Setup,
}

impl<'a> SharedMirage<'a> {
    /// Loads nothing yet. Plans are made with the profile's constants, if there is one.
    pub fn new(
        model: &'a Model,
        gpu: &Gpu,
        profile: Option<&'a Profile>,
    ) -> Rc<RefCell<SharedMirage<'a>>> {
        Rc::new(RefCell::new(SharedMirage {
            model,
            gpu: gpu.clone(),
            profile,
            loaded: None,
        }))
    }

    /// The program for that shape.
    fn fit(&mut self, shape: Shape) -> Result<&mut Loaded, SideError> {
        if self
            .loaded
            .as_ref()
            .is_none_or(|loaded| loaded.shape != shape)
        {
            // The old one goes first: both at once may not fit.
            self.loaded = None;
            self.loaded = Some(self.load(shape)?);
        }
        self.get()
    }

    fn get(&mut self) -> Result<&mut Loaded, SideError> {
        self.loaded
            .as_mut()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }

    fn gpu_model(&self) -> anyhow::Result<GpuModel> {
        let gpu = self.gpu.properties().model()?;
        Ok(match self.profile {
            Some(profile) => profile.apply(gpu)?,
            None => gpu,
        })
    }

    fn load(&self, shape: Shape) -> Result<Loaded, SideError> {
        let begin = Instant::now();
        let model = self.model;
        let target = Target {
            gpu: self.gpu_model().map_err(SideError::Failed)?,
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
        let checkpoint = &model.checkpoint;
        let kernel = Megakernel::load(&self.gpu, program, &cubin, checkpoint, &mut |_, _| {})
            .map_err(megakernel_error)?;
        Ok(Loaded {
            shape,
            kernel,
            setup: Setup {
                compile_s: Some(compile_s),
                compile_cached: build.from_cache,
                load_s: begin.elapsed().as_secs_f64(),
                launches: Some("1 launch a generation".to_owned()),
                predicted_step_us: Some(compilation.plan.decode.cost.total),
            },
        })
    }

    /// Adds the chain of kernels to what is loaded.
    fn add_phased(&mut self) -> Result<Setup, SideError> {
        let arch = self
            .gpu
            .properties()
            .model()
            .map_err(|error| SideError::Failed(error.into()))?
            .arch;
        let kernel = &mut self.get()?.kernel;
        let begin = Instant::now();
        let phased = phased_source(kernel.program(), arch);
        let source = Source {
            name: "phased.cu".to_owned(),
            text: phased.source.text.clone(),
            headers: phased.source.headers.clone(),
        };
        let fetched = cubin_cache::fetch(&source, arch, &Options::default())
            .map_err(|error| SideError::Failed(error.into()))?;
        let compile_s = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        kernel
            .add_phased(&phased, &fetched.compiled.cubin)
            .map_err(megakernel_error)?;
        Ok(Setup {
            compile_s: Some(compile_s),
            compile_cached: fetched.hit,
            load_s: begin.elapsed().as_secs_f64(),
            launches: kernel
                .phased_launches()
                .map(|launches| format!("{launches} launches a step")),
            predicted_step_us: None,
        })
    }
}

/// The compiled program in one form.
pub struct MirageGpu<'a> {
    shared: Rc<RefCell<SharedMirage<'a>>>,
    form: Form,
}

impl<'a> MirageGpu<'a> {
    /// Mirage or B2, by the form.
    pub fn new(shared: &Rc<RefCell<SharedMirage<'a>>>, form: Form) -> MirageGpu<'a> {
        MirageGpu {
            shared: Rc::clone(shared),
            form,
        }
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
        match self.form {
            Form::Persistent => SideFacts {
                key: "mirage".to_owned(),
                label: "mirage".to_owned(),
                description:
                    "one persistent kernel: prefill, all decode steps and sampling in one launch"
                        .to_owned(),
                role: Role::Mirage,
            },
            Form::Phased => SideFacts {
                key: "b2".to_owned(),
                label: "B2, fused phases".to_owned(),
                description: "mirage's own fused phases, a kernel for each hand-over between multiprocessors, all launches \
                              of a step in one CUDA graph with programmatic dependent launch; tuned for the one kernel, not \
                              for this"
                    .to_owned(),
                role: Role::Baseline,
            },
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        let mut shared = self.shared.borrow_mut();
        let loaded = shared.fit(shape)?;
        match self.form {
            Form::Persistent => Ok(loaded.setup.clone()),
            Form::Phased => shared.add_phased(),
        }
    }

    fn release(&mut self) {
        self.shared.borrow_mut().loaded = None;
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        let mut shared = self.shared.borrow_mut();
        let kernel = &mut shared.get()?.kernel;
        kernel.set_form(self.form);
        let mut generation = executor::generate(kernel, work, interrupt)?;
        // Steps are not told apart on the device; the tokens' arrivals at the host tell them.
        generation.device = kernel.kernel_ms().map(|time| f64::from(time) / 1e3);
        Ok(generation)
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        let mut shared = self.shared.borrow_mut();
        let kernel = &mut shared.get()?.kernel;
        kernel.set_form(self.form);
        executor::logits(kernel, tokens, from)
    }
}
