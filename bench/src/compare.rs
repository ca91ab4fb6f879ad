//! `--compare`: is this run slower than an old one?
//!
//! Owns the comparison of two results. Only what is the same work decides: the same model, device, configuration and,
//! batch size by batch size, the same prompts. Other numbers are given with the reason why they decide nothing.

use std::fmt::Write as _;

use crate::results::{Iteration, Point, Results, Role, SidePoint};
use crate::stats::{Estimate, Pairs, ratio_of_means};

/// What came of one side at one point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Slower by more than the tolerance, with 95 % confidence.
    Slower,
    /// Faster by more than the tolerance, with 95 % confidence.
    Faster,
    /// Neither.
    Same,
    /// Not the same work, for this reason.
    NotComparable(String),
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
    /// What differs between the two as a whole, so that no times can be compared.
    pub differences: Vec<String>,
    /// Sides and points that both have.
    pub lines: Vec<Line>,
    /// Keys of the sides whose lines decide: mirage's.
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
        same("graph", &old.model.graph_hash, &new.model.graph_hash);
        let categories = |results: &Results| match results.prompts.categories.as_slice() {
            [] => "all".to_owned(),
            chosen => chosen.join(" "),
        };
        same("--categories", &categories(old), &categories(new));
        same("prompts", &old.prompts.hash, &new.prompts.hash);
        let (a, b) = (&old.configuration, &new.configuration);
        same("--max-tokens", &a.max_tokens, &b.max_tokens);
        same("--temperature", &a.temperature, &b.temperature);
        same("--top-p", &a.top_p, &b.top_p);
        same("--seed", &a.seed, &b.seed);
        same("--ignore-eos", &a.ignore_eos, &b.ignore_eos);
        same("--num-warmup", &a.num_warmup, &b.num_warmup);
        same("--num-iterations", &a.num_iterations, &b.num_iterations);
        let mut lines = Vec::new();
        for point in &new.points {
            let same_point = |other: &&Point| {
                (other.batch, other.context_depth) == (point.batch, point.context_depth)
            };
            let Some(before) = old.points.iter().find(same_point) else {
                continue;
            };
            // What is only quoted is no run of ours.
            let ours = |side: &&SidePoint| {
                let facts = new.side(&side.side);
                facts.is_some_and(|facts| facts.role != Role::External)
            };
            for side in point.sides.iter().filter(ours) {
                let Some(earlier) = before.side(&side.side) else {
                    continue;
                };
                let Some(latency) = ratio(side, earlier) else {
                    continue;
                };
                let change = match other_work(side, earlier) {
                    Some(reason) => Change::NotComparable(reason),
                    None => change(&latency, tolerance),
                };
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

    /// Whether there was anything of mirage's to decide by.
    pub fn decides(&self) -> bool {
        let equal_work = |line: &Line| match line.change {
            Change::Slower | Change::Faster | Change::Same => true,
            Change::NotComparable(_) => false,
        };
        let counted = |line: &Line| self.counted.contains(&line.side);
        self.differences.is_empty()
            && self
                .lines
                .iter()
                .any(|line| counted(line) && equal_work(line))
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
            let word = match &line.change {
                _ if !self.differences.is_empty() => "",
                Change::Slower => "SLOWER",
                Change::Faster => "faster",
                Change::Same => "no change shown",
                Change::NotComparable(reason) => &format!("NOT COMPARABLE, {reason}"),
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

/// Prompts and tokens of an iteration.
fn work(row: &Iteration) -> (Vec<(&str, usize)>, usize) {
    let prompts = row
        .sequences
        .iter()
        .map(|sequence| (sequence.prompt.as_str(), sequence.prompt_tokens));
    (prompts.collect(), row.tokens)
}

/// Why two sides did not do the same work; none where they did.
fn other_work(new: &SidePoint, old: &SidePoint) -> Option<String> {
    let (now, before) = (new.iterations.len(), old.iterations.len());
    if now != before {
        return Some(format!("{before} iterations before, {now} now"));
    }
    let pairs = || {
        new.iterations
            .iter()
            .map(work)
            .zip(old.iterations.iter().map(work))
    };
    if pairs().any(|(new, old)| new.0 != old.0) {
        let cause =
            "other prompts: what is measured before it (--batch-sizes, --context-depth) differs";
        return Some(cause.to_owned());
    }
    let tokens = pairs().filter(|(new, old)| new.1 != old.1).count();
    (tokens > 0).then(|| format!("other numbers of tokens in {tokens} of {now} iterations"))
}

/// New over old. Iterations of the same work are compared pair by pair, which cancels the prompts' lengths.
fn ratio(new: &SidePoint, old: &SidePoint) -> Option<Estimate> {
    let times = |side: &SidePoint| -> Vec<f64> {
        side.iterations.iter().map(|row| row.latency_ms).collect()
    };
    if other_work(new, old).is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::results;

    fn check(change: impl Fn(&mut Results), reason: &str) {
        let old = results();
        let mut new = results();
        change(&mut new);
        let comparison = Comparison::new(&old, &new, 0.02);
        assert!(!comparison.decides() && !comparison.regressed());
        let text = comparison.to_text("old.json");
        let reason = format!("NOT COMPARABLE, {reason}");
        assert!(text.contains(&reason), "`{reason}` is not in: {text}");
        assert!(!text.contains("no change shown"), "{text}");
    }

    #[test]
    fn only_equal_work_decides() {
        let old = results();
        let same = Comparison::new(&old, &results(), 0.02);
        assert!(same.decides() && !same.regressed());
        assert!(same.lines.iter().all(|line| line.side != "external1"));
        check(
            |new| new.model.graph_hash = "other".to_owned(),
            "graph:  before, other now",
        );
        check(
            |new| new.prompts.categories = vec!["a".to_owned()],
            "--categories: all before, a now",
        );
        check(
            |new| new.prompts.hash = "other".to_owned(),
            "prompts: 0123456789abcdef0123 before, other now",
        );
        check(
            |new| new.configuration.num_warmup = 2,
            "--num-warmup: 1 before, 2 now",
        );
        check(
            |new| new.configuration.num_iterations = 9,
            "--num-iterations: 3 before, 9 now",
        );
        let each = |new: &mut Results, change: fn(&mut Vec<Iteration>)| {
            for side in new.points.iter_mut().flat_map(|point| &mut point.sides) {
                change(&mut side.iterations);
            }
        };
        check(
            |new| each(new, |rows| rows.truncate(2)),
            "3 iterations before, 2 now",
        );
        check(
            |new| each(new, |rows| rows[0].tokens -= 1),
            "other numbers of tokens in 1 of 3 iterations",
        );
        check(
            |new| {
                each(new, |rows| {
                    if let Some(sequence) = rows[0].sequences.first_mut() {
                        sequence.prompt = "b/7".to_owned();
                    }
                });
            },
            "other prompts: what is measured before it",
        );
    }

    #[test]
    fn slower_is_a_regression() {
        let (old, mut new) = (results(), results());
        for side in new.points.iter_mut().flat_map(|point| &mut point.sides) {
            for row in &mut side.iterations {
                row.latency_ms *= 1.5;
            }
        }
        assert!(Comparison::new(&old, &new, 0.02).regressed());
        assert!(!Comparison::new(&new, &old, 0.02).regressed());
        new.points.clear();
        assert!(!Comparison::new(&old, &new, 0.02).decides());
    }
}
