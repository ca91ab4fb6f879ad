//! A whole run: flags in, files and an exit code out.
//!
//! Owns the order in which things are found, measured and written, and every sentence that qualifies a number. What can be
//! wrong with the command is found out before anything is measured.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::{Context, Result, bail};
use mirage_runtime::baseline::LaunchMode;
use mirage_runtime::gpu::Gpu;

use crate::cli::{Args, BaselineName, DEFAULT_PROMPTS, DeviceChoice};
use crate::compare::Comparison;
use crate::device::{self, NoGpu, NvidiaSmi, Probe};
use crate::external::{self, External};
use crate::harness::{Harness, Measured, Schedule};
use crate::model::{Model, Weights};
use crate::progress::Progress;
use crate::prompts::{self, Prompt};
use crate::report::{format, html, json, markdown, text};
use crate::results::{Configuration, DeviceKind, PromptFacts, Results, SCHEMA_VERSION, Sample};
use crate::side::{Interrupt, Sampling, Side};
use crate::sides::cpu::MirageCpu;
use crate::sides::gpu::{MirageGpu, PerOp, SharedBaseline};
use crate::sides::reference::PlainReference;
use crate::workload::{Answer, Workload};
use crate::{derive, outputs};

/// The prompts that come with the program.
const BUILT_IN_PROMPTS: &[u8] = include_bytes!("../prompts/test_prompts.txt");

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Done,
    /// The sides do not agree somewhere.
    Disagree,
    /// Slower than the run compared with.
    Regressed,
    /// Ctrl-C.
    Interrupted,
}

impl Outcome {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Outcome::Done => 0,
            Outcome::Disagree => 3,
            Outcome::Regressed => 4,
            Outcome::Interrupted => 130,
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// What is missing or wrong, with the mend. Where a side fails under way, what was measured is written all the same.
pub fn run(args: &Args, interrupt: &Interrupt) -> Result<Outcome> {
    outputs::check(&[&args.output_report, &args.output_json, &args.output_html])?;
    let old = args.compare.as_deref().map(read_results).transpose()?;
    let externals = args
        .external
        .iter()
        .map(|file| read_external(file))
        .collect::<Result<Vec<External>>>()?;
    let (file, bytes) = read_prompts(&args.prompts)?;
    let all = prompts::parse(&bytes, &file)?;
    let chosen = of_categories(&all, &args.categories, &file)?;
    let (gpu, fallback) = open_device(args.device)?;
    check_baselines(args, gpu.is_some())?;
    let model = Model::open(&args.model, args.graph.as_deref())?;

    let max_tokens = args.max_tokens as usize;
    let depths: Vec<usize> = args
        .context_depth
        .iter()
        .map(|&depth| depth as usize)
        .collect();
    for depth in &depths {
        if depth + max_tokens > model.facts.context {
            bail!(
                "--context-depth {depth}: with {max_tokens} new tokens it passes the model's context of {}; choose a smaller one",
                model.facts.context
            );
        }
    }
    let encode = |text: &str| model.tokenizer.encode(text);
    let workload = Workload::new(&chosen, encode, max_tokens, model.facts.context, args.seed)?;
    if workload.is_empty() {
        let reason = workload
            .skipped
            .first()
            .map_or("", |skipped| &skipped.reason);
        bail!(
            "none of the prompts fits the model ({reason}); use a smaller --max-tokens or shorter prompts"
        );
    }
    let schedule = schedule(args, &depths, &model);
    let mut results = header(
        args,
        &model,
        &file,
        &bytes,
        &chosen,
        &workload,
        gpu.as_ref(),
        fallback,
    );
    let weights = Weights(&model.checkpoint);
    let mut sides = sides(args, &model, &weights, gpu.as_ref());
    results.sides = sides.iter().map(|side| side.facts()).collect();

    let harness = Harness {
        schedule: &schedule,
        workload: &workload,
        model: &model.facts,
        bandwidth_gb_s: results.device.bandwidth_gb_s,
        interrupt: interrupt.clone(),
    };
    let measured = harness.run(&mut sides, &mut Progress::new(args.verbose));
    device::finish(&mut results.device, probe(gpu.as_ref()).as_ref());
    let Measured {
        points,
        complete,
        sample,
        failure,
    } = measured;
    results.points = points;
    results.complete = complete;
    results.sample = sample.and_then(|(id, tokens)| {
        let prompt = all.iter().find(|prompt| prompt.id == id)?;
        Some(Sample {
            prompt: prompt.text.clone(),
            text: model.tokenizer.decode(&tokens).ok()?,
        })
    });
    if let Some(failure) = &failure {
        results
            .notes
            .insert(0, format!("The run ended early: {failure:#}"));
    }
    results.summary = derive::summary(&results);
    for external in &externals {
        external.add_to(&mut results);
    }
    results.generated = jiff::Zoned::now()
        .strftime("%Y-%m-%dT%H:%M:%S%:z")
        .to_string();
    write(args, &results)?;
    let comparison = old.map(|old| Comparison::new(&old, &results, args.tolerance / 100.0));
    print(args, &results, comparison.as_ref())?;
    if let Some(failure) = failure {
        return Err(anyhow::Error::new(failure)
            .context("the run ended early; what had been measured was written"));
    }
    Ok(outcome(&results, comparison.as_ref()))
}

fn outcome(results: &Results, comparison: Option<&Comparison>) -> Outcome {
    let disagree = results
        .points
        .iter()
        .any(|point| point.gate.as_ref().is_some_and(|gate| !gate.passed));
    if !results.complete {
        Outcome::Interrupted
    } else if disagree {
        Outcome::Disagree
    } else if comparison.is_some_and(Comparison::regressed) {
        Outcome::Regressed
    } else {
        Outcome::Done
    }
}

fn read_results(file: &Path) -> Result<Results> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("--compare {} cannot be read", file.display()))?;
    Ok(json::read(&text, &file.to_string_lossy())?)
}

fn read_external(file: &Path) -> Result<External> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("--external {} cannot be read", file.display()))?;
    Ok(external::read(&text, &file.to_string_lossy())?)
}

/// The prompt file's name for people, and its bytes.
fn read_prompts(path: &Path) -> Result<(String, Vec<u8>)> {
    match fs::read(path) {
        Ok(bytes) => Ok((path.display().to_string(), bytes)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PROMPTS) =>
        {
            Ok((
                format!("{DEFAULT_PROMPTS} (built in)"),
                BUILT_IN_PROMPTS.to_vec(),
            ))
        }
        Err(error) => {
            bail!(
                "the prompts {} cannot be read: {error}; without --prompts the built-in ones are used",
                path.display()
            )
        }
    }
}

fn of_categories(all: &[Prompt], wanted: &[String], file: &str) -> Result<Vec<Prompt>> {
    for name in wanted {
        if !all.iter().any(|prompt| prompt.category == *name) {
            let mut known: Vec<&str> = all.iter().map(|prompt| prompt.category.as_str()).collect();
            known.dedup();
            bail!("--categories {name}: {file} has {}", known.join(", "));
        }
    }
    let chosen = |prompt: &&Prompt| wanted.is_empty() || wanted.contains(&prompt.category);
    Ok(all.iter().filter(chosen).cloned().collect())
}

/// The GPU, or none for the CPU; with the reason where `auto` fell back to it.
fn open_device(choice: DeviceChoice) -> Result<(Option<Gpu>, Option<String>)> {
    match choice {
        DeviceChoice::Cpu => Ok((None, None)),
        DeviceChoice::Cuda => match Gpu::open(0) {
            Ok(gpu) => Ok((Some(gpu), None)),
            Err(error) => bail!("--device cuda: {error}"),
        },
        DeviceChoice::Auto => match Gpu::open(0) {
            Ok(gpu) => Ok((Some(gpu), None)),
            Err(error) => Ok((None, Some(error.to_string()))),
        },
    }
}

fn check_baselines(args: &Args, gpu: bool) -> Result<()> {
    for name in &args.baseline {
        match (name, gpu) {
            (BaselineName::Reference, true) => {
                bail!("--baseline reference runs on the CPU; add --device cpu")
            }
            (BaselineName::B0 | BaselineName::B1, false) => {
                bail!("--baseline b0 and b1 need a GPU; on the CPU there is --baseline reference")
            }
            (BaselineName::Reference, false) | (BaselineName::B0 | BaselineName::B1, true) => {}
        }
    }
    Ok(())
}

fn schedule(args: &Args, depths: &[usize], model: &Model) -> Schedule {
    let depths = match depths {
        [] => vec![None],
        depths => depths.iter().copied().map(Some).collect(),
    };
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let stop_tokens = if args.ignore_eos {
        Vec::new()
    } else {
        model.stop_tokens.clone()
    };
    Schedule {
        batch_sizes: args
            .batch_sizes
            .iter()
            .map(|&batch| batch as usize)
            .collect(),
        depths,
        warmup: args.num_warmup as usize,
        iterations: args.num_iterations as usize,
        answer: Answer {
            max_tokens: args.max_tokens as usize,
            sampling,
            stop_tokens,
        },
    }
}

/// Mirage first, then the baselines from the plainest to the strongest.
fn sides<'a>(
    args: &Args,
    model: &'a Model,
    weights: &'a Weights<'a>,
    gpu: Option<&Gpu>,
) -> Vec<Box<dyn Side + 'a>> {
    let mut sides: Vec<Box<dyn Side + 'a>> = Vec::new();
    if !args.skip_mirage {
        sides.push(match gpu {
            Some(gpu) => Box::new(MirageGpu::new(model, gpu)),
            None => Box::new(MirageCpu::new(model)),
        });
    }
    if args.skip_baseline {
        return sides;
    }
    let mut names = match (args.baseline.as_slice(), gpu) {
        ([], Some(_)) => vec![BaselineName::B0, BaselineName::B1],
        ([], None) => vec![BaselineName::Reference],
        (names, _) => names.to_vec(),
    };
    names.sort_unstable();
    names.dedup();
    let shared = gpu.map(|gpu| SharedBaseline::new(model, gpu));
    for name in names {
        match (name, &shared) {
            (BaselineName::B0, Some(shared)) => {
                sides.push(Box::new(PerOp::new(shared, LaunchMode::Eager)))
            }
            (BaselineName::B1, Some(shared)) => {
                sides.push(Box::new(PerOp::new(shared, LaunchMode::Graph)))
            }
            (BaselineName::Reference, None) => {
                sides.push(Box::new(PlainReference::new(model, weights)))
            }
            // Refused before: `check_baselines`.
            (BaselineName::B0 | BaselineName::B1, None) | (BaselineName::Reference, Some(_)) => {}
        }
    }
    sides
}

fn probe(gpu: Option<&Gpu>) -> Box<dyn Probe> {
    match gpu {
        // CUDA's first visible GPU need not be the driver's first.
        Some(_) => Box::new(NvidiaSmi {
            id: first_visible(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref()),
        }),
        None => Box::new(NoGpu),
    }
}

fn first_visible(variable: Option<&str>) -> String {
    let first = variable
        .and_then(|list| list.split(',').next())
        .map(str::trim)
        .filter(|first| !first.is_empty());
    first.unwrap_or("0").to_owned()
}

/// Results without any measurement.
#[expect(clippy::too_many_arguments, reason = "each is one fact of the header")]
fn header(
    args: &Args,
    model: &Model,
    file: &str,
    bytes: &[u8],
    chosen: &[Prompt],
    workload: &Workload,
    gpu: Option<&Gpu>,
    fallback: Option<String>,
) -> Results {
    let kind = if gpu.is_some() {
        DeviceKind::Cuda
    } else {
        DeviceKind::Cpu
    };
    let mut facts = device::facts(kind, probe(gpu).as_ref());
    if let Some(gpu) = gpu {
        facts.name = gpu.name().to_owned();
    }
    Results {
        schema_version: SCHEMA_VERSION,
        generator: format!("mirage-bench {}", env!("CARGO_PKG_VERSION")),
        generated: String::new(),
        complete: false,
        notes: notes(facts.kind, fallback),
        device: facts,
        model: model.facts.clone(),
        configuration: Configuration {
            max_tokens: args.max_tokens as usize,
            temperature: args.temperature,
            top_p: args.top_p,
            num_warmup: args.num_warmup as usize,
            num_iterations: args.num_iterations as usize,
            batch_sizes: args
                .batch_sizes
                .iter()
                .map(|&batch| batch as usize)
                .collect(),
            context_depths: args
                .context_depth
                .iter()
                .map(|&depth| depth as usize)
                .collect(),
            seed: args.seed,
            ignore_eos: args.ignore_eos,
        },
        prompts: PromptFacts {
            file: file.to_owned(),
            hash: blake3::hash(bytes).to_hex().to_string(),
            count: chosen.len(),
            skipped: workload.skipped.clone(),
        },
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
                "These are times of a CPU. They show that the compiled program runs here and makes the same tokens as an \
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

fn write(args: &Args, results: &Results) -> Result<()> {
    outputs::write(&args.output_report, &text::report(results))?;
    outputs::write(&args.output_json, &json::write(results)?)?;
    outputs::write(&args.output_html, &html::page(results))
}

/// The terminal's part: a table to paste, a text to read, the verdict.
fn print(args: &Args, results: &Results, comparison: Option<&Comparison>) -> Result<()> {
    let mut out = markdown::table(results);
    out.push('\n');
    if let Some(sample) = &results.sample {
        let (prompt, text) = (
            format::one_line(&sample.prompt, 60),
            format::one_line(&sample.text, 200),
        );
        out.push_str(&format!("Sample: {prompt} ⟶ {text}\n"));
    }
    for gate in results
        .points
        .iter()
        .filter_map(|point| point.gate.as_ref().map(|gate| (point, gate)))
    {
        for comparison in &gate.1.comparisons {
            let verdict = if comparison.passed {
                "agree"
            } else {
                "DO NOT AGREE"
            };
            out.push_str(&format!(
                "Batch {}: mirage and {} {verdict} ({} of {} greedy texts identical, logits within {:.2} %)\n",
                format::point_name(gate.0).to_lowercase(),
                results.side(&comparison.side).map_or("", |side| &side.label),
                comparison.identical,
                comparison.sequences,
                comparison.logit_error * 100.0
            ));
        }
    }
    for note in results.notes.iter().take(2) {
        out.push_str(&format!("Note: {note}\n"));
    }
    if let (Some(comparison), Some(file)) = (comparison, &args.compare) {
        out.push_str(&comparison.to_text(&file.display().to_string()));
    }
    let files = [&args.output_report, &args.output_json, &args.output_html]
        .map(|file| file.display().to_string());
    out.push_str(&format!(
        "Wrote {}\n{}\n",
        files.join(", "),
        format::verdict(results)
    ));
    match io::stdout()
        .write_all(out.as_bytes())
        .and_then(|()| io::stdout().flush())
    {
        // A reader that went away has what it wanted.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("stdout cannot be written")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_visible_gpu_is_asked() {
        assert_eq!(first_visible(None), "0");
        assert_eq!(first_visible(Some("")), "0");
        assert_eq!(first_visible(Some("3,1")), "3");
        assert_eq!(first_visible(Some("GPU-abc")), "GPU-abc");
    }
}
