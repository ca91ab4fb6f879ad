//! The table by category: means over all batch sizes, weighted by sequences.

use crate::results::{Results, Role};

/// A category's numbers of mirage, or of the only side there is.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Name.
    pub category: String,
    /// Sequences measured.
    pub sequences: usize,
    /// Mean tokens of a prompt.
    pub prompt_tokens: f64,
    /// Mean time to the first token.
    pub ttft_ms: f64,
    /// Mean time to the last one.
    pub latency_ms: f64,
    /// The headline's latency over mirage's, where the points it is from have speedups.
    pub latency_ratio: Option<f64>,
}

/// Sums over the points, by sequence.
#[derive(Default)]
struct Sums {
    sequences: f64,
    prompt_tokens: f64,
    ttft: f64,
    latency: f64,
    theirs: Option<f64>,
}

/// One row for every category that was measured, in order of their names.
pub fn table(results: &Results) -> Vec<Row> {
    let mirage = results.sides.iter().find(|side| side.role == Role::Mirage);
    let Some(ours) = mirage.or(results.sides.first()) else {
        return Vec::new();
    };
    let headline = results
        .headline()
        .filter(|other| other.role == Role::Baseline && other.key != ours.key);
    let mut sums: std::collections::BTreeMap<&str, Sums> = std::collections::BTreeMap::new();
    for point in &results.points {
        let Some(numbers) = point.side(&ours.key) else {
            continue;
        };
        let comparable = headline.filter(|other| point.speedup(&other.key).is_some());
        let theirs = comparable.and_then(|other| point.side(&other.key));
        for row in &numbers.categories {
            let first = !sums.contains_key(row.category.as_str());
            let sum = sums.entry(&row.category).or_default();
            let weight = row.sequences as f64;
            let their = theirs.and_then(|side| {
                side.categories
                    .iter()
                    .find(|other| other.category == row.category)
            });
            let their = their.map(|other| other.latency_ms * weight);
            // One point without a comparison would make the ratio one of different work.
            sum.theirs = if first {
                their
            } else {
                sum.theirs.zip(their).map(|(a, b)| a + b)
            };
            sum.sequences += weight;
            sum.prompt_tokens += row.mean_prompt_tokens * weight;
            sum.ttft += row.ttft_ms * weight;
            sum.latency += row.latency_ms * weight;
        }
    }
    let row = |(category, sum): (&str, Sums)| Row {
        category: category.to_owned(),
        sequences: sum.sequences as usize,
        prompt_tokens: sum.prompt_tokens / sum.sequences,
        ttft_ms: sum.ttft / sum.sequences,
        latency_ms: sum.latency / sum.sequences,
        latency_ratio: sum.theirs.map(|theirs| theirs / sum.latency),
    };
    sums.into_iter().map(row).collect()
}
