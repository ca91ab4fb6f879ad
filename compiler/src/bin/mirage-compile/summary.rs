//! The summary of a run, for people.
//!
//! Owns its wording. All numbers are the compilation's; nothing is computed here but sums and quotients.

use std::fmt::{self, Display, Write as _};
use std::path::Path;
use std::time::Duration;

use mirage_compiler::artifact::{CUBIN_FILE, MANIFEST_FILE, SOURCE_FILE};
use mirage_compiler::cost::{Machine, Prediction};
use mirage_compiler::driver::{Build, Compilation};
use mirage_compiler::plan::StepPlan;
use mirage_compiler::program::{Linear, Step, THREADS};

use crate::files::DUMPS;
use crate::terminal::Terminal;

/// Width of the labels' column.
const LABELS: usize = 10;

/// What there is to say.
pub(crate) struct Summary<'a> {
    /// How to say it.
    pub(crate) terminal: Terminal,
    /// The stages' results.
    pub(crate) compilation: &'a Compilation,
    /// Where the model's sizes come from.
    pub(crate) sizes: &'a str,
    /// The output folder.
    pub(crate) out: &'a Path,
    /// Time from the start until the source was written.
    pub(crate) to_source: Duration,
    /// The cubin, if there is one.
    pub(crate) cubin: Option<Cubin<'a>>,
}

/// A cubin and what it took.
pub(crate) struct Cubin<'a> {
    /// The cubin and its manifest.
    pub(crate) build: &'a Build,
    /// Time to get it.
    pub(crate) time: Duration,
}

impl Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compilation {
            target,
            typed,
            fused,
            plan,
            program,
            ..
        } = self.compilation;
        let parameters = typed.parameters() as f64;
        self.line(
            f,
            "model",
            format_args!(
                "{}, {} layers, {} parameters, {}",
                fused.name,
                fused.layers,
                scaled(parameters, &[(1e9, "B"), (1e6, "M")]),
                self.sizes
            ),
        )?;
        self.line(
            f,
            "target",
            format_args!(
                "{} ({}, {} SMs, {:.0} GB/s), batch {}, up to {} tokens",
                target.gpu.arch,
                target.gpu.name,
                target.gpu.sms,
                target.gpu.hbm_gbps,
                target.batch,
                target.max_seq
            ),
        )?;
        let helpers = match plan.mesh.ctas - plan.mesh.workers() {
            0 => String::new(),
            others => format!(", {others} more for the LM head"),
        };
        self.line(
            f,
            "mesh",
            format_args!(
                "{} groups x {} members = {} CTAs{helpers}; the best of {} plans",
                plan.mesh.groups,
                plan.mesh.members,
                plan.mesh.workers(),
                plan.considered
            ),
        )?;
        self.write_phases(f)?;
        self.write_steps(f)?;
        self.line(
            f,
            "memory",
            format_args!(
                "KV cache {}, {} a position; exchange area {}",
                bytes(4 * program.cache_elements()),
                bytes(4 * program.cache_elements() / (program.slots * program.max_seq)),
                bytes(program.exchange.words * mirage_compiler::program::WORD_BYTES)
            ),
        )?;
        self.write_kernel(f)?;
        self.write_times(f)?;
        self.write_files(f)
    }
}

impl Summary<'_> {
    fn line(&self, f: &mut fmt::Formatter<'_>, label: &str, text: impl Display) -> fmt::Result {
        // Styles have width for the formatter, so the padding stands outside of them.
        let padding = LABELS.saturating_sub(label.len());
        let label = match label {
            "" => String::new(),
            _ => self.terminal.bold(label),
        };
        writeln!(f, "{label}{:padding$}{text}", "")
    }

    /// The fused phases of a layer and what each took in.
    fn write_phases(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fused = &self.compilation.fused;
        let operators: usize = fused.layer.iter().map(|node| node.sources.len()).sum();
        self.line(
            f,
            "layer",
            format_args!(
                "{operators} operators fused into {} phases",
                fused.layer.len()
            ),
        )?;
        let names = fused.layer.iter().map(|node| node.name.len());
        let width = names.max().unwrap_or(0);
        for node in &fused.layer {
            let sources = self.terminal.faint(node.sources.join(", "));
            self.line(f, "", format_args!("  {:<width$}  {sources}", node.name))?;
        }
        Ok(())
    }

    /// Bytes, predicted time against the floor, and exchanges, for both kinds of step.
    fn write_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compilation { plan, program, .. } = self.compilation;
        let head = matrix_bytes(&program.head);
        let rate = plan.weight_bytes as f64 / plan.floor;
        let mut row = |label: &str, streamed: u64, planned: &StepPlan, step: &Step| {
            let floor = streamed as f64 / rate;
            let exchanges = program.exchanges(step);
            self.line(
                f,
                label,
                format_args!(
                    "{} a step, {:.0} us predicted, {:.2} x the floor of {floor:.0} us",
                    bytes(streamed as usize),
                    planned.cost.total,
                    planned.cost.total / floor,
                ),
            )?;
            self.line(
                f,
                "",
                format_args!(
                    "  {} {}, {exchanges} exchanges a layer, KV in {}, residual stream {}",
                    planned.columns,
                    plural("column", planned.columns),
                    match planned.kv_splits {
                        1 => "one piece".to_owned(),
                        splits => format!("{splits} splits"),
                    },
                    planned.stream
                ),
            )
        };
        row("decode", plan.weight_bytes, &plan.decode, &program.decode)?;
        // A prefill step makes no token, so it does not read the head.
        let layers = plan.weight_bytes.saturating_sub(head);
        row("prefill", layers, &plan.prefill, &program.prefill)?;
        self.write_prediction(f)
    }

    /// Where a decode step is predicted to go.
    fn write_prediction(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compilation {
            target, program, ..
        } = self.compilation;
        let depth = target.depth();
        let predicted = Prediction::new(program, &Machine::of(&target.gpu), true, depth);
        self.line(
            f,
            "phases",
            format_args!(
                "of a decode step at position {depth}, predicted: {} layers of {:.1} us, and the head in {:.1} us",
                program.layers,
                predicted.phases.iter().sum::<f64>(),
                predicted.head
            ),
        )?;
        for (phase, time) in program.decode.layer.iter().zip(&predicted.phases) {
            let name = self.terminal.faint(program.describe(phase));
            self.line(f, "", format_args!("  {time:5.2} us  {name}"))?;
        }
        Ok(())
    }

    fn write_kernel(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.compilation.program.shared.bytes;
        let launch = format!("{shared} B of shared memory, {THREADS} threads");
        let Some(cubin) = &self.cubin else {
            let missing = self.terminal.alarm("no cubin");
            return self.line(f, "kernel", format_args!("{missing}; {launch}"));
        };
        let artifact = &cubin.build.artifact;
        let resources = &artifact.manifest.resources;
        let spilled = resources.spill_store_bytes + resources.spill_load_bytes;
        let spills = match spilled {
            0 => "no spills".to_owned(),
            _ => self.terminal.alarm(format_args!("{spilled} B spilled")),
        };
        self.line(
            f,
            "kernel",
            format_args!(
                "{} registers, {spills}, {launch}; cubin {}",
                resources.registers,
                bytes(artifact.cubin.len())
            ),
        )
    }

    fn write_times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut stages = String::new();
        for (stage, time) in &self.compilation.times {
            let comma = if stages.is_empty() { "" } else { ", " };
            write!(stages, "{comma}{stage} {:.0}", time.as_secs_f64() * 1e3)?;
        }
        let stages = self.terminal.faint(format_args!("({stages})"));
        let cubin = match &self.cubin {
            Some(cubin) if cubin.build.from_cache => {
                format!("; cubin from the cache {}", duration(cubin.time))
            }
            Some(cubin) => format!("; NVRTC {}", duration(cubin.time)),
            None => String::new(),
        };
        let source = duration(self.to_source);
        self.line(
            f,
            "time",
            format_args!("CUDA source {source} {stages}{cubin}"),
        )
    }

    fn write_files(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = &self.compilation.source;
        let show = |name: &str| self.out.join(name).display().to_string();
        self.line(
            f,
            "wrote",
            format_args!(
                "{} ({} lines, with {} headers)",
                show(SOURCE_FILE),
                source.text.lines().count(),
                source.headers.len()
            ),
        )?;
        if self.cubin.is_some() {
            for name in [CUBIN_FILE, MANIFEST_FILE] {
                self.line(f, "", show(name))?;
            }
        }
        let dumps = format!("{{{}}}.txt", DUMPS.join(","));
        self.line(f, "", show(&dumps))
    }
}

/// Bytes of a linear's matrices.
fn matrix_bytes(linear: &Linear) -> u64 {
    let rows: usize = linear.parts.iter().map(|(_, rows)| rows).sum();
    2 * (rows * linear.columns) as u64
}

fn bytes(bytes: usize) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1.0, "B")];
    scaled(bytes as f64, &units)
}

/// Three digits or so in the largest unit that leaves at least one; the last where none does.
fn scaled(value: f64, units: &[(f64, &str)]) -> String {
    let fits = units.iter().find(|(unit, _)| value >= *unit);
    let (unit, name) = fits.or(units.last()).copied().unwrap_or((1.0, ""));
    let value = value / unit;
    let digits = match value {
        _ if unit == 1.0 => 0,
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.digits$} {name}")
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.1} s")
    }
}

fn plural(word: &str, count: usize) -> String {
    format!("{word}{}", if count == 1 { "" } else { "s" })
}
