//! A whole run: flags in, files and an exit code out.
//!
//! Owns the order in which things are found, measured and written, and every sentence that qualifies a number. What can be
//! wrong with the command is found out before anything is measured.

mod header;
mod inputs;

use std::io::{self, Write as _};
use std::path::Path;

use anyhow::{Context, Result, bail};
use mirage_compiler::profile::Profile;
use mirage_runtime::baseline::LaunchMode;
use mirage_runtime::gpu::Gpu;
use mirage_runtime::megakernel::Form;

use crate::cli::{Args, BaselineName};
use crate::compare::Comparison;
use crate::device::{self, Probe};
use crate::external::External;
use crate::harness::{Harness, Measured, Observer, Schedule};
use crate::model::Model;
use crate::progress::Progress;
use crate::report::{format, html, json, markdown, text};
use crate::results::{DeviceState, Iteration, Point, PromptFacts, Results, Sample, SideFacts};
use crate::side::{Interrupt, Sampling, Side};
use crate::sides::cpu::MirageCpu;
use crate::sides::gpu::{MirageGpu, SharedMirage};
use crate::sides::per_op::{PerOp, SharedBaseline};
use crate::sides::reference::PlainReference;
use crate::workload::{Answer, Workload};
use crate::{derive, outputs, prompts};
use header::{device_facts, header, probe};
use inputs::{
    check_baselines, of_categories, open_device, read_external, read_profile, read_prompts,
    read_results,
};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Done,
    /// The sides do not agree somewhere.
    Disagree,
    /// No point could be measured, or at none the sides could be compared by time.
    NothingMeasured,
    /// Slower than the run compared with.
    Regressed,
    /// The run compared with has none of the same work.
    NotComparable,
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
            Outcome::NothingMeasured => 5,
            Outcome::NotComparable => 6,
            Outcome::Interrupted => 130,
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// What is missing or wrong, with the mend. Where a side fails under way, what was measured is written all the same;
/// where nothing was, older reports stay.
pub fn run(args: &Args, interrupt: &Interrupt) -> Result<Outcome> {
    check_files(args)?;
    let old = args.compare.as_deref().map(read_results).transpose()?;
    let externals = args
        .external
        .iter()
        .map(|file| read_external(file))
        .collect::<Result<Vec<External>>>()?;
    let profile = args.profile.as_deref().map(read_profile).transpose()?;
    let (file, bytes) = read_prompts(&args.prompts)?;
    let all = prompts::parse(&bytes, &file)?;
    let chosen = of_categories(&all, &args.categories, &file)?;
    let (gpu, fallback) = open_device(args.device)?;
    check_baselines(args, gpu.is_some())?;
    let model = Model::open(&args.model, args.graph.as_deref())?;

    let max_tokens = args.max_tokens as usize;
    let depths = distinct(&args.context_depth);
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
    let prompt_facts = PromptFacts {
        categories: args.categories.clone(),
        hash: prompts::hash(&chosen),
        count: chosen.len(),
        skipped: workload.skipped.clone(),
        file,
    };
    let device = device_facts(gpu.as_ref());
    let mut results = header(args, &model, device, prompt_facts, fallback);
    let mut sides = sides(args, &model, gpu.as_ref(), profile.as_ref());
    results.sides = sides.iter().map(|side| side.facts()).collect();

    let harness = Harness {
        schedule: &schedule,
        workload: &workload,
        model: &model.facts,
        bandwidth_gb_s: results.device.bandwidth_gb_s,
        interrupt: interrupt.clone(),
    };
    let probe = probe(gpu.as_ref());
    let mut observer = Observed {
        progress: Progress::new(args.verbose),
        probe: probe.as_ref(),
        first: None,
    };
    let measured = harness.run(&mut sides, &mut observer);
    let first = observer.first.flatten();
    device::finish(&mut results.device, first, probe.as_ref());
    let Measured {
        points,
        complete,
        sample,
        failure,
        notes,
    } = measured;
    if points.iter().all(|point| point.sides.is_empty()) {
        if let Some(failure) = failure {
            return Err(anyhow::Error::new(failure).context("nothing was measured"));
        }
        // If stderr is gone there is nobody left to tell.
        let _ = writeln!(
            io::stderr(),
            "{}nothing was measured; older reports are left as they are",
            refusals(&points)
        );
        return Ok(nothing_measured(&points, complete));
    }
    results.points = points;
    results.complete = complete;
    results.ended_early = (!complete).then(|| {
        let reason = failure.as_ref().map(|failure| format!("{failure:#}"));
        reason.unwrap_or_else(|| "interrupted".to_owned())
    });
    results.notes.splice(0..0, notes);
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

/// The outcome of a run without any number and without a failure.
fn nothing_measured(points: &[Point], complete: bool) -> Outcome {
    match complete {
        true if disagree(points) => Outcome::Disagree,
        true => Outcome::NothingMeasured,
        false => Outcome::Interrupted,
    }
}

/// Why points have no numbers, a line for each.
fn refusals(points: &[Point]) -> String {
    let line = |point: &Point| {
        let name = format::point_name(point).to_lowercase();
        let reason = point.refused.as_ref()?;
        Some(format!("batch {name}: {reason}\n"))
    };
    points.iter().filter_map(line).collect()
}

fn disagree(points: &[Point]) -> bool {
    let gates = points.iter().filter_map(|point| point.gate.as_ref());
    gates.into_iter().any(|gate| !gate.passed)
}

fn outcome(results: &Results, comparison: Option<&Comparison>) -> Outcome {
    let empty = |point: &Point| point.refused.is_some() || point.withheld.is_some();
    if !results.complete {
        Outcome::Interrupted
    } else if disagree(&results.points) {
        Outcome::Disagree
    } else if results.points.iter().all(empty) {
        Outcome::NothingMeasured
    } else if comparison.is_some_and(Comparison::regressed) {
        Outcome::Regressed
    } else if comparison.is_some_and(|comparison| !comparison.decides()) {
        Outcome::NotComparable
    } else {
        Outcome::Done
    }
}

/// The outputs can be written, and overwrite nothing that is read or written too.
fn check_files(args: &Args) -> Result<()> {
    let mut read: Vec<(&str, &Path)> = vec![("--prompts", &args.prompts)];
    read.extend(
        args.compare
            .iter()
            .map(|file| ("--compare", file.as_path())),
    );
    read.extend(args.graph.iter().map(|file| ("--graph", file.as_path())));
    let external = args.external.iter();
    read.extend(external.map(|file| ("--external", file.as_path())));
    outputs::check(
        &[
            ("--output-report", &args.output_report),
            ("--output-json", &args.output_json),
            ("--output-html", &args.output_html),
        ],
        &read,
    )
}

/// Each number once, in the order given: the same point is not measured twice.
fn distinct(numbers: &[u32]) -> Vec<usize> {
    let mut found = Vec::new();
    for number in numbers.iter().map(|&number| number as usize) {
        if !found.contains(&number) {
            found.push(number);
        }
    }
    found
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
        batch_sizes: distinct(&args.batch_sizes),
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
    gpu: Option<&Gpu>,
    profile: Option<&'a Profile>,
) -> Vec<Box<dyn Side + 'a>> {
    let mut sides: Vec<Box<dyn Side + 'a>> = Vec::new();
    let mirage = gpu.map(|gpu| SharedMirage::new(model, gpu, profile));
    if !args.skip_mirage {
        sides.push(match &mirage {
            Some(mirage) => Box::new(MirageGpu::new(mirage, Form::Persistent)),
            None => Box::new(MirageCpu::new(model)),
        });
    }
    if args.skip_baseline {
        return sides;
    }
    let mut names = match (args.baseline.as_slice(), gpu) {
        ([], Some(_)) => vec![BaselineName::B0, BaselineName::B1, BaselineName::B2],
        ([], None) => vec![BaselineName::Reference],
        (names, _) => names.to_vec(),
    };
    names.sort_unstable();
    names.dedup();
    let shared = gpu.map(|gpu| SharedBaseline::new(model, gpu));
    for name in names {
        match (name, &shared, &mirage) {
            (BaselineName::B0, Some(shared), _) => {
                sides.push(Box::new(PerOp::new(shared, LaunchMode::Eager)))
            }
            (BaselineName::B1, Some(shared), _) => {
                sides.push(Box::new(PerOp::new(shared, LaunchMode::Graph)))
            }
            (BaselineName::B2, _, Some(mirage)) => {
                sides.push(Box::new(MirageGpu::new(mirage, Form::Phased)))
            }
            (BaselineName::Reference, None, _) => sides.push(Box::new(PlainReference::new(model))),
            // Refused before: `check_baselines`.
            (BaselineName::B0 | BaselineName::B1, None, _)
            | (BaselineName::B2, _, None)
            | (BaselineName::Reference, Some(_), _) => {}
        }
    }
    sides
}

/// Shows the run, and notes the device's state after its first batch.
struct Observed<'a> {
    progress: Progress,
    probe: &'a dyn Probe,
    first: Option<Option<DeviceState>>,
}

impl Observer for Observed<'_> {
    fn point(&mut self, batch: usize, depth: Option<usize>, runs: usize) {
        self.progress.point(batch, depth, runs);
    }

    fn stage(&mut self, text: &str) {
        self.progress.stage(text);
    }

    fn run(&mut self, side: &SideFacts, counted: bool, iteration: &Iteration) {
        self.progress.run(side, counted, iteration);
        // Between two runs, so that asking takes nobody's time.
        self.first.get_or_insert_with(|| self.probe.state());
    }

    fn point_done(&mut self, point: &Point) {
        self.progress.point_done(point);
    }
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
                "Batch {}: {} and {} {verdict} ({} of {} greedy texts identical, logits within {:.2} %)\n",
                format::point_name(gate.0).to_lowercase(),
                results.label(&gate.1.tested),
                results.label(&comparison.side),
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
    use crate::report::tests::results;

    #[test]
    fn numbers_are_taken_once() {
        assert_eq!(distinct(&[4, 1, 4, 2, 1]), [4, 1, 2]);
        assert!(distinct(&[]).is_empty());
    }

    #[test]
    fn outcomes() {
        let check = |change: fn(&mut Results), expected: Outcome| {
            let mut results = results();
            change(&mut results);
            assert_eq!(outcome(&results, None), expected);
        };
        check(|_| {}, Outcome::Done);
        check(|results| results.complete = false, Outcome::Interrupted);
        check(
            |results| {
                for point in &mut results.points {
                    point.withheld = Some("unequal".to_owned());
                }
            },
            Outcome::NothingMeasured,
        );
        check(
            |results| {
                for gate in results.points.iter_mut().filter_map(|p| p.gate.as_mut()) {
                    gate.passed = false;
                }
            },
            Outcome::Disagree,
        );
        let now = results();
        let comparison = |old: &Results| outcome(&now, Some(&Comparison::new(old, &now, 0.02)));
        let mut old = results();
        assert_eq!(comparison(&old), Outcome::Done);
        old.points.clear();
        assert_eq!(comparison(&old), Outcome::NotComparable);
    }

    #[test]
    fn a_run_without_a_number_is_told_apart() {
        let mut points = results().points;
        points.retain(|point| point.refused.is_some());
        assert_eq!(nothing_measured(&points, true), Outcome::NothingMeasured);
        assert_eq!(nothing_measured(&points, false), Outcome::Interrupted);
        assert!(refusals(&points).starts_with("batch 4: b0: batch 4 needs too much memory; "));
    }
}
