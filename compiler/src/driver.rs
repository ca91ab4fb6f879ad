//! The driver: all stages in order, from a graph's text to a kernel that can be loaded.
//!
//! Owns the order of the stages, the checks between them, and one error type in which each stage's error points to the
//! graph's line where there is one. It must not decide anything about the kernel, and it opens no file: texts come in and
//! go out. Only [`Compilation::build`] reaches outside the process, through [`crate::cubin_cache`].

use std::time::{Duration, Instant};

use crate::artifact::Artifact;
use crate::cubin_cache::{self, Fetched};
use crate::diagnostics::{Diagnostic, Diagnostics, Span};
use crate::emit::{CudaSource, cuda_source};
use crate::fuse::{FusedGraph, FusedOp};
use crate::graph::Graph;
use crate::nvrtc::{self, NvrtcError};
use crate::ops::TypedOp;
use crate::plan::{Plan, PlanError, Target};
use crate::program::{Program, ProgramError};
use crate::typed::{ModelConfig, TypedGraph, TypedNode};

/// Everything that the stages made of a graph.
#[derive(Clone, Debug)]
pub struct Compilation {
    /// What it was compiled for.
    pub target: Target,
    /// The graph as read.
    pub graph: Graph,
    /// With sizes.
    pub typed: TypedGraph,
    /// In the units that the mesh executes.
    pub fused: FusedGraph,
    /// Where everything lies.
    pub plan: Plan,
    /// The plan made concrete, verified.
    pub program: Program,
    /// `kernel.cu` and its headers.
    pub source: CudaSource,
    /// Time of each stage, in their order.
    pub times: Vec<(&'static str, Duration)>,
}

/// Compiles a graph down to CUDA source.
///
/// `file_name` is what errors call the graph; nothing is opened. The result is a function of the arguments alone, but for
/// [`Compilation::times`].
///
/// # Errors
///
/// [`CompileError::Diagnosed`] for what is wrong in the graph or its config.json, [`CompileError::Target`] for a target that
/// it does not fit, [`CompileError::Fault`] for a fault of a stage.
pub fn compile(
    text: &str,
    file_name: &str,
    config: &ModelConfig,
    target: &Target,
) -> Result<Compilation, CompileError> {
    let mut clock = Clock::start();
    let graph = Graph::parse(text, file_name)?;
    clock.lap("graph");
    let typed = TypedGraph::new(&graph, config)?;
    typed.verify().map_err(fault)?;
    clock.lap("types");
    let fused = FusedGraph::new(&typed)?;
    fused.verify().map_err(fault)?;
    clock.lap("fusion");
    let (plan, program) =
        Plan::search(&fused, target).map_err(|error| locate(error, &graph, &typed, &fused))?;
    plan.verify(&fused)
        .map_err(|rule| CompileError::Fault(format!("the plan is not well-formed: {rule}")))?;
    clock.lap("plan");
    program
        .verify()
        .and_then(|()| program.fits(&target.gpu))
        .map_err(|broken| {
            CompileError::Fault(format!(
                "the program breaks its rule {:?} at {}: {}",
                broken.rule, broken.place, broken.message
            ))
        })?;
    clock.lap("proof");
    let source = cuda_source(&program, target.gpu.arch);
    clock.lap("emission");
    Ok(Compilation {
        target: *target,
        graph,
        typed,
        fused,
        plan,
        program,
        source,
        times: clock.laps,
    })
}

impl Compilation {
    /// The source as NVRTC takes it.
    pub fn nvrtc_source(&self) -> nvrtc::Source {
        nvrtc::Source {
            name: crate::artifact::SOURCE_FILE.to_owned(),
            text: self.source.text.clone(),
            headers: self.source.headers.clone(),
        }
    }

    /// Compiles the source with the NVRTC of this machine, or takes the cubin from the user's cache.
    ///
    /// # Errors
    ///
    /// [`CompileError::Nvrtc`] where NVRTC is missing or too old, [`CompileError::Fault`] where it refuses the source.
    pub fn build(&self) -> Result<Build, CompileError> {
        let options = nvrtc::Options::default();
        let fetched = cubin_cache::fetch(&self.nvrtc_source(), self.target.gpu.arch, &options);
        let Fetched {
            compiled,
            hit,
            not_kept,
        } = fetched.map_err(|error| match error {
            NvrtcError::Compile { .. }
            | NvrtcError::InvalidSource { .. }
            | NvrtcError::Call { .. } => fault(error),
            NvrtcError::NotFound { .. }
            | NvrtcError::Unusable { .. }
            | NvrtcError::UnsupportedArch { .. } => CompileError::Nvrtc(error),
        })?;
        let artifact = Artifact::new(self, compiled.cubin, &compiled.resources)
            .map_err(CompileError::Fault)?;
        Ok(Build {
            artifact,
            log: compiled.log,
            from_cache: hit,
            not_kept,
        })
    }
}

/// A built kernel and how it was come by.
#[derive(Clone, Debug)]
pub struct Build {
    /// The kernel with its manifest.
    pub artifact: Artifact,
    /// NVRTC's warnings. Mostly empty.
    pub log: String,
    /// Whether the cubin was read from the cache.
    pub from_cache: bool,
    /// Why the cubin could not be kept for the next time, in words.
    pub not_kept: Option<String>,
}

/// Why there is no kernel. `Display` gives the whole error, over several lines where it shows the graph.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The graph or its config.json is at fault, at places we can show.
    #[error(transparent)]
    Diagnosed(#[from] Diagnostics),
    /// The target is: the graph is well, but not for this batch, context or GPU.
    #[error("{error}\nhelp: {help}")]
    Target {
        /// What the planner said.
        error: PlanError,
        /// The mend.
        help: String,
    },
    /// NVRTC is missing or too old.
    #[error(transparent)]
    Nvrtc(NvrtcError),
    /// A stage is at fault: ours to mend.
    #[error("{0}\nhelp: this is a fault of the compiler, not of the graph; please report it")]
    Fault(String),
}

fn fault(error: impl std::error::Error) -> CompileError {
    CompileError::Fault(error.to_string())
}

/// A planner's error at the line of the graph that it is about.
fn locate(error: PlanError, graph: &Graph, typed: &TypedGraph, fused: &FusedGraph) -> CompileError {
    let message = error.to_string();
    let diagnosed = |rule, span, label: &str, help: String| {
        let diagnostic = Diagnostic::new(rule, span, message.clone())
            .label(label)
            .help(help);
        CompileError::Diagnosed(Diagnostics::one(&graph.source, diagnostic))
    };
    // The operator of a fused node that an error is about, else its first. What is not in the layer is the head, or the
    // graph as a whole.
    let span_of = |name: &str, is_it: fn(&TypedOp) -> bool| -> Span {
        if let Some(node) = fused.layer.iter().find(|node| node.name == name) {
            let mut operators = typed.layer.iter().filter(|o| node.sources.contains(&o.id));
            let about = operators.find(|operator| is_it(&operator.op));
            return about.map_or(node.span, |operator| operator.span);
        }
        let head = |node: &&TypedNode| name == "head" && matches!(node.op, TypedOp::LmHead(_));
        let head = typed.after.iter().find(head);
        head.map_or(graph.name.span, |head| head.span)
    };
    match &error {
        PlanError::Batch { .. } => target(error, "choose a batch in that range"),
        PlanError::MaxSeq { .. } => target(error, "choose a context in that range"),
        PlanError::Attention { .. } => {
            let mut attentions = fused
                .layer
                .iter()
                .filter(|node| matches!(node.op, FusedOp::Attention(_)));
            let span = attentions
                .nth(1)
                .map_or(graph.layers.state.span, |node| node.span);
            diagnosed(
                "one-attention",
                span,
                "",
                "let a layer have one Attention; graphs/qwen3.ron shows one".to_owned(),
            )
        }
        PlanError::Placements { .. } => diagnosed(
            "layer-size",
            graph.layers.state.span,
            "",
            "graphs/qwen3.ron and graphs/llama3.ron show layers that compile".to_owned(),
        ),
        PlanError::Program(ProgramError::Tile { node, multiple, .. }) => diagnosed(
            "tile-size",
            span_of(node, |op| matches!(op, TypedOp::Linear(_))),
            "",
            format!(
                "choose a multiple of {multiple}; sizes come from the checkpoint's config.json, else from `default` in this file"
            ),
        ),
        PlanError::Program(ProgramError::HeadDim { node, .. }) => diagnosed(
            "head-dim",
            span_of(node, |op| matches!(op, TypedOp::Attention(_))),
            "",
            "compile a model with such heads; their width is `head_dim` of config.json".to_owned(),
        ),
        PlanError::Program(ProgramError::Dataflow { node, .. }) => diagnosed(
            "dataflow",
            span_of(node, |_| true),
            "",
            "graphs/qwen3.ron and graphs/llama3.ron show layers that compile".to_owned(),
        ),
        PlanError::Program(ProgramError::SharedMemory { .. }) => target(
            error,
            "choose a GPU with more shared memory per block, a smaller batch, or a narrower model",
        ),
    }
}

fn target(error: PlanError, help: &str) -> CompileError {
    CompileError::Target {
        error,
        help: help.to_owned(),
    }
}

/// Measures the stages one after the other.
struct Clock {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Clock {
    fn start() -> Clock {
        Clock {
            last: Instant::now(),
            laps: Vec::new(),
        }
    }

    fn lap(&mut self, stage: &'static str) {
        let now = Instant::now();
        self.laps.push((stage, now - self.last));
        self.last = now;
    }
}
