//! The timeline of a generation: what each part of a step took on each CTA, from the marks of `device/trace.cuh`.
//!
//! Owns the marks' meaning, which follows from their order and the program. Times are in clocks of an SM; parts of a CTA
//! follow each other without a gap, so their sums are the step's time.

use std::collections::BTreeMap;
use std::fmt;

use mirage_compiler::program::{Phase, Program, Step};

mod compare;

pub use compare::Comparison;

/// Events of a CTA that are recorded; later ones are dropped.
pub const EVENTS: usize = 1 << 16;

/// The twin of `mirage::Mark`.
const NAMES: [&str; 12] = [
    "",
    "prefill step",
    "decode step",
    "phase",
    "collected",
    "prepared",
    "attended",
    "multiplied",
    "head",
    "logits",
    "candidates",
    "chosen",
];
const PREFILL_STEP: u32 = 1;
const DECODE_STEP: u32 = 2;
const PHASE: u32 = 3;
const HEAD: u32 = 8;

/// One part of a step, over all CTAs, layers and steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Its place in a step: 0 before the layers, the phases of a layer from 1 on, and one after these.
    pub place: usize,
    /// The phase, or what comes before and after the layers.
    pub phase: String,
    /// The mark at its end; empty where the next phase begins.
    pub until: &'static str,
    /// Clocks of each occurrence.
    pub clocks: Vec<u32>,
    /// Clocks waited for pages of weights, of all occurrences.
    pub starved: u64,
}

/// Parts of the steps of a generation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// Steps of each kind that were recorded, the last perhaps in part: prefill and decode.
    pub steps: [usize; 2],
    /// Parts by kind of step and place in it.
    pub parts: [Vec<Part>; 2],
    /// Workers that were recorded.
    pub workers: usize,
    /// Whether later events of a CTA did not fit.
    pub cut_short: bool,
}

/// Where a CTA is.
struct Walk<'a> {
    kind: usize,
    phases: &'a [Phase],
    /// Phases of the step so far; 0 before the first.
    phase: usize,
    after_layers: bool,
}

impl Timeline {
    /// Reads the trace of a program's kernel, `[ctas, EVENTS, {clock, mark}]`.
    pub fn new(program: &Program, trace: &[u32]) -> Timeline {
        let mut timeline = Timeline::default();
        let mut parts: [BTreeMap<(usize, usize), Part>; 2] = Default::default();
        for events in trace.chunks_exact(2 * EVENTS).take(program.mesh.workers()) {
            timeline.workers += 1;
            timeline.cut_short |= events.last().is_some_and(|mark| *mark != 0);
            let steps: [&Step; 2] = [&program.prefill, &program.decode];
            let mut walk: Option<Walk<'_>> = None;
            let mut last = 0;
            for event in events.chunks_exact(2).take_while(|event| event[1] != 0) {
                let (clock, mark, starved) = (event[0], event[1] % 16, event[1] / 16);
                if let Some(walk) = &mut walk {
                    let phases = walk.phases.len();
                    let (place, phase) = match (walk.phase, walk.after_layers) {
                        (0, _) => (0, "embedding".to_owned()),
                        (_, true) => (phases + 1, "head".to_owned()),
                        (n, false) => {
                            let at = (n - 1) % phases;
                            (at + 1, program.describe(&walk.phases[at]))
                        }
                    };
                    let until = match mark {
                        PREFILL_STEP | DECODE_STEP | PHASE | HEAD => "",
                        mark => NAMES[mark as usize],
                    };
                    // Passes of a linear and tasks of attention repeat their marks: the same part.
                    let key = (
                        place,
                        if until.is_empty() {
                            usize::MAX
                        } else {
                            mark as usize
                        },
                    );
                    let part = parts[walk.kind].entry(key).or_default();
                    part.place = place;
                    part.phase = phase;
                    part.until = until;
                    part.clocks.push(clock.wrapping_sub(last));
                    part.starved += u64::from(starved);
                }
                match mark {
                    PREFILL_STEP | DECODE_STEP => {
                        let kind = usize::from(mark == DECODE_STEP);
                        if timeline.workers == 1 {
                            timeline.steps[kind] += 1;
                        }
                        walk = Some(Walk {
                            kind,
                            phases: &steps[kind].layer,
                            phase: 0,
                            after_layers: false,
                        });
                    }
                    PHASE => {
                        if let Some(walk) = &mut walk {
                            walk.phase += 1;
                        }
                    }
                    HEAD => {
                        if let Some(walk) = &mut walk {
                            walk.after_layers = true;
                        }
                    }
                    _ => {}
                }
                last = clock;
            }
        }
        timeline.parts = parts.map(|parts| parts.into_values().collect());
        timeline
    }

    /// The SMs' clock in MHz, where the whole generation was recorded and took so long.
    pub fn clock_mhz(&self, milliseconds: f32) -> Option<f64> {
        let all: f64 = self
            .parts
            .iter()
            .flatten()
            .flat_map(|part| &part.clocks)
            .map(|&clocks| f64::from(clocks))
            .sum();
        let known = !self.cut_short && self.workers > 0 && milliseconds > 0.0;
        known.then(|| all / self.workers as f64 / (f64::from(milliseconds) * 1e3))
    }

    /// Clocks of each place of a step, on average over the workers: a phase's are those of all layers.
    fn clocks_of_places(&self, kind: usize, places: usize) -> Vec<f64> {
        let mut clocks = vec![0.0; places];
        for part in &self.parts[kind] {
            let sum: f64 = part.clocks.iter().map(|&c| f64::from(c)).sum();
            clocks[part.place] += sum / (self.steps[kind] * self.workers) as f64;
        }
        clocks
    }
}

impl fmt::Display for Timeline {
    /// For each part: clocks a step and worker on average, the median and the tenth and ninetieth of a hundred of an
    /// occurrence, and the share of the time that went into waiting for pages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, name) in ["prefill", "decode"].into_iter().enumerate() {
            let steps = self.steps[kind];
            if steps == 0 {
                continue;
            }
            let of = (steps * self.workers) as f64;
            let all: u64 = self.parts[kind]
                .iter()
                .flat_map(|p| &p.clocks)
                .map(|&c| u64::from(c))
                .sum();
            writeln!(
                f,
                "{name}: {steps} steps, {:.0} clocks a step",
                all as f64 / of
            )?;
            for part in &self.parts[kind] {
                let mut clocks = part.clocks.clone();
                clocks.sort_unstable();
                let sum: u64 = clocks.iter().map(|&c| u64::from(c)).sum();
                let at = |hundredth: usize| clocks[(clocks.len() - 1) * hundredth / 100];
                writeln!(
                    f,
                    "  {:>8.0} a step  {:>6} ({:>5}, {:>6})  starved {:>3.0} %  {} {}",
                    sum as f64 / of,
                    at(50),
                    at(10),
                    at(90),
                    100.0 * part.starved as f64 / sum.max(1) as f64,
                    part.phase,
                    if part.until.is_empty() {
                        "(to the end)"
                    } else {
                        part.until
                    },
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mirage_compiler::arch::GpuModel;
    use mirage_compiler::cost::Machine;
    use mirage_compiler::plan::{Plan, Target};
    use mirage_testing::{Sizes, qwen3};

    use super::*;

    #[test]
    fn marks_are_those_of_the_device() {
        let header = include_str!("../../../compiler/device/trace.cuh");
        let marks = header.split("enum class Mark").nth(1).unwrap();
        let marks = marks.split(['{', '}']).nth(1).unwrap();
        let names: Vec<String> = marks
            .lines()
            .filter_map(|line| line.trim().strip_prefix('k')?.split(',').next())
            .map(|name| name.replace("Step", " step").to_lowercase())
            .collect();
        assert_eq!(names[0], "none");
        assert_eq!(names[1..], NAMES[1..]);
    }

    #[test]
    fn parts_add_up_to_the_steps() {
        let model = qwen3(Sizes {
            layers: 2,
            hidden: 64,
            ffn: 128,
            heads: 4,
            kv_heads: 2,
            vocab: 256,
            tied: true,
        });
        let target = Target {
            gpu: GpuModel::cpu(),
            batch: 1,
            max_seq: 64,
        };
        let (_, program) = Plan::search(&model.fused, &target).unwrap();
        let mut clock = u32::MAX - 50; // clocks wrap around
        let mut trace = Vec::new();
        let mut mark = |mark: u32, starved: u32| {
            clock = clock.wrapping_add(10);
            trace.extend([clock, mark + 16 * starved]);
        };
        for _ in 0..2 {
            mark(DECODE_STEP, 0);
            for _ in 0..program.layers * program.decode.layer.len() {
                mark(PHASE, 3);
            }
            mark(HEAD, 0);
            mark(11, 0);
        }
        let events = trace.len() / 2;
        trace.resize(2 * EVENTS, 0);
        let timeline = Timeline::new(&program, &trace);
        assert_eq!((timeline.steps, timeline.workers), ([0, 2], 1));
        let parts = &timeline.parts[1];
        let clocks: u32 = parts.iter().flat_map(|part| &part.clocks).sum();
        assert_eq!(clocks as usize, 10 * (events - 1));
        // Before the layers, each phase, the head's two parts.
        assert_eq!(parts.len(), 1 + program.decode.layer.len() + 2);
        let last = program.describe(program.decode.layer.last().unwrap());
        let found = parts.iter().find(|part| part.phase == last).unwrap();
        assert_eq!(found.clocks.len(), 2 * program.layers);
        assert!(timeline.to_string().contains(&last));

        // Before the layers, each phase in every layer, the head in two parts.
        let phases = program.decode.layer.len();
        let mut expect = vec![10.0 * program.layers as f64; phases + 2];
        (expect[0], expect[phases + 1]) = (10.0, 15.0);
        assert_eq!(timeline.clocks_of_places(1, phases + 2), expect);
        let machine = Machine::of(&target.gpu);
        let all = (10 * (events - 1)) as f64;
        assert_eq!(timeline.clock_mhz(0.5), Some(all / 500.0));
        assert_eq!((timeline.cut_short, timeline.clock_mhz(0.0)), (false, None));
        let compared = Comparison::new(&timeline, &program, &machine, 8, 1000.0).to_string();
        let lines: Vec<&str> = compared.lines().collect();
        assert_eq!(lines.len(), 1 + phases + 3, "{compared}");
        assert!(lines[phases].ends_with(&last), "{compared}");
    }
}
