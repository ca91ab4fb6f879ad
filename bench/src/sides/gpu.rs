//! Mirage's megakernel and the per-op baseline on an NVIDIA GPU.
//!
//! What the clocks enclose. *Mirage*: host time from the call with token ids, the copy of the prompts to the device and the
//! launch included, to the moment the host has seen each token; device time is the one kernel's, between two events.
//! *Baseline*: host time as [`Timings`](mirage_runtime::baseline::Timings) has it, which leaves out the copy of the prompts
//! and the recording of the graph, to the baseline's favour; device time is prefill and decode steps between events, gaps
//! between launches included.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::anyhow;
use mirage_compiler::arch::{DeviceFacts, GpuModel};
use mirage_compiler::driver::{CompileError, compile};
use mirage_compiler::plan::Target;
use mirage_runtime::baseline::{Baseline, BaselineError, GenerateRequest, LaunchMode, Prompt};
use mirage_runtime::gpu::{Gpu, GpuError};
use mirage_runtime::megakernel::{Megakernel, MegakernelError, Running, SequenceRequest};

use super::cpu::times;
use super::{compiled_context, sampling};
use crate::model::Model;
use crate::results::{MatrixProduct, Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, SequenceTimes, Shape, Side, SideError, Work};

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

/// The GPU as the planner knows it.
fn gpu_model(gpu: &Gpu) -> anyhow::Result<GpuModel> {
    let properties = gpu.properties();
    Ok(GpuModel::of_device(&DeviceFacts {
        name: gpu.name(),
        compute_capability: properties.compute_capability,
        sms: u32::try_from(properties.sm_count)?,
        smem_per_block_optin: u32::try_from(properties.shared_bytes_per_block)?,
        l2_bytes: u64::try_from(properties.l2_bytes)?,
    })?)
}

fn gpu_error(error: GpuError) -> SideError {
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

fn baseline_error(error: BaselineError) -> SideError {
    match error {
        BaselineError::Gpu(error) => gpu_error(error),
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
        let max_seq = compiled_context(shape.context, self.model.facts.context);
        let target = Target {
            gpu: gpu_model(&self.gpu)?,
            batch: shape.batch,
            max_seq,
        };
        let compilation = compile(
            &self.model.graph_text,
            &self.model.graph_name,
            &self.model.config,
            &target,
        )
        .and_then(|compilation| Ok((compilation.build()?, compilation)));
        let (build, compilation) = compilation.map_err(|error| match error {
            CompileError::Target { .. } => SideError::NoRoom(error.to_string()),
            error => SideError::Failed(error.into()),
        })?;
        let compile_s = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let artifact = build.artifact;
        let program = artifact.manifest.program;
        let loaded = Megakernel::load(
            &self.gpu,
            program,
            &artifact.cubin,
            &self.model.checkpoint,
            &mut |_, _| {},
        )
        .map_err(megakernel_error)?;
        self.loaded = Some(loaded);
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
        let requests: Vec<SequenceRequest<'_>> = work
            .sequences
            .iter()
            .map(|sequence| SequenceRequest {
                prompt: &sequence.prompt,
                // The last given token is the first decode step's input.
                prefill: sequence.prompt.len().saturating_sub(1),
                max_new: work.max_tokens,
                sampling: sampling(work.sampling),
                stream: sequence.stream,
                logits: false,
            })
            .collect();
        let begin = Instant::now();
        let running = self
            .loaded()?
            .start(&requests, &work.stop_tokens)
            .map_err(megakernel_error)?;
        let (tokens, stamps) = watch(&running, requests.len(), begin, interrupt)?;
        let finished = running.finish().map_err(megakernel_error)?;
        let wall = begin.elapsed().as_secs_f64();
        if interrupt.is_set() {
            return Err(SideError::Interrupted);
        }
        Ok(Generation {
            tokens,
            wall,
            device: Some(f64::from(finished.kernel_ms) / 1e3),
            // The kernel does not tell its steps apart; the tokens' arrivals at the host do.
            device_step: None,
            sequences: stamps.iter().map(|stamps| times(stamps)).collect(),
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        let model = self.loaded()?;
        let vocab = model.program().vocab;
        let request = SequenceRequest {
            prompt: tokens,
            prefill: from,
            max_new: 1,
            sampling: sampling(crate::side::Sampling {
                temperature: 0.0,
                top_p: 1.0,
                seed: 0,
            }),
            stream: 0,
            logits: true,
        };
        let finished = model
            .start(&[request], &[])
            .and_then(Running::finish)
            .map_err(megakernel_error)?;
        let rows = finished.logits().map_err(gpu_error)?;
        // Rows count from position 0; those below `from` were not computed.
        Ok(rows
            .get(from * vocab..tokens.len() * vocab)
            .unwrap_or_default()
            .to_vec())
    }
}

/// Tokens of each sequence, and the moments at which the host saw them.
type Seen = (Vec<Vec<u32>>, Vec<Vec<f64>>);

/// Looks at the tokens until the kernel has ended.
fn watch(
    running: &Running<'_>,
    sequences: usize,
    begin: Instant,
    interrupt: &Interrupt,
) -> Result<Seen, SideError> {
    let mut tokens: Vec<Vec<u32>> = vec![Vec::new(); sequences];
    let mut stamps: Vec<Vec<f64>> = vec![Vec::new(); sequences];
    loop {
        // Asked first, so that tokens written before the end are all seen after it.
        let done = running.is_done().map_err(gpu_error)?;
        for (slot, (tokens, stamps)) in tokens.iter_mut().zip(&mut stamps).enumerate() {
            while let Some(token) = running.token(slot, tokens.len()) {
                tokens.push(token);
                stamps.push(begin.elapsed().as_secs_f64());
            }
        }
        if done {
            return Ok((tokens, stamps));
        }
        if interrupt.is_set() {
            running.cancel();
        }
        std::hint::spin_loop();
    }
}

/// The baseline's model, which its launch modes share.
pub struct SharedBaseline<'a> {
    model: &'a Model,
    gpu: Gpu,
    loaded: Option<Baseline>,
}

impl<'a> SharedBaseline<'a> {
    /// Loads nothing yet.
    pub fn new(model: &'a Model, gpu: &Gpu) -> Rc<RefCell<SharedBaseline<'a>>> {
        Rc::new(RefCell::new(SharedBaseline {
            model,
            gpu: gpu.clone(),
            loaded: None,
        }))
    }

    /// The loaded model with room for that shape.
    fn fit(&mut self, shape: Shape) -> Result<&mut Baseline, SideError> {
        let fits = |baseline: &Baseline| {
            baseline.max_batch() >= shape.batch && baseline.max_seq() >= shape.context
        };
        if !self.loaded.as_ref().is_some_and(fits) {
            // The old one goes first: both at once may not fit.
            self.loaded = None;
            let made = Baseline::new(
                &self.gpu,
                &self.model.typed,
                &self.model.checkpoint,
                shape.batch,
                shape.context,
            )
            .map_err(baseline_error)?;
            self.loaded = Some(made);
        }
        self.get()
    }

    fn get(&mut self) -> Result<&mut Baseline, SideError> {
        self.loaded
            .as_mut()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }
}

/// The baseline in one launch mode.
pub struct PerOp<'a> {
    shared: Rc<RefCell<SharedBaseline<'a>>>,
    mode: LaunchMode,
    batch: usize,
}

impl<'a> PerOp<'a> {
    /// B0 or B1, by the mode.
    pub fn new(shared: &Rc<RefCell<SharedBaseline<'a>>>, mode: LaunchMode) -> PerOp<'a> {
        PerOp {
            shared: Rc::clone(shared),
            mode,
            batch: 1,
        }
    }
}

impl Side for PerOp<'_> {
    fn facts(&self) -> SideFacts {
        let (key, label, launches) = match self.mode {
            LaunchMode::Eager => (
                "b0",
                "B0, per-op launches",
                "launched one by one by the host",
            ),
            LaunchMode::Graph => (
                "b1",
                "B1, per-op in a CUDA graph",
                "all launches of a step in one CUDA graph",
            ),
        };
        SideFacts {
            key: key.to_owned(),
            label: label.to_owned(),
            description: format!(
                "the unfused graph, one kernel for each operator, cuBLASLt for the matrix products with the fastest \
                 algorithm of each shape; {launches}"
            ),
            role: Role::Baseline,
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        let begin = Instant::now();
        let mut shared = self.shared.borrow_mut();
        let baseline = shared.fit(shape)?;
        baseline.prepare(shape.batch).map_err(baseline_error)?;
        self.batch = shape.batch;
        Ok(Setup {
            load_s: begin.elapsed().as_secs_f64(),
            launches: Some(format!("{} launches a step", baseline.launches_per_step())),
            ..Setup::default()
        })
    }

    fn release(&mut self) {
        self.shared.borrow_mut().loaded = None;
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        if interrupt.is_set() {
            return Err(SideError::Interrupted);
        }
        let prompts = work.sequences.iter().map(|sequence| Prompt {
            tokens: sequence.prompt.clone(),
            sampling: sampling(work.sampling),
            sequence: sequence.stream,
        });
        let request = GenerateRequest {
            prompts: prompts.collect(),
            max_new_tokens: work.max_tokens,
            stop_tokens: work.stop_tokens.clone(),
            mode: self.mode,
        };
        let output = self
            .shared
            .borrow_mut()
            .get()?
            .generate(&request)
            .map_err(baseline_error)?;
        let timings = output.timings;
        let (first, last) = (timings.time_to_first_token / 1e3, timings.total / 1e3);
        // It does not look at single tokens, so that the GPU never waits for the host: all sequences have one time.
        let times = SequenceTimes {
            first,
            last,
            gaps: Vec::new(),
        };
        Ok(Generation {
            sequences: vec![times; output.tokens.len()],
            tokens: output.tokens,
            wall: last,
            device: Some((timings.prefill + timings.decode) / 1e3),
            device_step: (timings.decode_steps > 0)
                .then(|| timings.decode / 1e3 / timings.decode_steps as f64),
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        self.shared
            .borrow_mut()
            .get()?
            .logits(tokens, from..tokens.len())
            .map_err(baseline_error)
    }

    fn matrix_products(&mut self) -> Result<Vec<MatrixProduct>, SideError> {
        let products = self
            .shared
            .borrow_mut()
            .get()?
            .linears(self.batch)
            .map_err(baseline_error)?;
        Ok(products
            .into_iter()
            .map(|product| MatrixProduct {
                gb_s: product.gigabytes_per_second(),
                values: product.values,
                outputs: product.outputs,
                inputs: product.inputs,
                launches: product.launches,
                time_us: product.microseconds,
            })
            .collect())
    }
}
