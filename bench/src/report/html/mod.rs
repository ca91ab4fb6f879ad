//! The report as one HTML page: no script, no request, readable on a phone, on paper, and without colour.

mod builder;
mod charts;

use super::format;
use super::svg::{self, escape};
use crate::category;
use crate::results::{OnlyQuoted, Point, Results, Role, SideFacts};
use crate::stats::Summary;
use builder::Html;
use charts::charts;

const STYLE: &str = include_str!("page.css");

/// The page.
pub fn page(results: &Results) -> String {
    let mut out = Html(String::new());
    let title = format!(
        "mirage benchmark: {} on {}",
        results.model.name, results.device.name
    );
    // The policy makes any request impossible, whatever the texts say.
    out.push(format_args!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>{}</title><style>{STYLE}</style></head><body>\n{}<main>\n",
        escape(&title),
        svg::definitions()
    ));
    head(&mut out, results);
    out.push(format_args!("<h2>Charts</h2>\n<div class=\"grid\">\n"));
    charts(&mut out, results);
    out.push(format_args!("</div>\n"));
    points(&mut out, results);
    categories(&mut out, results);
    about(&mut out, results);
    out.push(format_args!("</main></body></html>\n"));
    out.0
}

fn head(out: &mut Html, results: &Results) {
    out.push(format_args!("<h1>MIRAGE performance benchmark</h1>\n"));
    out.push(format_args!(
        "<p class=\"verdict\">{}</p>\n",
        escape(&format::verdict(results))
    ));
    if let Some(reason) = format::partial(results) {
        out.push(format_args!(
            "<p class=\"warn\">Partial: {}; below is what had been measured until then.</p>\n",
            escape(&reason)
        ));
    }
    for line in format::crossover(results)
        .iter()
        .chain(&results.device.warnings)
    {
        out.push(format_args!("<p class=\"warn\">{}</p>\n", escape(line)));
    }
    let configuration = &results.configuration;
    out.push(format_args!(
        "<p class=\"soft\">{} on {} · {} · {} new tokens, temperature {}, top-p {}, {} iterations after {} of warm-up, seed {}</p>\n",
        escape(&results.model.name), escape(&results.device.name), escape(&results.generated),
        configuration.max_tokens, configuration.temperature, configuration.top_p,
        configuration.num_iterations, configuration.num_warmup, configuration.seed
    ));
    for note in &results.notes {
        out.push(format_args!("<p>{}</p>\n", escape(note)));
    }
    if let Some(sample) = &results.sample {
        out.push(format_args!(
            "<h3>A text on the way, greedy</h3>\n<blockquote><span class=\"soft\">{}</span><strong>{}</strong></blockquote>\n",
            escape(&sample.prompt), escape(&sample.text)
        ));
    }
}

fn side_name(side: &SideFacts) -> String {
    match side.role {
        Role::External => format!("{} (external)", side.label),
        Role::Mirage | Role::Baseline => side.label.clone(),
    }
}

fn points(out: &mut Html, results: &Results) {
    out.push(format_args!("<h2>Results by batch size</h2>\n"));
    for point in &results.points {
        out.push(format_args!(
            "<h3>Batch size: {}</h3>\n",
            escape(&format::point_name(point))
        ));
        if let Some(reason) = &point.refused {
            out.push(format_args!(
                "<p class=\"warn\">Not measured: {}</p>\n",
                escape(reason)
            ));
            continue;
        }
        let comparisons = point.gate.iter().flat_map(|gate| {
            let with_tested = |comparison| (gate.tested.as_str(), comparison);
            gate.comparisons.iter().map(with_tested)
        });
        for (tested, comparison) in comparisons {
            out.push(format_args!(
                "<p class=\"{}\">Correctness: {} and {} {}: {} of {} greedy texts identical, logits differ by {:.2} % of their spread (worst row {:.2} %).</p>\n",
                if comparison.passed { "soft" } else { "warn" },
                escape(results.label(tested)), escape(results.label(&comparison.side)),
                if comparison.passed { "agree" } else { "do not agree" },
                comparison.identical, comparison.sequences, comparison.logit_error * 100.0, comparison.worst_row_error * 100.0
            ));
        }
        if let Some(reason) = &point.withheld {
            out.push(format_args!(
                "<p class=\"warn\">No speedup is given: {}</p>\n",
                escape(reason)
            ));
        }
        for OnlyQuoted { side, reason } in &point.only_quoted {
            out.push(format_args!(
                "<p class=\"warn\">No speedup against {} (external) is given: {}</p>\n",
                escape(results.label(side)),
                escape(reason)
            ));
        }
        point_table(out, results, point);
        products(out, results, point);
    }
}

fn point_table(out: &mut Html, results: &Results, point: &Point) {
    let head = [
        "",
        "latency ms",
        "min",
        "median",
        "max",
        "tokens/s",
        "device ms",
        "TTFT ms",
        "TPOT ms p50",
        "p99",
        "ITL ms p99",
        "roofline",
        "mirage's speedup",
    ];
    let mut rows = Vec::new();
    for side in &results.sides {
        let Some(numbers) = point.side(&side.key) else {
            continue;
        };
        let some = |summary: &Option<Summary>, of: &dyn Fn(&Summary) -> f64, digits: usize| {
            summary.as_ref().map_or("–".to_owned(), |summary| {
                format!("{:.digits$}", of(summary))
            })
        };
        let latency = &numbers.latency_ms;
        let speedup = point.speedup(&side.key).map_or("–".to_owned(), |speedup| {
            format!(
                "{} {}",
                format::speedup(&speedup.latency),
                format::verdict_word(&speedup.latency)
            )
            .trim()
            .to_owned()
        });
        rows.push(vec![
            side_name(side),
            format!("{:.2} ± {:.2}", latency.mean, latency.std),
            format!("{:.2}", latency.min),
            format!("{:.2}", latency.median),
            format!("{:.2}", latency.max),
            format!(
                "{:.1} ± {:.1}",
                numbers.throughput.mean, numbers.throughput.std
            ),
            some(&numbers.device_ms, &|s| s.mean, 2),
            some(&numbers.ttft_ms, &|s| s.mean, 2),
            some(&numbers.tpot_ms, &|s| s.median, 3),
            some(&numbers.tpot_ms, &|s| s.p99, 3),
            some(&numbers.itl_ms, &|s| s.p99, 3),
            numbers
                .roofline
                .as_ref()
                .map_or("–".to_owned(), |roofline| format::share(roofline.share)),
            speedup,
        ]);
    }
    out.table(&head, &rows);
}

fn products(out: &mut Html, results: &Results, point: &Point) {
    let with = point
        .sides
        .iter()
        .rev()
        .find(|side| !side.matrix_products.is_empty());
    let Some(numbers) = with else { return };
    let label = results
        .side(&numbers.side)
        .map_or(numbers.side.clone(), side_name);
    out.push(format_args!(
        "<details><summary>Matrix products of {}: bandwidth reached</summary>\n",
        escape(&label)
    ));
    let rows: Vec<Vec<String>> = numbers
        .matrix_products
        .iter()
        .map(|product| {
            vec![
                product.values.join(", "),
                format!("{} × {}", product.outputs, product.inputs),
                product.launches.to_string(),
                format!("{:.2}", product.time_us),
                format!("{:.0}", product.gb_s),
            ]
        })
        .collect();
    out.table(&["makes", "matrix", "a step", "µs", "GB/s"], &rows);
    out.push(format_args!("</details>\n"));
}

fn categories(out: &mut Html, results: &Results) {
    let table = category::table(results);
    if table.is_empty() {
        return;
    }
    out.push(format_args!("<h2>Results by category</h2>\n"));
    let rows: Vec<Vec<String>> = table
        .iter()
        .map(|row| {
            vec![
                row.category.clone(),
                row.sequences.to_string(),
                format!("{:.1}", row.prompt_tokens),
                format!("{:.2}", row.ttft_ms),
                row.latency_ms
                    .map_or("–".to_owned(), |time| format!("{time:.2}")),
                row.latency_ratio
                    .map_or("–".to_owned(), |ratio| format!("{ratio:.3}x")),
            ]
        })
        .collect();
    out.table(
        &[
            "category",
            "texts",
            "prompt tokens",
            "first token ms",
            "last token ms",
            "mirage's speedup",
        ],
        &rows,
    );
    out.push(format_args!("<p class=\"soft\">Means over all batch sizes; a text in a batch waits for the others of its batch.</p>\n"));
}

fn about(out: &mut Html, results: &Results) {
    let (device, model, prompts) = (&results.device, &results.model, &results.prompts);
    out.push(format_args!("<h2>What was run</h2>\n"));
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, text: String| rows.push(vec![name.to_owned(), text]);
    row("Device", device.name.clone());
    if let Some(driver) = &device.driver {
        row("Driver", driver.clone());
    }
    if let Some(bandwidth) = device.bandwidth_gb_s {
        row("Measured memory bandwidth", format!("{bandwidth:.0} GB/s"));
    }
    for (name, state) in [
        ("State after the first run", &device.before),
        ("State after the last run", &device.after),
    ] {
        if let Some(state) = state {
            row(name, format::device_state(state));
        }
    }
    row(
        "Host",
        format!(
            "{}, {} threads, {}",
            device.host_cpu, device.host_threads, device.os
        ),
    );
    row(
        "Model",
        format!(
            "{}, {} parameters, {} layers",
            model.name,
            format::count(model.parameters),
            model.layers
        ),
    );
    row("Weights", model.weights_hash.clone());
    row("Graph", model.graph_hash.clone());
    row(
        "Prompts",
        format!(
            "{}{}, {} of {} fit, {}",
            prompts.file,
            match prompts.categories.as_slice() {
                [] => String::new(),
                chosen => format!(", categories {}", chosen.join(", ")),
            },
            prompts.count - prompts.skipped.len(),
            prompts.count,
            prompts.hash
        ),
    );
    row(
        "Generator",
        format!(
            "{}, results of schema version {}",
            results.generator, results.schema_version
        ),
    );
    for side in &results.sides {
        row(&side_name(side), side.description.clone());
        for point in &results.points {
            let Some(setup) = point
                .side(&side.key)
                .map(|side| &side.setup)
                .filter(|_| side.role != Role::External)
            else {
                continue;
            };
            let compile = setup
                .compile_s
                .map_or(String::new(), |time| format!("compile {time:.2} s, "));
            let launches = setup
                .launches
                .as_ref()
                .map_or(String::new(), |launches| format!(", {launches}"));
            let cached = if setup.compile_cached {
                " (machine code from the cache)"
            } else {
                ""
            };
            row(
                &format!(
                    "… setup, batch {}",
                    format::point_name(point).to_lowercase()
                ),
                format!("{compile}load {:.2} s{launches}{cached}", setup.load_s),
            );
        }
    }
    for skipped in &prompts.skipped {
        row(
            &format!("Left out {}", skipped.prompt),
            skipped.reason.clone(),
        );
    }
    out.push(format_args!("<div class=\"wide\"><table><tbody>\n"));
    for cells in &rows {
        out.push(format_args!(
            "<tr><th scope=\"row\">{}</th><td class=\"text\">{}</td></tr>\n",
            escape(&cells[0]),
            escape(&cells[1])
        ));
    }
    out.push(format_args!("</tbody></table></div>\n"));
    out.push(format_args!(
        "<p class=\"soft\">TTFT: from the batch's start to a sequence's first token at the host. TPOT: last minus first token's time \
         over the tokens between, by sequence. ITL: each time between two successive tokens. All iterations are in the JSON file.</p>\n"
    ));
}
