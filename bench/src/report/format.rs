//! Numbers as people read them, the same in every report.

use crate::derive::latency_change_percent;
use crate::results::{DeviceKind, DeviceState, Point, Results};
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

/// The last line of the report, and of the terminal.
pub fn verdict(results: &Results) -> String {
    let interrupted = if results.complete {
        ""
    } else {
        " (interrupted: partial results)"
    };
    let Some(headline) = results.headline() else {
        return format!("No baseline was run, so there is nothing to compare with{interrupted}.");
    };
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
            Some(reason) => format!("❌ No speedup is given{interrupted}: {reason}."),
            None => format!("Nothing was measured on both sides{interrupted}."),
        };
    };
    if results.device.kind == DeviceKind::Cpu {
        let points = format!(
            "latency {} against the {}",
            speedup(&row.latency),
            headline.label
        );
        return format!(
            "Mirage's program ran on the CPU, {points}; this says nothing about a GPU{interrupted}."
        );
    }
    let against = match headline.key.as_str() {
        "b1" | "b0" => format!("baseline ({})", headline.label),
        _ => headline.label.clone(),
    };
    let factor = row.latency.value;
    match row.latency.against(1.0) {
        Side::Above => format!("✅ Mirage is {factor:.2}x faster than {against}!{interrupted}"),
        Side::Below => format!("⚠️ Mirage is SLOWER than {against}: {factor:.2}x{interrupted}."),
        Side::Undecided => {
            format!(
                "≈ No difference between mirage and {against} is shown: {}{interrupted}.",
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
            .map(|point| format!("batch {}", point_name(point).to_lowercase()))
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
    fn texts_stay_on_one_line() {
        assert_eq!(one_line("a\nb\u{7}", 9), "a b\u{fffd}");
        assert_eq!(one_line("äöü", 2), "äö…");
        assert_eq!(one_line("äöü", 3), "äöü");
    }
}
