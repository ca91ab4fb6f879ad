//! `--compare`: is this run slower than an old one?
//!
//! Owns the comparison of two results. Only what is the same work is compared: the same model, device, configuration and
//! prompts, else the numbers are given with a warning and decide nothing.

use std::fmt::Write as _;

use crate::results::{Point, Results, Role, SidePoint};
use crate::stats::{Estimate, Pairs, ratio_of_means};

/// What came of one side at one point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Slower by more than the tolerance, with 95 % confidence.
    Slower,
    /// Faster by more than the tolerance, with 95 % confidence.
    Faster,
    /// Neither.
    Same,
}

/// A side at a point, new against old.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Key of the side.
    pub side: String,
    /// Batch size.
    pub batch: usize,
    /// Depth.
    pub context_depth: Option<usize>,
    /// New latency over the old: above 1 is slower.
    pub latency: Estimate,
    /// The verdict.
    pub change: Change,
}

/// Two runs compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// What differs between the two, so that times cannot be compared.
    pub differences: Vec<String>,
    /// Sides and points that both have.
    pub lines: Vec<Line>,
    /// Keys of the sides whose regression counts: mirage's.
    counted: Vec<String>,
}

impl Comparison {
    /// Compares `new` with `old`; a change counts from `tolerance` on (0.02 for 2 %).
    pub fn new(old: &Results, new: &Results, tolerance: f64) -> Comparison {
        let mut differences = Vec::new();
        let mut same = |what: &str, old: &dyn std::fmt::Display, new: &dyn std::fmt::Display| {
            let (old, new) = (old.to_string(), new.to_string());
            if old != new {
                differences.push(format!("{what}: {old} before, {new} now"));
            }
        };
        same("device", &old.device.name, &new.device.name);
        same("weights", &old.model.weights_hash, &new.model.weights_hash);
        same("prompts", &old.prompts.hash, &new.prompts.hash);
        let (a, b) = (&old.configuration, &new.configuration);
        same("--max-tokens", &a.max_tokens, &b.max_tokens);
        same("--temperature", &a.temperature, &b.temperature);
        same("--top-p", &a.top_p, &b.top_p);
        same("--seed", &a.seed, &b.seed);
        same("--ignore-eos", &a.ignore_eos, &b.ignore_eos);
        let mut lines = Vec::new();
        for point in &new.points {
            let same_point = |other: &&Point| {
                (other.batch, other.context_depth) == (point.batch, point.context_depth)
            };
            let Some(before) = old.points.iter().find(same_point) else {
                continue;
            };
            for side in &point.sides {
                let Some(earlier) = before.side(&side.side) else {
                    continue;
                };
                let Some(latency) = ratio(side, earlier) else {
                    continue;
                };
                let change = change(&latency, tolerance);
                lines.push(Line {
                    side: side.side.clone(),
                    batch: point.batch,
                    context_depth: point.context_depth,
                    latency,
                    change,
                });
            }
        }
        let counted = new
            .sides
            .iter()
            .filter(|side| side.role == Role::Mirage)
            .map(|side| side.key.clone())
            .collect();
        Comparison {
            differences,
            lines,
            counted,
        }
    }

    /// Whether mirage became slower somewhere, in runs that can be compared.
    pub fn regressed(&self) -> bool {
        let slower =
            |line: &&Line| line.change == Change::Slower && self.counted.contains(&line.side);
        self.differences.is_empty() && self.lines.iter().any(|line| slower(&line))
    }

    /// For the terminal.
    pub fn to_text(&self, old: &str) -> String {
        let mut out =
            format!("Compared with {old} (latency now over latency then; above 1 is slower):\n");
        // Writing to a String cannot fail.
        for difference in &self.differences {
            let _ = writeln!(out, "  NOT COMPARABLE, {difference}");
        }
        if self.lines.is_empty() {
            out.push_str("  the two have no side and batch size in common\n");
        }
        for line in &self.lines {
            let depth = line
                .context_depth
                .map_or(String::new(), |depth| format!(", depth {depth}"));
            let interval = line.latency.interval.map_or(String::new(), |(low, high)| {
                format!(" [{low:.3}, {high:.3}]")
            });
            let word = match line.change {
                Change::Slower => "SLOWER",
                Change::Faster => "faster",
                Change::Same => "no change shown",
            };
            let _ = writeln!(
                out,
                "  {:<10} batch {}{depth}: {:.3}{interval} {word}",
                line.side, line.batch, line.latency.value
            );
        }
        out
    }
}

/// New over old. Iterations of the same prompts are compared pair by pair, which cancels the prompts' lengths.
fn ratio(new: &SidePoint, old: &SidePoint) -> Option<Estimate> {
    let work = |side: &SidePoint| -> Vec<Vec<String>> {
        side.iterations
            .iter()
            .map(|row| {
                row.sequences
                    .iter()
                    .map(|sequence| sequence.prompt.clone())
                    .collect()
            })
            .collect()
    };
    let times = |side: &SidePoint| -> Vec<f64> {
        side.iterations.iter().map(|row| row.latency_ms).collect()
    };
    if work(new) == work(old) {
        Pairs(times(new).into_iter().zip(times(old)).collect()).ratio_of_sums()
    } else {
        ratio_of_means(&times(new), &times(old))
    }
}

fn change(latency: &Estimate, tolerance: f64) -> Change {
    match latency.interval {
        Some((low, _)) if low > 1.0 + tolerance => Change::Slower,
        Some((_, high)) if high < 1.0 - tolerance => Change::Faster,
        _ => Change::Same,
    }
}
