//! Numbers as people read them, the same in every report.

use crate::derive::latency_change_percent;
use crate::results::{DeviceKind, DeviceState, Point, Results, Role};
use crate::stats::{Estimate, Side};

/// `1.196x`, and its interval where there is one: `1.196x [1.180, 1.210]`.
pub fn speedup(estimate: &Estimate) -> String {
    match estimate.interval {
        Some((low, high)) => format!("{:.3}x [{low:.3}, {high:.3}]", estimate.value),
        None => format!("{:.3}x", estimate.value),
    }
}

/// What the latency's fall or rise is called.
pub fn latency_change(speedup: &Estimate) -> String {
    let change = latency_change_percent(speedup);
    let word = if change <= 0.0 {
        "reduction"
    } else {
        "increase"
    };
    format!("{change:+.1}% latency {word}")
}

/// A word where the result is not plainly in mirage's favour.
pub fn verdict_word(estimate: &Estimate) -> &'static str {
    match estimate.against(1.0) {
        Side::Above => "",
        Side::Below => "SLOWER",
        Side::Undecided => "no difference shown",
    }
}

/// `Batch Size: 4`, with the depth where there is one.
pub fn point_name(point: &Point) -> String {
    match point.context_depth {
        Some(depth) => format!("{}, Context Depth: {depth}", point.batch),
        None => point.batch.to_string(),
    }
}

/// Why the results are partial; none where they are complete.
pub fn partial(results: &Results) -> Option<String> {
    let reason = results.ended_early.as_deref();
    (!results.complete).then(|| match reason {
        Some(reason) => one_line(reason, 200),
        None => "the run ended early".to_owned(),
    })
}

/// The last line of the report, and of the terminal: where the sides do not agree, first that.
pub fn verdict(results: &Results) -> String {
    let points = |of: &dyn Fn(&Point) -> bool| -> Option<String> {
        let names: Vec<String> = results
            .points
            .iter()
            .filter(|point| of(point))
            .map(in_a_sentence)
            .collect();
        (!names.is_empty()).then(|| names.join("; "))
    };
    let failed = |point: &Point| point.gate.as_ref().is_some_and(|gate| !gate.passed);
    let mut sentences = Vec::new();
    if let Some(points) = points(&failed) {
        sentences.push(format!("❌ The sides do not agree at {points}."));
    }
    sentences.push(speed(results));
    if let Some(points) = points(&|point| point.withheld.is_some() && !failed(point)) {
        sentences.push(format!("No speedup is given at {points}."));
    }
    if let Some(points) = points(&|point| point.refused.is_some()) {
        sentences.push(format!("Not measured at {points}."));
    }
    sentences.join(" ")
}

fn in_a_sentence(point: &Point) -> String {
    format!("batch {}", point_name(point).to_lowercase())
}

/// The verdict on time alone.
fn speed(results: &Results) -> String {
    let partial = partial(results).map_or(String::new(), |reason| {
        format!(" (partial results: {})", one_line(&reason, 60))
    });
    let Some(headline) = results.headline() else {
        return format!("No baseline was run, so there is nothing to compare with{partial}.");
    };
    if !results.sides.iter().any(|side| side.role == Role::Mirage) {
        return format!("Mirage was not run, so there is no speedup{partial}.");
    }
    let Some(row) = results
        .summary
        .iter()
        .find(|row| row.against == headline.key)
    else {
        let points = results.points.iter();
        let reason = points
            .filter_map(|point| point.withheld.as_ref().or(point.refused.as_ref()))
            .next();
        return match reason {
            Some(reason) => format!("❌ No speedup is given{partial}: {reason}."),
            None => format!("Nothing was measured on both sides{partial}."),
        };
    };
    if results.device.kind == DeviceKind::Cpu {
        let points = format!(
            "latency {} against the {}",
            speedup(&row.latency),
            headline.label
        );
        return format!(
            "Mirage's program ran on the CPU, {points}; this says nothing about a GPU{partial}."
        );
    }
    let against = match headline.key.as_str() {
        "b1" | "b0" => format!("baseline ({})", headline.label),
        _ => headline.label.clone(),
    };
    let factor = row.latency.value;
    match row.latency.against(1.0) {
        Side::Above => format!("✅ Mirage is {factor:.2}x faster than {against}!{partial}"),
        Side::Below => format!("⚠️ Mirage is SLOWER than {against}: {factor:.2}x{partial}."),
        Side::Undecided => {
            format!(
                "≈ No difference between mirage and {against} is shown: {}{partial}.",
                speedup(&row.latency)
            )
        }
    }
}

/// Where mirage stops or begins to be faster, in words; nothing where it is the same at every batch size.
pub fn crossover(results: &Results) -> Vec<String> {
    let Some(headline) = results.headline() else {
        return Vec::new();
    };
    let of = |side: Side| -> Vec<String> {
        let points = results.points.iter();
        points
            .filter(|point| {
                point
                    .speedup(&headline.key)
                    .is_some_and(|speedup| speedup.latency.against(1.0) == side)
            })
            .map(in_a_sentence)
            .collect()
    };
    let (faster, slower, open) = (of(Side::Above), of(Side::Below), of(Side::Undecided));
    let mut lines = Vec::new();
    if !slower.is_empty() {
        lines.push(format!(
            "SLOWER than {} at {}.",
            headline.label,
            slower.join("; ")
        ));
    }
    let decided = !faster.is_empty() || !slower.is_empty();
    if decided && !open.is_empty() {
        lines.push(format!(
            "No difference to {} is shown at {}.",
            headline.label,
            open.join("; ")
        ));
    }
    if !slower.is_empty() && !faster.is_empty() {
        lines.push(format!("Faster at {}.", faster.join("; ")));
    }
    lines
}

/// A GPU's state in one line.
pub fn device_state(state: &DeviceState) -> String {
    let mut parts = Vec::new();
    let mut add = |value: Option<f64>, what: &str| {
        if let Some(value) = value {
            parts.push(format!("{value:.0} {what}"));
        }
    };
    add(state.sm_clock_mhz, "MHz SM");
    add(state.memory_clock_mhz, "MHz memory");
    add(state.temperature_c, "°C");
    add(state.power_w, "W");
    add(state.utilization_percent, "% in use");
    if let Some(reasons) = &state.throttle_reasons {
        parts.push(format!("clock limits {reasons}"));
    }
    if parts.is_empty() {
        "not known".to_owned()
    } else {
        parts.join(", ")
    }
}

/// A count with thin groups: 1,191,772.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A share in percent, or why there is none.
pub fn share(share: Option<f64>) -> String {
    share.map_or_else(
        || "above 100 %: a measurement is wrong".to_owned(),
        |share| format!("{:.1} %", share * 100.0),
    )
}

/// Control characters made visible and a text cut to `longest` characters, for one line of a terminal.
pub fn one_line(text: &str, longest: usize) -> String {
    let visible: String = text
        .chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect();
    match visible.char_indices().nth(longest) {
        Some((end, _)) => format!("{}…", &visible[..end]),
        None => visible,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::results;

    #[test]
    fn numbers() {
        let estimate = Estimate {
            value: 1.25,
            interval: Some((1.2, 1.3)),
        };
        assert_eq!(speedup(&estimate), "1.250x [1.200, 1.300]");
        assert_eq!(latency_change(&estimate), "-20.0% latency reduction");
        assert_eq!(
            latency_change(&Estimate {
                value: 0.8,
                interval: None
            }),
            "+25.0% latency increase"
        );
        assert_eq!(count(1_191_772), "1,191,772");
        assert_eq!(count(12), "12");
        assert_eq!(share(Some(0.8)), "80.0 %");
        assert!(share(None).contains("wrong"));
    }

    #[test]
    fn the_verdict_names_every_point_without_a_speedup() {
        let check = |change: fn(&mut Results), expected: &str| {
            let mut results = results();
            change(&mut results);
            results.summary = crate::derive::summary(&results);
            let verdict = verdict(&results);
            assert!(
                verdict.starts_with(expected),
                "`{expected}` does not begin: {verdict}"
            );
            assert!(verdict.ends_with("Not measured at batch 4."), "{verdict}");
        };
        fn fail(point: &mut Point) {
            if let Some(gate) = &mut point.gate {
                gate.passed = false;
            }
            point.withheld = Some("the sides do not agree: x".to_owned());
            point.speedups.clear();
        }
        check(|_| {}, "✅ Mirage is 2.65x faster than baseline (b1)! Not");
        check(
            |results| fail(&mut results.points[1]),
            "❌ The sides do not agree at batch 2. ✅ Mirage is",
        );
        check(
            |results| results.points.iter_mut().take(2).for_each(fail),
            "❌ The sides do not agree at batch 1; batch 2. ❌ No speedup is given: the sides do not agree: x.",
        );
        check(
            |results| {
                results.points[0].withheld = Some("unequal".to_owned());
                results.points[0].speedups.clear();
            },
            "✅ Mirage is 2.80x faster than baseline (b1)! No speedup is given at batch 1.",
        );
        check(
            |results| {
                results.complete = false;
                results.ended_early = Some("b1: it broke".to_owned());
            },
            "✅ Mirage is 2.65x faster than baseline (b1)! (partial results: b1: it broke)",
        );
    }

    #[test]
    fn an_external_engine_is_never_the_verdict() {
        let mut results = results();
        results.sides.retain(|side| side.role != Role::Baseline);
        assert!(!results.summary.is_empty());
        assert!(verdict(&results).starts_with("No baseline was run"));
        results.sides.retain(|side| side.role == Role::External);
        assert!(verdict(&results).starts_with("No baseline was run"));
    }

    #[test]
    fn texts_stay_on_one_line() {
        assert_eq!(one_line("a\nb\u{7}", 9), "a b\u{fffd}");
        assert_eq!(one_line("äöü", 2), "äö…");
        assert_eq!(one_line("äöü", 3), "äöü");
    }
}
