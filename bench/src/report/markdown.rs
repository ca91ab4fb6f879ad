//! The table to paste: batch sizes down, sides across.

use super::format;
use crate::results::{Results, Role};

/// A markdown table of all points, with a line above it that says what it is of.
pub fn table(results: &Results) -> String {
    let measured: Vec<_> = results
        .sides
        .iter()
        .filter(|side| {
            results
                .points
                .iter()
                .any(|point| point.side(&side.key).is_some())
        })
        .collect();
    let headline = results
        .headline()
        .filter(|_| results.sides.iter().any(|side| side.role == Role::Mirage));
    let mut out = format!(
        "{} on {}, {} new tokens, {} iterations: latency of a batch in ms, tokens/s\n\n",
        cell(&results.model.name),
        cell(&results.device.name),
        results.configuration.max_tokens,
        results.configuration.num_iterations
    );
    let mut head = vec!["batch".to_owned()];
    head.extend(measured.iter().map(|side| match side.role {
        Role::External => format!("{} (external)", cell(&side.label)),
        Role::Mirage | Role::Baseline => cell(&side.label),
    }));
    if let Some(headline) = headline {
        head.push(format!("speedup against {}", cell(&headline.label)));
    }
    let roofline = results
        .points
        .iter()
        .flat_map(|point| &point.sides)
        .any(|side| side.roofline.is_some());
    if roofline {
        head.push("mirage, share of roofline".to_owned());
    }
    row(&mut out, &head);
    let mut rule = vec!["--:"; head.len()];
    rule[0] = "---";
    row(
        &mut out,
        &rule
            .iter()
            .map(|rule| (*rule).to_owned())
            .collect::<Vec<_>>(),
    );
    for point in &results.points {
        let mut cells = vec![point.context_depth.map_or_else(
            || point.batch.to_string(),
            |depth| format!("{} at {depth}", point.batch),
        )];
        if let Some(reason) = &point.refused {
            cells.push(format!("not measured: {}", cell(reason)));
            cells.resize(head.len(), String::new());
            row(&mut out, &cells);
            continue;
        }
        cells.extend(measured.iter().map(|side| {
            point.side(&side.key).map_or_else(String::new, |numbers| {
                format!(
                    "{:.2} ± {:.2}, {:.0}",
                    numbers.latency_ms.mean, numbers.latency_ms.std, numbers.throughput.mean
                )
            })
        }));
        if let Some(headline) = headline {
            cells.push(match (point.speedup(&headline.key), &point.withheld) {
                (Some(speedup), _) => {
                    let word = format::verdict_word(&speedup.latency);
                    format!("{} {word}", format::speedup(&speedup.latency))
                        .trim_end()
                        .to_owned()
                }
                (None, Some(_)) => "withheld".to_owned(),
                (None, None) => String::new(),
            });
        }
        if roofline {
            let mirage = results.sides.iter().find(|side| side.role == Role::Mirage);
            let line = mirage.and_then(|side| point.side(&side.key)?.roofline.as_ref());
            cells.push(line.map_or_else(String::new, |line| format::share(line.share)));
        }
        row(&mut out, &cells);
    }
    out
}

fn row(out: &mut String, cells: &[String]) {
    out.push_str("| ");
    out.push_str(&cells.join(" | "));
    out.push_str(" |\n");
}

/// Text that cannot end its cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
