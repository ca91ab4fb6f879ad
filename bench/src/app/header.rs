//! What a report says besides its measurements: device, model, configuration, and what a reader must know.

use mirage_runtime::gpu::Gpu;

use super::distinct;
use crate::cli::Args;
use crate::device::{self, NoGpu, NvidiaSmi, Probe};
use crate::model::Model;
use crate::results::{
    Configuration, DeviceFacts, DeviceKind, PromptFacts, Results, SCHEMA_VERSION,
};
use crate::sides::bandwidth;

/// Who knows the device's state.
pub(super) fn probe(gpu: Option<&Gpu>) -> Box<dyn Probe> {
    match gpu {
        Some(gpu) => Box::new(NvidiaSmi {
            id: gpu.properties().pci_bus_id.clone(),
        }),
        None => Box::new(NoGpu),
    }
}

/// The machine, with its bandwidth measured where it is a GPU.
pub(super) fn device_facts(gpu: Option<&Gpu>) -> DeviceFacts {
    let Some(gpu) = gpu else {
        return device::facts(DeviceKind::Cpu, &NoGpu);
    };
    let mut facts = device::facts(DeviceKind::Cuda, probe(Some(gpu)).as_ref());
    facts.name = gpu.name().to_owned();
    match bandwidth::measure(gpu) {
        Ok(measured) => facts.bandwidth_gb_s = Some(measured),
        Err(error) => facts.warnings.push(format!(
            "the memory bandwidth was not measured, so there is no share of the roofline: {error:#}"
        )),
    }
    facts
}

/// Results without any measurement; `fallback` is why no GPU is used where one was hoped for.
pub(super) fn header(
    args: &Args,
    model: &Model,
    device: DeviceFacts,
    prompts: PromptFacts,
    fallback: Option<String>,
) -> Results {
    Results {
        schema_version: SCHEMA_VERSION,
        generator: format!("mirage-bench {}", env!("CARGO_PKG_VERSION")),
        generated: String::new(),
        complete: false,
        ended_early: None,
        notes: notes(device.kind, fallback),
        device,
        model: model.facts.clone(),
        configuration: Configuration {
            max_tokens: args.max_tokens as usize,
            temperature: args.temperature,
            top_p: args.top_p,
            num_warmup: args.num_warmup as usize,
            num_iterations: args.num_iterations as usize,
            batch_sizes: distinct(&args.batch_sizes),
            context_depths: distinct(&args.context_depth),
            seed: args.seed,
            ignore_eos: args.ignore_eos,
        },
        prompts,
        sides: Vec::new(),
        points: Vec::new(),
        summary: Vec::new(),
        sample: None,
    }
}

/// What a reader must know.
fn notes(kind: DeviceKind, fallback: Option<String>) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(reason) = fallback {
        notes.push(format!("No GPU was used: {reason}."));
    }
    match kind {
        DeviceKind::Cpu => {
            notes.push(
                "These are times of a CPU. They show that the compiled program runs here, and whether it agrees with an \
                 independent implementation; they say nothing about the megakernel's speed on a GPU, and a ratio to the \
                 plain reference is no achievement in either direction."
                    .to_owned(),
            );
            notes.push(
                "No share of the roofline is given: on a CPU, a small model's weights stay in the caches.".to_owned(),
            );
        }
        DeviceKind::Cuda => notes.push(
            "Host times of baselines that launch kernel by kernel depend on the host; compare device times too. The \
             baselines' host time leaves out copying the prompts and recording the CUDA graph, mirage's includes its launch."
                .to_owned(),
        ),
    }
    notes.push(
        "Every iteration takes the next prompts of the file, the same on all sides, so the standard deviation holds the \
         prompts' variety; speedups are ratios of sums over paired iterations, with 95 % bootstrap intervals. Prefill is \
         part of the latency; TPOT and ITL are without it."
            .to_owned(),
    );
    notes
}
