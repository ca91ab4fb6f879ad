//! Kernels for the GPU at hand, and taking turns on it.

use std::fs::read_to_string;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::artifact::SOURCE_FILE;
use mirage_compiler::cubin_cache;
use mirage_compiler::driver;
use mirage_compiler::emit::{CudaSource, PhasedSource, cuda_source, phased_source};
use mirage_compiler::nvrtc::{Options, Source};
use mirage_compiler::plan::Target;
use mirage_compiler::program::Program;
use mirage_compiler::typed::ModelConfig;
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::cpu::CpuModel;
use mirage_runtime::gpu::Gpu;
use mirage_runtime::megakernel::{Megakernel, MegakernelError};
use mirage_testing::{Choice, Model};

/// The GPU, for one test at a time: a kernel takes all of it.
pub(crate) struct Turn {
    pub(crate) gpu: Gpu,
    _turn: MutexGuard<'static, ()>,
}

/// Waits for the GPU. Build first: NVRTC needs no turn. A test that already has a turn must not ask for another.
pub(crate) fn turn() -> Turn {
    static TURN: Mutex<()> = Mutex::new(());
    Turn {
        // A test that failed in its turn leaves nothing behind.
        _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner),
        gpu: Gpu::open(0).expect("these tests need a GPU"),
    }
}

/// What kernels are compiled for.
pub(crate) fn gpu_model() -> GpuModel {
    let gpu = Gpu::open(0).expect("these tests need a GPU");
    gpu.properties().model().unwrap()
}

fn build(source: CudaSource, arch: Arch) -> Vec<u8> {
    let source = Source {
        name: SOURCE_FILE.to_owned(),
        text: source.text,
        headers: source.headers,
    };
    let fetched = cubin_cache::fetch(&source, arch, &Options::default());
    fetched
        .unwrap_or_else(|error| panic!("{error}"))
        .compiled
        .cubin
}

/// A program and its code.
pub(crate) struct Kernel {
    pub(crate) program: Program,
    pub(crate) cubin: Vec<u8>,
}

impl Kernel {
    /// As users get it, through the driver.
    pub(crate) fn planned(model: &Model, batch: usize, max_seq: usize) -> Kernel {
        let config = model.as_ref().join("config.json");
        let config = ModelConfig::parse(&read_to_string(config).unwrap(), "config.json").unwrap();
        let target = Target {
            gpu: gpu_model(),
            batch,
            max_seq,
        };
        let compilation = driver::compile(model.graph, "graph.ron", &config, &target)
            .unwrap_or_else(|error| panic!("{error}"));
        let build = compilation.build().unwrap_or_else(|e| panic!("{e}"));
        Kernel {
            program: compilation.program,
            cubin: build.artifact.cubin,
        }
    }

    /// Of a plan by hand.
    pub(crate) fn chosen(model: &Model, choice: &Choice, batch: usize, max_seq: usize) -> Kernel {
        let gpu = gpu_model();
        let program = choice.program_on(gpu, model, batch, max_seq);
        let cubin = build(cuda_source(&program, gpu.arch), gpu.arch);
        Kernel { program, cubin }
    }

    /// The same program, its weights brought by the instructions of an older architecture, which newer GPUs have too.
    pub(crate) fn with_pages_of(&self, arch: Arch) -> Kernel {
        Kernel {
            program: self.program.clone(),
            cubin: build(cuda_source(&self.program, arch), gpu_model().arch),
        }
    }

    /// The same program with its timeline.
    pub(crate) fn traced(&self) -> Kernel {
        let arch = gpu_model().arch;
        Kernel {
            program: self.program.clone(),
            cubin: build(cuda_source(&self.program, arch).traced(), arch),
        }
    }

    /// The same program as a chain of kernels.
    pub(crate) fn phased(&self) -> (PhasedSource, Vec<u8>) {
        let arch = gpu_model().arch;
        let phased = phased_source(&self.program, arch);
        let cubin = build(phased.source.clone(), arch);
        (phased, cubin)
    }

    /// On the GPU, unless it is refused.
    pub(crate) fn try_load(
        &self,
        turn: &Turn,
        model: &Model,
    ) -> Result<Megakernel, MegakernelError> {
        let mut sent = (0, 1);
        let loaded = Megakernel::load(
            &turn.gpu,
            self.program.clone(),
            &self.cubin,
            &Checkpoint::open(model).unwrap(),
            &mut |done, total| {
                assert!(sent.0 <= done && done <= total);
                sent = (done, total);
            },
        )?;
        assert_eq!(sent.0, sent.1, "all weights were sent");
        Ok(loaded)
    }

    /// On the GPU.
    pub(crate) fn load(&self, turn: &Turn, model: &Model) -> Megakernel {
        self.try_load(turn, model)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same program on the CPU.
    pub(crate) fn load_cpu(&self, model: &Model) -> CpuModel {
        CpuModel::load(self.program.clone(), &Checkpoint::open(model).unwrap()).unwrap()
    }
}
