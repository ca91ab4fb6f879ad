//! Which charts the page has, and of what.

use super::builder::Html;
use super::side_name;
use crate::ladder;
use crate::report::format;
use crate::report::svg::{self, Bar, Fall, Series, Whisker};
use crate::results::{Point, Results, Role, SidePoint};
use crate::stats::Summary;

/// Mirage has the first style; every other side its own.
fn style(results: &Results, key: &str) -> usize {
    let others = results
        .sides
        .iter()
        .filter(|side| side.role != Role::Mirage);
    match results.side(key).map(|side| side.role) {
        Some(Role::Mirage) | None => 0,
        Some(Role::Baseline | Role::External) => {
            1 + others.take_while(|side| side.key != key).count()
        }
    }
}

/// The depths that points have, each once, in order.
fn depths(results: &Results) -> Vec<Option<usize>> {
    let mut depths: Vec<Option<usize>> = Vec::new();
    for point in &results.points {
        if !depths.contains(&point.context_depth) {
            depths.push(point.context_depth);
        }
    }
    depths
}

/// All charts, depth after depth.
pub(super) fn charts(out: &mut Html, results: &Results) {
    for depth in depths(results) {
        let points: Vec<&Point> = results
            .points
            .iter()
            .filter(|point| point.context_depth == depth)
            .collect();
        let at = depth.map_or(String::new(), |depth| format!(" at context depth {depth}"));
        let places: Vec<String> = points.iter().map(|point| point.batch.to_string()).collect();
        let mut lines = |title: &str,
                         unit: &str,
                         caption: &str,
                         of: &dyn Fn(&SidePoint) -> Option<&Summary>| {
            let series: Vec<Series> = results
                .sides
                .iter()
                .map(|side| Series {
                    label: side_name(side),
                    style: style(results, &side.key),
                    values: points
                        .iter()
                        .map(|point| point.side(&side.key).and_then(of).map(|s| (s.mean, s.std)))
                        .collect(),
                })
                .filter(|series| series.values.iter().any(Option::is_some))
                .collect();
            if !series.is_empty() {
                out.figure(
                    &format!("{title}{at}"),
                    &svg::lines(title, unit, &places, &series),
                    caption,
                );
            }
        };
        lines(
            "Latency of a batch",
            "ms",
            "Host time, mean and standard deviation. Lower is better.",
            &|side| Some(&side.latency_ms),
        );
        lines(
            "Throughput",
            "tokens/s",
            "All sequences together. Higher is better.",
            &|side| Some(&side.throughput),
        );
        lines(
            "Time per output token",
            "ms",
            "Decoding only, without prefill. Lower is better.",
            &|side| side.tpot_ms.as_ref(),
        );
        lines(
            "Time to first token",
            "ms",
            "Prefill and the first token. Lower is better.",
            &|side| side.ttft_ms.as_ref(),
        );
        if let Some(headline) = results.headline() {
            let row = |point: &&Point| {
                let speedup = point.speedup(&headline.key)?;
                Some(Whisker {
                    label: format!("batch {}", point.batch),
                    value: speedup.latency.value,
                    interval: speedup.latency.interval,
                    text: format::speedup(&speedup.latency),
                })
            };
            let rows: Vec<Whisker> = points.iter().filter_map(row).collect();
            if !rows.is_empty() {
                let title = format!("Mirage against {}{at}", side_name(headline));
                let caption = "Their latency over mirage's with the 95 % interval: right of the line, mirage is faster.";
                out.figure(&title, &svg::whiskers(&title, 1.0, &rows), caption);
            }
        }
        let mut bars = Vec::new();
        for point in &points {
            for side in &results.sides {
                let Some(roofline) = point
                    .side(&side.key)
                    .and_then(|side| side.roofline.as_ref())
                else {
                    continue;
                };
                bars.push(Bar {
                    label: format!(
                        "batch {}: {} ({:.0} µs of {:.0} µs)",
                        point.batch,
                        side_name(side),
                        roofline.floor_us,
                        roofline.step_us
                    ),
                    style: style(results, &side.key),
                    value: roofline.share.unwrap_or(0.0),
                    text: roofline.share.map_or_else(
                        || "not valid".to_owned(),
                        |share| format!("{:.1} %", share * 100.0),
                    ),
                });
            }
        }
        if !bars.is_empty() {
            let caption = "The bytes a decode step must read, at the bandwidth measured in this run, over the step's time. Full is 100 %.";
            out.figure(
                &format!("Share of the roofline{at}"),
                &svg::bars("Share of the roofline", 1.0, &bars),
                caption,
            );
        }
        for point in &points {
            waterfall(out, results, point);
        }
    }
}

fn waterfall(out: &mut Html, results: &Results, point: &Point) {
    let mut last = 0.0;
    let falls: Vec<Fall> = ladder::of(results, point)
        .into_iter()
        .map(|step| {
            let span = if step.rung {
                (0.0, step.microseconds)
            } else {
                (last, last + step.microseconds)
            };
            last = span.1;
            let text = if step.rung {
                format!("{:.1} µs", step.microseconds)
            } else {
                format!("{:+.1} µs", step.microseconds)
            };
            Fall {
                label: step.what,
                span,
                text,
                total: step.rung,
            }
        })
        .collect();
    if !falls.is_empty() {
        let title = format!(
            "From baseline to mirage, batch {}",
            format::point_name(point).to_lowercase()
        );
        out.figure(
            &title,
            &svg::waterfall(&title, &falls),
            "One decode step. Full bars are measured, hatched ones what lies between.",
        );
    }
}
