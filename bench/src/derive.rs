//! From raw iterations to the numbers of a point: summaries, roofline shares, categories, speedups.
//!
//! Owns all arithmetic between what a side measured and what a report prints. It must not format anything.

use crate::results::{
    CategoryRow, Iteration, ModelFacts, Point, Results, Role, Roofline, SequenceRow, Setup,
    SidePoint, Speedup, SummaryRow,
};
use crate::side::Generation;
use crate::stats::{Estimate, Pairs, Summary, geometric_mean_of_ratios, mean};
use crate::workload::Batch;

const MS: f64 = 1e3;
const US: f64 = 1e6;

/// An iteration's row, and the times between its tokens in milliseconds.
pub fn iteration(
    index: usize,
    turn: usize,
    batch: &Batch<'_>,
    generation: &Generation,
) -> (Iteration, Vec<f64>) {
    let tokens: usize = generation.tokens.iter().map(Vec::len).sum();
    let rows = batch
        .prompts
        .iter()
        .zip(&batch.work.sequences)
        .zip(generation.tokens.iter().zip(&generation.sequences));
    let sequences = rows
        .map(|((prompt, sequence), (tokens, times))| SequenceRow {
            prompt: prompt.id.clone(),
            prompt_tokens: sequence.prompt.len(),
            tokens: tokens.len(),
            ttft_ms: times.first * MS,
            tpot_ms: times
                .last
                .filter(|_| tokens.len() > 1)
                .map(|last| (last - times.first) * MS / (tokens.len() - 1) as f64),
            latency_ms: times.last.map(|last| last * MS),
        })
        .collect();
    let row = Iteration {
        index,
        turn,
        latency_ms: generation.wall * MS,
        tokens,
        throughput: tokens as f64 / generation.wall,
        device_ms: generation.device.map(|time| time * MS),
        device_step_ms: generation.device_step.map(|time| time * MS),
        sequences,
    };
    let gaps = generation
        .sequences
        .iter()
        .flat_map(|times| times.gaps.iter().map(|gap| gap * MS))
        .collect();
    (row, gaps)
}

/// Leaves out, on all sides, the times of sequences that one of them has no time for; `series` holds each side's
/// iterations, of equal work in equal places. Else one side's mean would be of other texts than the next one's.
pub fn keep_common_times(series: &mut [Vec<Iteration>]) {
    let places = series.iter().map(Vec::len).min().unwrap_or(0);
    for place in 0..places {
        let sequences = series.iter().map(|side| side[place].sequences.len());
        for sequence in 0..sequences.min().unwrap_or(0) {
            let rows = || series.iter().map(|side| &side[place].sequences[sequence]);
            let (latency, tpot) = (
                rows().all(|row| row.latency_ms.is_some()),
                rows().all(|row| row.tpot_ms.is_some()),
            );
            for side in &mut *series {
                let row = &mut side[place].sequences[sequence];
                row.latency_ms = row.latency_ms.filter(|_| latency);
                row.tpot_ms = row.tpot_ms.filter(|_| tpot);
            }
        }
    }
}

/// What a roofline is made of.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling<'a> {
    /// Whose weights are read.
    pub model: &'a ModelFacts,
    /// Measured bandwidth in GB/s.
    pub bandwidth_gb_s: f64,
}

/// A side's numbers at a point; `None` without any iteration.
pub fn side_point(
    side: &str,
    setup: Setup,
    iterations: Vec<Iteration>,
    gaps: &[f64],
    ceiling: Option<Ceiling<'_>>,
    category_of: &dyn Fn(&str) -> String,
) -> Option<SidePoint> {
    let series = |of: &dyn Fn(&Iteration) -> f64| {
        Summary::of(&iterations.iter().map(of).collect::<Vec<_>>())
    };
    let rows = || iterations.iter().flat_map(|iteration| &iteration.sequences);
    let tpot: Vec<f64> = rows().filter_map(|row| row.tpot_ms).collect();
    let device: Option<Vec<f64>> = iterations
        .iter()
        .map(|iteration| iteration.device_ms)
        .collect();
    let per_user: Vec<f64> = tpot
        .iter()
        .filter(|time| **time > 0.0)
        .map(|time| MS / time)
        .collect();
    Some(SidePoint {
        side: side.to_owned(),
        setup,
        latency_ms: series(&|iteration| iteration.latency_ms)?,
        throughput: series(&|iteration| iteration.throughput)?,
        throughput_per_user: Summary::of(&per_user),
        device_ms: device.and_then(|times| Summary::of(&times)),
        ttft_ms: Summary::of(&rows().map(|row| row.ttft_ms).collect::<Vec<_>>()),
        tpot_ms: Summary::of(&tpot),
        itl_ms: Summary::of(gaps),
        roofline: ceiling.and_then(|ceiling| roofline(&iterations, &tpot, ceiling)),
        categories: categories(&iterations, category_of),
        matrix_products: Vec::new(),
        iterations,
    })
}

/// A mean decode step against the bytes it must read: all weights once, and the cache of every sequence at its mean
/// position while it decodes.
fn roofline(iterations: &[Iteration], tpot_ms: &[f64], ceiling: Ceiling<'_>) -> Option<Roofline> {
    let device: Option<Vec<f64>> = iterations
        .iter()
        .map(|iteration| iteration.device_step_ms)
        .collect();
    let (step_ms, clock) = match device {
        Some(times) if !times.is_empty() => (mean(&times), "device"),
        _ if !tpot_ms.is_empty() => (mean(tpot_ms), "host, from TPOT"),
        _ => return None,
    };
    let cached: Vec<f64> = iterations
        .iter()
        .map(|iteration| {
            let positions = iteration
                .sequences
                .iter()
                .map(|row| row.prompt_tokens as f64 + row.tokens as f64 / 2.0);
            positions.sum()
        })
        .collect();
    let step_bytes = ceiling.model.step_bytes as f64
        + ceiling.model.kv_bytes_per_position as f64 * mean(&cached);
    let floor_us = step_bytes / (ceiling.bandwidth_gb_s * 1e9) * US;
    let step_us = step_ms * MS;
    let share = floor_us / step_us;
    let usable = step_us > 0.0 && floor_us.is_finite();
    usable.then(|| Roofline {
        step_bytes,
        floor_us,
        step_us,
        clock: clock.to_owned(),
        share: (share <= 1.0).then_some(share),
    })
}

fn categories(iterations: &[Iteration], category_of: &dyn Fn(&str) -> String) -> Vec<CategoryRow> {
    let mut names: Vec<String> = Vec::new();
    let mut rows: Vec<Vec<&SequenceRow>> = Vec::new();
    for row in iterations.iter().flat_map(|iteration| &iteration.sequences) {
        let category = category_of(&row.prompt);
        match names.iter().position(|name| *name == category) {
            Some(at) => rows[at].push(row),
            None => {
                names.push(category);
                rows.push(vec![row]);
            }
        }
    }
    let row = |(category, rows): (String, Vec<&SequenceRow>)| {
        let mean_of = |of: &dyn Fn(&SequenceRow) -> f64| {
            mean(&rows.iter().map(|row| of(row)).collect::<Vec<_>>())
        };
        let mean_of_known = |of: &dyn Fn(&SequenceRow) -> Option<f64>| {
            let known: Vec<f64> = rows.iter().filter_map(|row| of(row)).collect();
            (!known.is_empty()).then(|| mean(&known))
        };
        CategoryRow {
            sequences: rows.len(),
            mean_prompt_tokens: mean_of(&|row| row.prompt_tokens as f64),
            ttft_ms: mean_of(&|row| row.ttft_ms),
            tpot_ms: mean_of_known(&|row| row.tpot_ms),
            latency_ms: mean_of_known(&|row| row.latency_ms),
            category,
        }
    };
    names.into_iter().zip(rows).map(row).collect()
}

/// The paired series of a speedup: the other side first, so that a ratio above 1 means that ours is faster.
struct Series {
    latency: Pairs,
    throughput: Pairs,
    device: Option<Pairs>,
}

/// Pairs the iterations of equal index.
fn paired(ours: &SidePoint, theirs: &SidePoint) -> Series {
    let pairs = || {
        ours.iterations.iter().filter_map(|our| {
            let their = theirs
                .iterations
                .iter()
                .find(|their| their.index == our.index)?;
            Some((our, their))
        })
    };
    let device: Option<Vec<_>> = pairs()
        .map(|(our, their)| Some((their.device_ms?, our.device_ms?)))
        .collect();
    Series {
        latency: Pairs(
            pairs()
                .map(|(our, their)| (their.latency_ms, our.latency_ms))
                .collect(),
        ),
        // Our mean throughput over theirs, as the guide defines it.
        throughput: Pairs(
            pairs()
                .map(|(our, their)| (our.throughput, their.throughput))
                .collect(),
        ),
        device: device.filter(|pairs| !pairs.is_empty()).map(Pairs),
    }
}

/// Mirage against another side at a point.
pub fn speedup(ours: &SidePoint, theirs: &SidePoint) -> Option<Speedup> {
    let series = paired(ours, theirs);
    Some(Speedup {
        against: theirs.side.clone(),
        latency: series.latency.ratio_of_sums()?,
        throughput: series.throughput.ratio_of_sums()?,
        device: series.device.and_then(|pairs| pairs.ratio_of_sums()),
    })
}

/// Why two sides of a point must not be compared by time: they did not make equally many tokens.
pub fn unequal_work(point: &Point) -> Option<String> {
    let (first, others) = point.sides.split_first()?;
    let unequal = |other: &SidePoint| {
        first
            .iterations
            .iter()
            .filter(|our| {
                other
                    .iterations
                    .iter()
                    .any(|their| their.index == our.index && their.tokens != our.tokens)
            })
            .count()
    };
    let worst = others
        .iter()
        .map(unequal)
        .max()
        .filter(|count| *count > 0)?;
    Some(format!(
        "in {worst} of {} iterations the sides made different numbers of tokens; run with --ignore-eos, or --temperature 0",
        first.iterations.len()
    ))
}

/// One row for every side that mirage was compared with, over all points that have a speedup.
pub fn summary(results: &Results) -> Vec<SummaryRow> {
    let Some(ours) = results.sides.iter().find(|side| side.role == Role::Mirage) else {
        return Vec::new();
    };
    let row = |other: &str| {
        let series: Vec<Series> = results
            .points
            .iter()
            .filter(|point| point.speedup(other).is_some())
            .filter_map(|point| Some(paired(point.side(&ours.key)?, point.side(other)?)))
            .collect();
        let latency: Vec<Pairs> = series.iter().map(|series| series.latency.clone()).collect();
        let throughput: Vec<Pairs> = series
            .iter()
            .map(|series| series.throughput.clone())
            .collect();
        let device: Option<Vec<Pairs>> =
            series.iter().map(|series| series.device.clone()).collect();
        Some(SummaryRow {
            against: other.to_owned(),
            points: series.len(),
            latency: geometric_mean_of_ratios(&latency)?,
            throughput: geometric_mean_of_ratios(&throughput)?,
            device: device.and_then(|pairs| geometric_mean_of_ratios(&pairs)),
        })
    };
    results
        .sides
        .iter()
        .filter(|side| side.role != Role::Mirage)
        .filter_map(|side| row(&side.key))
        .collect()
}

/// Percentage by which a latency falls at that speedup: -16.4 for 1.196.
pub fn latency_change_percent(speedup: &Estimate) -> f64 {
    (1.0 / speedup.value - 1.0) * 100.0
}
