//! `--external`: another engine's measured numbers in the same report.
//!
//! Owns the format of such a file and what becomes of it. The numbers are quoted, never checked: no correctness gate,
//! no interleaving, so they are marked as external wherever they appear and never are the headline. A speedup against
//! them is given only where no gate failed and no speedup is withheld, and where both made equally many tokens on the
//! mean. `bench/external/vllm.py` writes such a file.
//!
//! ```json
//! {
//!   "format": "mirage-external", "version": 1,
//!   "engine": "vLLM 0.22.1", "description": "CUDA graphs, torch.compile", "device": "NVIDIA H100 80GB HBM3",
//!   "points": [
//!     {"batch": 1, "iterations": [{"latency_ms": 92.1, "tokens": 50}, {"latency_ms": 91.8, "tokens": 50, "ttft_ms": 4.1}]}
//!   ]
//! }
//! ```
//!
//! `latency_ms` is the host time from token ids to the last token of the batch, `tokens` how many new ones it has in all.
//! Optional: `context_depth` of a point, `ttft_ms` of an iteration (first token of the batch).

use serde::Deserialize;

use crate::derive;
use crate::results::{
    Iteration, OnlyQuoted, Point, Results, Role, Setup, SideFacts, SidePoint, Speedup, SummaryRow,
};
use crate::stats::{Estimate, Summary, geometric_mean, mean, ratio_of_means};

/// The version of the format.
const VERSION: u32 = 1;

/// A file of another engine's numbers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    format: String,
    version: u32,
    engine: String,
    #[serde(default)]
    description: String,
    device: String,
    points: Vec<ExternalPoint>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExternalPoint {
    batch: usize,
    #[serde(default)]
    context_depth: Option<usize>,
    iterations: Vec<ExternalIteration>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExternalIteration {
    latency_ms: f64,
    tokens: usize,
    #[serde(default)]
    ttft_ms: Option<f64>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}; `mirage-bench --help` names the example that writes such a file")]
pub struct ExternalError {
    file: String,
    message: String,
}

/// Reads a file; `file` is its name in errors.
///
/// # Errors
/// Anything but the format above, or times that are not positive.
pub fn read(text: &str, file: &str) -> Result<External, ExternalError> {
    let error = |message: String| ExternalError {
        file: file.to_owned(),
        message,
    };
    let external: External = serde_json::from_str(text)
        .map_err(|json| error(format!("not in the format of external results ({json})")))?;
    if external.format != "mirage-external" || external.version != VERSION {
        return Err(error(format!(
            "the format is \"{}\", version {}, but \"mirage-external\", version {VERSION}, is read",
            external.format, external.version
        )));
    }
    for point in &external.points {
        for row in &point.iterations {
            let positive = row.latency_ms.is_finite() && row.latency_ms > 0.0 && row.tokens > 0;
            if !positive
                || row
                    .ttft_ms
                    .is_some_and(|time| !time.is_finite() || time <= 0.0)
            {
                return Err(error(format!(
                    "batch {}: times and tokens must be positive",
                    point.batch
                )));
            }
        }
    }
    Ok(external)
}

impl External {
    /// Puts the numbers into the report, next to mirage's at the same batch size and depth. Points that mirage was not
    /// measured at are left out.
    pub fn add_to(&self, results: &mut Results) {
        let number = results
            .sides
            .iter()
            .filter(|side| side.role == Role::External)
            .count()
            + 1;
        let key = format!("external{number}");
        let mut about = format!("{} on {}", self.description, self.device)
            .trim()
            .to_owned();
        if self.device != results.device.name {
            about.push_str(&format!(" (this run: {})", results.device.name));
        }
        let facts = SideFacts {
            key: key.clone(),
            label: self.engine.clone(),
            description: about,
            role: Role::External,
        };
        results.sides.push(facts);
        let mirage = results
            .sides
            .iter()
            .find(|side| side.role == Role::Mirage)
            .map(|side| side.key.clone());
        for theirs in &self.points {
            let point = results.points.iter_mut().find(|point| {
                (point.batch, point.context_depth) == (theirs.batch, theirs.context_depth)
            });
            let Some((point, numbers)) = point.zip(theirs.side_point(&key)) else {
                continue;
            };
            let ours = mirage
                .as_deref()
                .and_then(|mirage| point.side(mirage))
                .cloned();
            if let Some(ours) = ours {
                match only_quoted(point, &ours, &numbers) {
                    Some(reason) => point.only_quoted.push(OnlyQuoted {
                        side: key.clone(),
                        reason,
                    }),
                    None => point.speedups.extend(unpaired(&ours, &numbers)),
                }
            }
            point.sides.push(numbers);
        }
        results.summary.extend(summary(results, &key));
    }
}

impl ExternalPoint {
    fn side_point(&self, key: &str) -> Option<SidePoint> {
        let iterations: Vec<Iteration> = self
            .iterations
            .iter()
            .enumerate()
            .map(|(index, row)| Iteration {
                index,
                turn: 0,
                latency_ms: row.latency_ms,
                tokens: row.tokens,
                throughput: row.tokens as f64 / row.latency_ms * 1e3,
                device_ms: None,
                device_step_ms: None,
                sequences: Vec::new(),
            })
            .collect();
        let first: Vec<f64> = self
            .iterations
            .iter()
            .filter_map(|row| row.ttft_ms)
            .collect();
        let mut numbers =
            derive::side_point(key, Setup::default(), iterations, &[], None, &str::to_owned)?;
        numbers.ttft_ms = Summary::of(&first);
        Some(numbers)
    }
}

/// Why mirage is not compared with these numbers; none where it may be.
fn only_quoted(point: &Point, ours: &SidePoint, theirs: &SidePoint) -> Option<String> {
    if let Some(reason) = &point.withheld {
        return Some(reason.clone());
    }
    let tokens = |side: &SidePoint| {
        let tokens: Vec<f64> = side
            .iterations
            .iter()
            .map(|row| row.tokens as f64)
            .collect();
        mean(&tokens)
    };
    let (our, their) = (tokens(ours), tokens(theirs));
    // Means of whole numbers: what differs at all differs by more than rounding does.
    ((our - their).abs() > 1e-9 * our).then(|| {
        format!(
            "it made {their:.1} tokens an iteration, mirage {our:.1}; measure both with equal --max-tokens and end-of-text \
             tokens ignored"
        )
    })
}

/// Mirage against numbers that were measured apart.
fn unpaired(ours: &SidePoint, theirs: &SidePoint) -> Option<Speedup> {
    let of = |side: &SidePoint, value: &dyn Fn(&Iteration) -> f64| {
        side.iterations.iter().map(value).collect::<Vec<_>>()
    };
    Some(Speedup {
        against: theirs.side.clone(),
        latency: ratio_of_means(
            &of(theirs, &|row| row.latency_ms),
            &of(ours, &|row| row.latency_ms),
        )?,
        throughput: ratio_of_means(
            &of(ours, &|row| row.throughput),
            &of(theirs, &|row| row.throughput),
        )?,
        device: None,
    })
}

fn summary(results: &Results, key: &str) -> Option<SummaryRow> {
    let speedups: Vec<&Speedup> = results
        .points
        .iter()
        .filter_map(|point| point.speedup(key))
        .collect();
    let mean = |of: &dyn Fn(&Speedup) -> f64| {
        let value = geometric_mean(
            &speedups
                .iter()
                .map(|speedup| of(speedup))
                .collect::<Vec<_>>(),
        )?;
        Some(Estimate {
            value,
            interval: None,
        })
    };
    Some(SummaryRow {
        against: key.to_owned(),
        points: speedups.len(),
        latency: mean(&|speedup| speedup.latency.value)?,
        throughput: mean(&|speedup| speedup.throughput.value)?,
        device: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::results;

    fn add(tokens: usize, change: impl Fn(&mut Point)) -> Point {
        let mut results = results();
        change(&mut results.points[0]);
        let file = format!(
            r#"{{"format": "mirage-external", "version": 1, "engine": "E", "device": "Made-up GPU", "points":
                [{{"batch": 1, "iterations": [{{"latency_ms": 40.0, "tokens": {tokens}}}]}}]}}"#
        );
        read(&file, "e.json")
            .expect("the format")
            .add_to(&mut results);
        results.points.swap_remove(0)
    }

    fn check(point: &Point, reason: Option<&str>) {
        assert!(point.side("external2").is_some(), "its numbers are quoted");
        assert_eq!(point.speedup("external2").is_some(), reason.is_none());
        let quoted = point.only_quoted.iter().find(|q| q.side == "external2");
        match (quoted, reason) {
            (None, None) => {}
            (Some(quoted), Some(reason)) => {
                assert!(quoted.reason.starts_with(reason), "{}", quoted.reason)
            }
            (quoted, reason) => panic!("{quoted:?} in place of {reason:?}"),
        }
    }

    #[test]
    fn a_speedup_needs_equal_work_and_agreeing_sides() {
        check(&add(11, |_| {}), None);
        check(
            &add(7, |_| {}),
            Some("it made 7.0 tokens an iteration, mirage 11.0"),
        );
        let withheld = |point: &mut Point| point.withheld = Some("they do not agree".to_owned());
        check(&add(11, withheld), Some("they do not agree"));
    }
}
