//! The text report, in the layout of the project's benchmark guide.
//!
//! The guide's lines stand as it gives them; what it does not have (intervals, device, gate, TTFT, roofline) is added in
//! lines of its own.

use super::format;
use super::lines::{Text, WIDTH};
use crate::results::{Agreement, OnlyQuoted, Point, Results, Role, SideFacts, SidePoint, Skipped};
use crate::stats::Summary;

/// The whole report.
pub fn report(results: &Results) -> String {
    let mut out = Text(String::new());
    out.rule('=');
    out.line("MIRAGE PERFORMANCE BENCHMARK REPORT");
    out.rule('=');
    out.line("");
    // RFC 3339 holds date and time in its first 19 characters.
    let generated = results
        .generated
        .get(..19)
        .unwrap_or(&results.generated)
        .replacen('T', " ", 1);
    out.line(&format!("Generated: {generated}"));
    if let Some(reason) = format::partial(results) {
        out.line(&format!(
            "PARTIAL: {reason}; below is what had been measured until then."
        ));
    }
    out.line("");
    configuration(&mut out, results);
    out.section("DETAILED RESULTS BY BATCH SIZE");
    for point in &results.points {
        out.line("");
        point_block(&mut out, results, point);
    }
    out.line("");
    categories(&mut out, results);
    if !results.notes.is_empty() {
        out.section("NOTES");
        for note in &results.notes {
            out.wrapped("- ", note);
        }
        out.line("");
    }
    out.rule('=');
    out.line("SUMMARY");
    out.rule('=');
    out.line("");
    summary(&mut out, results);
    out.0
}

fn configuration(out: &mut Text, results: &Results) {
    let configuration = &results.configuration;
    out.section("CONFIGURATION");
    out.line(&format!("Model: {}", results.model.name));
    out.line(&format!("Max tokens: {}", configuration.max_tokens));
    out.line(&format!("Temperature: {}", configuration.temperature));
    out.line(&format!("Top-p: {}", configuration.top_p));
    out.line(&format!("Warmup iterations: {}", configuration.num_warmup));
    out.line(&format!(
        "Benchmark iterations: {}",
        configuration.num_iterations
    ));
    out.line(&format!("Seed: {}", configuration.seed));
    out.line(&format!(
        "Ignore end-of-text tokens: {}",
        if configuration.ignore_eos {
            "yes"
        } else {
            "no"
        }
    ));
    let prompts = &results.prompts;
    let used = prompts.count - prompts.skipped.len();
    out.line(&format!(
        "Prompts: {} ({used} of {} fit this model)",
        prompts.file, prompts.count
    ));
    if !prompts.categories.is_empty() {
        out.line(&format!("Categories: {}", prompts.categories.join(", ")));
    }
    for Skipped { prompt, reason } in &prompts.skipped {
        out.line(&format!("  left out {prompt}: {reason}"));
    }
    let device = &results.device;
    out.line(&format!("Device: {}", device.name));
    if let Some(driver) = &device.driver {
        out.line(&format!("Driver: {driver}"));
    }
    out.line(&format!(
        "Host: {}, {} threads, {}",
        device.host_cpu, device.host_threads, device.os
    ));
    if let Some(bandwidth) = device.bandwidth_gb_s {
        out.line(&format!("Measured memory bandwidth: {bandwidth:.0} GB/s"));
    }
    for (when, state) in [("first", &device.before), ("last", &device.after)] {
        if let Some(state) = state {
            out.line(&format!(
                "State after the {when} run: {}",
                format::device_state(state)
            ));
        }
    }
    for warning in &device.warnings {
        out.line(&format!("WARNING: {warning}"));
    }
    for side in &results.sides {
        let external = if side.role == Role::External {
            " (external: measured elsewhere, not checked)"
        } else {
            ""
        };
        out.wrapped(
            &format!("{}{external}: ", named(results, side)),
            &side.description,
        );
    }
    out.line(&format!(
        "Weights: {} parameters, hash {}",
        format::count(results.model.parameters),
        short(&results.model.weights_hash)
    ));
    out.line(&format!(
        "Graph hash: {}, prompts hash: {}",
        short(&results.model.graph_hash),
        short(&prompts.hash)
    ));
    out.line("");
}

fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// `Mirage`, `Baseline` for the headline's, and the label for every other side.
fn title(results: &Results, side: &SideFacts) -> String {
    let headline = results
        .headline()
        .is_some_and(|headline| headline.key == side.key);
    match side.role {
        Role::Mirage => "Mirage".to_owned(),
        Role::Baseline if headline => "Baseline".to_owned(),
        Role::Baseline | Role::External => side.label.clone(),
    }
}

/// The title, with the label where the title does not tell it.
fn named(results: &Results, side: &SideFacts) -> String {
    let title = title(results, side);
    match title == side.label {
        true => title,
        false => format!("{title} ({})", side.label),
    }
}

/// The point's sides: the headline's first, then mirage, then the rest.
fn ordered<'a>(results: &'a Results, point: &'a Point) -> Vec<(&'a SideFacts, &'a SidePoint)> {
    let headline = results.headline().map(|side| side.key.as_str());
    let rank = |side: &SideFacts| match side.role {
        _ if Some(side.key.as_str()) == headline => 0,
        Role::Mirage => 1,
        Role::Baseline | Role::External => 2,
    };
    let mut sides: Vec<_> = results
        .sides
        .iter()
        .filter_map(|side| Some((side, point.side(&side.key)?)))
        .collect();
    sides.sort_by_key(|(side, _)| rank(side));
    sides
}

fn point_block(out: &mut Text, results: &Results, point: &Point) {
    out.line(&format!("Batch Size: {}", format::point_name(point)));
    out.line(&format!("  {}", "-".repeat(WIDTH)));
    if let Some(reason) = &point.refused {
        out.line(&format!("  Not measured: {reason}"));
        return;
    }
    if let Some(gate) = &point.gate {
        for comparison in &gate.comparisons {
            agreement(out, results, &gate.tested, comparison);
        }
    }
    let sides = ordered(results, point);
    if sides.is_empty() {
        out.line("  Nothing was measured.");
        return;
    }
    let label = |side: &SideFacts| format!("{}:", title(results, side));
    let width = sides
        .iter()
        .map(|(side, _)| label(side).len())
        .max()
        .unwrap_or(0)
        .max(11);
    let headline = results.headline().and_then(|side| point.speedup(&side.key));

    let numbers = |out: &mut Text, of: &dyn Fn(&SidePoint) -> Option<Summary>| {
        for (side, numbers) in &sides {
            if let Some(summary) = of(numbers) {
                let label = label(side);
                out.line(&format!("    {label:<width$} {}", full(&summary)));
            }
        }
    };
    out.line("  LATENCY (ms):");
    numbers(out, &|side| Some(side.latency_ms.clone()));
    if let Some(speedup) = headline {
        let word = format::verdict_word(&speedup.latency);
        let word = if word.is_empty() {
            String::new()
        } else {
            format!("  {word}")
        };
        let change = format::latency_change(&speedup.latency);
        out.line(&format!(
            "    {:<width$} {:.3}x  ({change}){word}",
            "Speedup:", speedup.latency.value
        ));
        out.interval(width, &speedup.latency);
    }
    out.line("  THROUGHPUT (tokens/s):");
    for (side, numbers) in &sides {
        let (label, summary) = (label(side), &numbers.throughput);
        out.line(&format!(
            "    {label:<width$} {:>8.2} ± {:>5.2}",
            summary.mean, summary.std
        ));
    }
    if let Some(speedup) = headline {
        out.line(&format!(
            "    {:<width$} {:.3}x",
            "Speedup:", speedup.throughput.value
        ));
        out.interval(width, &speedup.throughput);
    }
    if let Some(reason) = &point.withheld {
        out.line(&format!("  NO SPEEDUP IS GIVEN: {reason}"));
    }
    for OnlyQuoted { side, reason } in &point.only_quoted {
        let label = results.label(side);
        out.line(&format!(
            "  NO SPEEDUP AGAINST {label} (external) IS GIVEN: {reason}"
        ));
    }
    let has = |of: &dyn Fn(&SidePoint) -> bool| sides.iter().any(|(_, numbers)| of(numbers));
    if has(&|side| side.device_ms.is_some()) {
        out.line("  DEVICE TIME (ms):");
        numbers(out, &|side| side.device_ms.clone());
        if let Some(device) = headline.and_then(|speedup| speedup.device.as_ref()) {
            out.line(&format!("    {:<width$} {:.3}x", "Speedup:", device.value));
            out.interval(width, device);
        }
    }
    for (name, of) in [
        (
            "TIME TO FIRST TOKEN (ms)",
            (|side| side.ttft_ms.clone()) as fn(&SidePoint) -> Option<Summary>,
        ),
        ("TIME PER OUTPUT TOKEN (ms)", |side| side.tpot_ms.clone()),
        ("INTER-TOKEN LATENCY (ms)", |side| side.itl_ms.clone()),
    ] {
        if has(&|side| of(side).is_some()) {
            out.line(&format!("  {name}:"));
            for (side, numbers) in &sides {
                if let Some(summary) = of(numbers) {
                    let label = label(side);
                    out.line(&format!("    {label:<width$} {}", tail(&summary)));
                }
            }
        }
    }
    if has(&|side| side.throughput_per_user.is_some()) {
        out.line("  THROUGHPUT PER USER (tokens/s):");
        for (side, numbers) in &sides {
            if let Some(summary) = &numbers.throughput_per_user {
                let label = label(side);
                out.line(&format!(
                    "    {label:<width$} {:>8.2} ± {:>5.2}",
                    summary.mean, summary.std
                ));
            }
        }
    }
    if has(&|side| side.roofline.is_some()) {
        out.line("  SHARE OF THE ROOFLINE (one decode step):");
        for (side, numbers) in &sides {
            if let Some(roofline) = &numbers.roofline {
                let label = label(side);
                out.line(&format!(
                    "    {label:<width$} {}  ({:.1} µs of {:.1} µs, {:.2} MB at the measured bandwidth; {} clock)",
                    format::share(roofline.share), roofline.floor_us, roofline.step_us, roofline.step_bytes / 1e6, roofline.clock
                ));
            }
        }
    }
    products(out, &sides);
    ladder(out, results, point);
    out.line("  SETUP (not in any number above):");
    for (side, numbers) in &sides {
        if side.role == Role::External {
            continue;
        }
        let setup = &numbers.setup;
        let mut parts = Vec::new();
        if let Some(compile) = setup.compile_s {
            let cached = if setup.compile_cached {
                ", machine code from the cache"
            } else {
                ""
            };
            parts.push(format!("compile {compile:.2} s{cached}"));
        }
        parts.push(format!("load {:.2} s", setup.load_s));
        parts.extend(setup.launches.clone());
        if let Some(predicted) = setup.predicted_step_us {
            parts.push(format!("planner predicted {predicted:.0} µs a step"));
        }
        let label = label(side);
        out.line(&format!("    {label:<width$} {}", parts.join(", ")));
    }
}

fn agreement(out: &mut Text, results: &Results, tested: &str, comparison: &Agreement) {
    let (tested, label) = (results.label(tested), results.label(&comparison.side));
    let verdict = if comparison.passed {
        "agree"
    } else {
        "DO NOT AGREE"
    };
    out.line(&format!(
        "  Correctness: {tested} and {label} {verdict}: {} of {} greedy texts identical, {} tokens; logits differ by {:.2} % of their spread (worst row {:.2} %)",
        comparison.identical, comparison.sequences, comparison.tokens,
        comparison.logit_error * 100.0, comparison.worst_row_error * 100.0
    ));
    for failure in comparison.failures.iter().take(3) {
        out.line(&format!("    {failure}"));
    }
}

fn products(out: &mut Text, sides: &[(&SideFacts, &SidePoint)]) {
    let Some((side, numbers)) = sides
        .iter()
        .find(|(_, numbers)| !numbers.matrix_products.is_empty())
    else {
        return;
    };
    out.line(&format!(
        "  MATRIX PRODUCTS OF {} (achieved bandwidth):",
        side.label
    ));
    for product in &numbers.matrix_products {
        out.line(&format!(
            "    {:<30} {:>6} x {:<6} {:>4} a step {:>9.2} µs {:>8.0} GB/s",
            format::one_line(&product.values.join(", "), 29),
            product.outputs,
            product.inputs,
            product.launches,
            product.time_us,
            product.gb_s
        ));
    }
}

fn ladder(out: &mut Text, results: &Results, point: &Point) {
    let steps = crate::ladder::of(results, point);
    if steps.len() < 2 {
        return;
    }
    out.line("  FROM THE FIRST BASELINE TO MIRAGE (µs per decode step):");
    for step in steps {
        out.line(&format!("    {:>10.1}  {}", step.microseconds, step.what));
    }
}

fn categories(out: &mut Text, results: &Results) {
    let rows = crate::category::table(results);
    if rows.is_empty() {
        return;
    }
    out.section("RESULTS BY CATEGORY (means over all batch sizes)");
    for row in rows {
        let ratio = row
            .latency_ratio
            .map_or(String::new(), |ratio| format!("{ratio:>8.3}x"));
        let last = row
            .latency_ms
            .map_or("–".to_owned(), |time| format!("{time:.2}"));
        out.line(&format!(
            "  {:<16} {:>4} texts, {:>6.1} prompt tokens, {:>10} ms to the last token, {:>9.2} ms to the first{ratio}",
            row.category, row.sequences, row.prompt_tokens, last, row.ttft_ms
        ));
    }
    out.line("");
}

fn summary(out: &mut Text, results: &Results) {
    let headline = results.headline().map(|side| side.key.as_str());
    let rows = || results.summary.iter();
    if let Some(row) = rows().find(|row| Some(row.against.as_str()) == headline) {
        out.line(&format!(
            "Average Latency Speedup:    {:.3}x",
            row.latency.value
        ));
        out.line(&format!(
            "Average Throughput Speedup: {:.3}x",
            row.throughput.value
        ));
        if let Some(device) = &row.device {
            out.line(&format!("Average Device Speedup:     {:.3}x", device.value));
        }
        let interval = row.latency.interval.map_or_else(
            || "no interval: it needs two iterations".to_owned(),
            |(low, high)| format!("95 % interval of the latency's: {low:.3} to {high:.3}"),
        );
        out.line(&format!(
            "(geometric mean of {} batch sizes; {interval})",
            row.points
        ));
        out.line("");
    }
    for row in rows().filter(|row| Some(row.against.as_str()) != headline) {
        let external = results
            .side(&row.against)
            .is_some_and(|side| side.role == Role::External);
        let marked = if external {
            " (external, not checked)"
        } else {
            ""
        };
        out.line(&format!(
            "Against {}{marked}: latency {}",
            results.label(&row.against),
            format::speedup(&row.latency)
        ));
    }
    for line in format::crossover(results) {
        out.line(&line);
    }
    if let Some(sample) = &results.sample {
        out.wrapped(
            "Sample: ",
            &format::one_line(&format!("{} ⟶ {}", sample.prompt, sample.text), 400),
        );
        out.line("");
    }
    out.line(&format::verdict(results));
}

/// `150.23 ±  5.12  (min:   143.45, max:   158.32, median:   149.87)`, as the guide prints it.
fn full(summary: &Summary) -> String {
    format!(
        "{:>8.2} ± {:>5.2}  (min: {:>8.2}, max: {:>8.2}, median: {:>8.2})",
        summary.mean, summary.std, summary.min, summary.max, summary.median
    )
}

/// A distribution's mean and tail.
fn tail(summary: &Summary) -> String {
    format!(
        "{:>8.3}  (p50: {:>8.3}, p90: {:>8.3}, p95: {:>8.3}, p99: {:>8.3})",
        summary.mean, summary.median, summary.p90, summary.p95, summary.p99
    )
}
