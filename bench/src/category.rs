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
    /// Mean time to the last one, over the points that have one.
    pub latency_ms: Option<f64>,
    /// The headline's latency over mirage's, where the points it is from have speedups.
    pub latency_ratio: Option<f64>,
}

/// Sums over the points, by sequence.
#[derive(Default)]
struct Sums {
    sequences: f64,
    prompt_tokens: f64,
    ttft: f64,
    /// Of the points that have a time to the last token, and their sequences.
    latency: f64,
    timed: f64,
    theirs: Theirs,
}

/// The headline's latency, as far as the points go.
#[derive(Clone, Copy, Default)]
enum Theirs {
    /// No point yet.
    #[default]
    None,
    /// Of all points with a time of ours.
    Sum(f64),
    /// A point has none of theirs: a ratio would be one of different work.
    Missing,
}

impl Theirs {
    fn add(self, latency: Option<f64>) -> Theirs {
        match (self, latency) {
            (Theirs::None, Some(latency)) => Theirs::Sum(latency),
            (Theirs::Sum(sum), Some(latency)) => Theirs::Sum(sum + latency),
            (Theirs::Missing, _) | (_, None) => Theirs::Missing,
        }
    }

    fn ratio(self, ours: f64) -> Option<f64> {
        match self {
            Theirs::Sum(theirs) => Some(theirs / ours),
            Theirs::None | Theirs::Missing => None,
        }
    }
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
            let sum = sums.entry(&row.category).or_default();
            let weight = row.sequences as f64;
            let their = theirs.and_then(|side| {
                side.categories
                    .iter()
                    .find(|other| other.category == row.category)
            });
            if let Some(latency) = row.latency_ms {
                sum.latency += latency * weight;
                sum.timed += weight;
                let their = their.and_then(|other| other.latency_ms);
                sum.theirs = sum.theirs.add(their.map(|latency| latency * weight));
            }
            sum.sequences += weight;
            sum.prompt_tokens += row.mean_prompt_tokens * weight;
            sum.ttft += row.ttft_ms * weight;
        }
    }
    let row = |(category, sum): (&str, Sums)| Row {
        category: category.to_owned(),
        sequences: sum.sequences as usize,
        prompt_tokens: sum.prompt_tokens / sum.sequences,
        ttft_ms: sum.ttft / sum.sequences,
        latency_ms: (sum.timed > 0.0).then(|| sum.latency / sum.timed),
        latency_ratio: sum.theirs.ratio(sum.latency),
    };
    sums.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::results;
    use crate::results::CategoryRow;

    fn check(change: fn(usize, &str, &mut CategoryRow), latency: bool, ratio: bool) {
        let mut results = results();
        for (place, point) in results.points.iter_mut().enumerate() {
            for side in &mut point.sides {
                for row in &mut side.categories {
                    change(place, &side.side, row);
                }
            }
        }
        for row in table(&results) {
            assert_eq!(row.latency_ms.is_some(), latency, "{row:?}");
            assert_eq!(row.latency_ratio.is_some(), ratio, "{row:?}");
        }
    }

    #[test]
    fn a_ratio_is_of_equal_work() {
        check(|_, _, _| {}, true, true);
        check(|_, _, row| row.latency_ms = None, false, false);
        // A point that nobody has a time at is left out, one that only we have a time at leaves no ratio.
        let only_second = |place, _: &str, row: &mut CategoryRow| {
            row.latency_ms = row.latency_ms.filter(|_| place == 1);
        };
        check(only_second, true, true);
        let not_theirs = |place, side: &str, row: &mut CategoryRow| {
            row.latency_ms = row.latency_ms.filter(|_| place == 1 || side == "mirage");
        };
        check(not_theirs, true, false);
    }
}
