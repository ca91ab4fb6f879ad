//! Charts as SVG text.
//!
//! Owns shapes only; what is shown comes in. Series are told apart by marker and dash or by hatching, and by a label beside
//! them, so that colour adds nothing that is needed. Colours are CSS classes of the page. Sizes are in user units of a
//! viewBox that the page scales.

use std::fmt::Write as _;

/// Width of every chart.
const WIDTH: f64 = 400.0;
/// Room at the left for the axis.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;

/// Height of a row of bars: its label and the bar.
const ROW: f64 = 40.0;
/// Longest label of a legend in two columns.
const SHORT_LABEL: usize = 20;

/// Kinds of marker, dash and hatching there are; series beyond repeat them.
const STYLES: usize = 5;

/// A line of a line chart.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub label: String,
    /// Which style: 0 is mirage's.
    pub style: usize,
    /// Value and spread (half the error bar's height) at each place of the x axis.
    pub values: Vec<Option<(f64, f64)>>,
}

/// A bar of a bar chart.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it is of, at the left.
    pub label: String,
    /// Which style.
    pub style: usize,
    /// Its length.
    pub value: f64,
    /// The value in words, behind the bar.
    pub text: String,
}

/// A value with its interval.
#[derive(Clone, Debug)]
pub struct Whisker {
    /// What it is of, at the left.
    pub label: String,
    /// The value.
    pub value: f64,
    /// Its interval.
    pub interval: Option<(f64, f64)>,
    /// The value in words, at the right.
    pub text: String,
}

/// A line of a waterfall: a total, or what changes from one total to the next.
#[derive(Clone, Debug)]
pub struct Fall {
    /// What it is.
    pub label: String,
    /// From and to; a total starts at 0.
    pub span: (f64, f64),
    /// The value in words.
    pub text: String,
    /// Whether it is a total.
    pub total: bool,
}

/// Text as XML character data and attribute value. Characters that XML has no place for become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' | '\r' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Lines over named places (batch sizes), from 0 up, with a legend above.
pub fn lines(title: &str, unit: &str, places: &[String], series: &[Series]) -> String {
    let short = |series: &Series| series.label.chars().count() <= SHORT_LABEL;
    let columns = if series.iter().all(short) { 2 } else { 1 };
    let legend_rows = series.len().div_ceil(columns);
    let top = 14.0 + 20.0 * legend_rows as f64;
    let (bottom, height) = (top + 210.0, top + 250.0);
    let highest = series.iter().flat_map(|series| {
        series
            .values
            .iter()
            .flatten()
            .map(|(value, spread)| value + spread)
    });
    let ticks = ticks(highest.fold(0.0, f64::max));
    let scale = ticks.last().copied().unwrap_or(1.0);
    let x = |place: usize| {
        LEFT + (WIDTH - LEFT - RIGHT) * (place as f64 + 0.5) / places.len().max(1) as f64
    };
    let y = |value: f64| bottom - (bottom - top - 8.0) * value / scale;
    let mut svg = Svg::new(title, height);
    for tick in &ticks {
        svg.line("grid", LEFT, y(*tick), WIDTH - RIGHT, y(*tick));
        svg.text("tick end", LEFT - 6.0, y(*tick) + 4.0, &short_number(*tick));
    }
    svg.text("tick", 2.0, top - 2.0, unit);
    for (place, name) in places.iter().enumerate() {
        svg.text("tick middle", x(place), bottom + 17.0, name);
    }
    svg.text(
        "tick middle",
        (LEFT + WIDTH - RIGHT) / 2.0,
        bottom + 34.0,
        "batch size",
    );
    for (index, series) in series.iter().enumerate() {
        let (column, row) = (index % columns, index / columns);
        let (left, at) = (10.0 + 195.0 * column as f64, 14.0 + 20.0 * row as f64);
        svg.styled_line(series.style, &[(left, at - 4.0), (left + 34.0, at - 4.0)]);
        svg.marker(series.style, left + 17.0, at - 4.0, "");
        svg.text("label", left + 41.0, at, &cut(&series.label, 44));
        let points: Vec<(usize, f64, f64)> = series
            .values
            .iter()
            .enumerate()
            .filter_map(|(place, value)| value.map(|(value, spread)| (place, value, spread)))
            .collect();
        for (place, value, spread) in &points {
            if *spread > 0.0 {
                svg.line(
                    "whisker",
                    x(*place),
                    y((value - spread).max(0.0)),
                    x(*place),
                    y(value + spread),
                );
            }
        }
        svg.styled_line(
            series.style,
            &points
                .iter()
                .map(|(place, value, _)| (x(*place), y(*value)))
                .collect::<Vec<_>>(),
        );
        for (place, value, spread) in &points {
            let name = places.get(*place).map_or("", String::as_str);
            let hint = format!(
                "{}, batch {name}: {value:.2} ± {spread:.2} {unit}",
                series.label
            );
            svg.marker(series.style, x(*place), y(*value), &hint);
        }
    }
    svg.finish()
}

/// Horizontal bars from 0 to `longest`, one under the other.
pub fn bars(title: &str, longest: f64, bars: &[Bar]) -> String {
    let mut svg = Svg::new(title, 12.0 + ROW * bars.len() as f64);
    for (row, bar) in bars.iter().enumerate() {
        let top = 6.0 + ROW * row as f64;
        svg.text("label", 4.0, top + 11.0, &cut(&bar.label, 58));
        let room = WIDTH - 84.0;
        svg.rect("track", 4.0, top + 16.0, room, 14.0);
        svg.rect(
            &format!("fill h{}", bar.style % STYLES),
            4.0,
            top + 16.0,
            room * (bar.value / longest).clamp(0.0, 1.0),
            14.0,
        );
        svg.text("value", 4.0 + room + 8.0, top + 28.0, &bar.text);
    }
    svg.finish()
}

/// Values with intervals on one axis, and a line at `reference`.
pub fn whiskers(title: &str, reference: f64, rows: &[Whisker]) -> String {
    let values = rows.iter().flat_map(|row| {
        let (low, high) = row.interval.unwrap_or((row.value, row.value));
        [low, high, row.value]
    });
    let (low, high) = values.fold((reference, reference), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let margin = (high - low).max(0.02 * reference) * 0.08;
    let (low, high) = (low - margin, high + margin);
    let height = 34.0 + ROW * rows.len() as f64;
    let (left, right) = (40.0, WIDTH - RIGHT);
    let x = |value: f64| left + (right - left) * (value - low) / (high - low);
    let mut svg = Svg::new(title, height);
    svg.line("reference", x(reference), 4.0, x(reference), height - 24.0);
    let below = format!("{reference:.0}x: as fast");
    let inside = x(reference).clamp(LEFT, WIDTH - LEFT);
    svg.text("tick middle", inside, height - 8.0, &below);
    // Beside the line that a label would cross, where there is more room.
    let (class, label_at) = match x(reference) < WIDTH / 2.0 {
        true => ("label", x(reference) + 8.0),
        false => ("label end", x(reference) - 8.0),
    };
    for (row, whisker) in rows.iter().enumerate() {
        let top = 6.0 + ROW * row as f64;
        let at = top + 24.0;
        let name = format!("{}: {}", whisker.label, whisker.text);
        svg.text(class, label_at, top + 11.0, &name);
        if let Some((low, high)) = whisker.interval {
            svg.line("whisker", x(low), at, x(high), at);
            svg.line("whisker", x(low), at - 5.0, x(low), at + 5.0);
            svg.line("whisker", x(high), at - 5.0, x(high), at + 5.0);
        }
        svg.marker(0, x(whisker.value), at, &name);
    }
    svg.finish()
}

/// Totals and the changes between them, one under the other.
pub fn waterfall(title: &str, falls: &[Fall]) -> String {
    let longest = falls
        .iter()
        .map(|fall| fall.span.0.max(fall.span.1))
        .fold(0.0, f64::max)
        .max(f64::MIN_POSITIVE);
    let mut svg = Svg::new(title, 12.0 + ROW * falls.len() as f64);
    let room = WIDTH - 92.0;
    for (row, fall) in falls.iter().enumerate() {
        let top = 6.0 + ROW * row as f64;
        svg.text("label", 4.0, top + 11.0, &cut(&fall.label, 58));
        let (from, to) = (
            fall.span.0.min(fall.span.1) / longest,
            fall.span.0.max(fall.span.1) / longest,
        );
        let class = if fall.total { "fill h0" } else { "fill h1" };
        svg.rect(
            class,
            4.0 + room * from,
            top + 16.0,
            (room * (to - from)).max(1.0),
            14.0,
        );
        svg.text("value", 4.0 + room + 8.0, top + 28.0, &fall.text);
    }
    svg.finish()
}

/// Definitions that all charts of a page share: the hatchings, by class `h0` to `h4`.
pub fn definitions() -> String {
    let mut out = String::from(
        r#"<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>"#,
    );
    let patterns = ["", "M0 8L8 0", "M0 0L8 8", "M0 4H8", "M4 0V8"];
    for (index, path) in patterns.iter().enumerate().skip(1) {
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            r#"<pattern id="hatch{index}" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" height="8" class="under{index}"/><path d="{path}" class="hatching"/></pattern>"#
        );
    }
    out.push_str("</defs></svg>");
    out
}

/// Round values from 0 to at least `highest`, four to eight of them.
fn ticks(highest: f64) -> Vec<f64> {
    if !highest.is_finite() || highest <= 0.0 {
        return vec![0.0, 1.0];
    }
    let magnitude = 10f64.powf((highest / 4.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|factor| factor * magnitude)
        .into_iter()
        .find(|step| highest / step <= 6.0);
    let step = step.unwrap_or(10.0 * magnitude);
    let count = (highest / step).ceil() as usize;
    (0..=count).map(|index| index as f64 * step).collect()
}

/// `12k` for 12000.
fn short_number(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e4 => format!("{}k", v / 1e3),
        // Steps such as 0.30000000000000004.
        v => format!("{}", (v * 1e6).round() / 1e6),
    }
}

fn cut(text: &str, longest: usize) -> String {
    super::format::one_line(text, longest)
}

/// An SVG under construction.
struct Svg(String);

impl Svg {
    fn new(title: &str, height: f64) -> Svg {
        let title = escape(title);
        Svg(format!(
            r#"<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}"><title>{title}</title>"#
        ))
    }

    fn push(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.0.write_fmt(arguments);
    }

    fn line(&mut self, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
        self.push(format_args!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        self.push(format_args!(r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#));
    }

    fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        self.push(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#,
            escape(text)
        ));
    }

    fn styled_line(&mut self, style: usize, points: &[(f64, f64)]) {
        let path: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        self.push(format_args!(
            r#"<polyline class="series s{}" points="{}"/>"#,
            style % STYLES,
            path.join(" ")
        ));
    }

    /// A disc, square, triangle, diamond or cross, with a hint for the pointer.
    fn marker(&mut self, style: usize, x: f64, y: f64, hint: &str) {
        let path = match style % STYLES {
            0 => format!("M{:.1} {y:.1}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z", x - 5.0),
            1 => format!("M{:.1} {:.1}h9v9h-9z", x - 4.5, y - 4.5),
            2 => format!("M{x:.1} {:.1}l5.5 10h-11z", y - 6.0),
            3 => format!("M{x:.1} {:.1}l6 6l-6 6l-6 -6z", y - 6.0),
            _ => format!("M{:.1} {:.1}l9 9m0 -9l-9 9", x - 4.5, y - 4.5),
        };
        let hint = if hint.is_empty() {
            String::new()
        } else {
            format!("<title>{}</title>", escape(hint))
        };
        self.push(format_args!(
            r#"<path class="marker m{}" d="{path}">{hint}</path>"#,
            style % STYLES
        ));
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_enough() {
        assert_eq!(ticks(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.9).last(), Some(&1.0));
        for highest in [1e-6, 0.37, 1.0, 7.3, 99.9, 12345.0] {
            let ticks = ticks(highest);
            assert!((4..=8).contains(&ticks.len()), "{highest}: {ticks:?}");
            assert!(
                ticks
                    .last()
                    .is_some_and(|last| *last >= highest * (1.0 - 1e-12)),
                "{highest}: {ticks:?}"
            );
        }
        assert_eq!(ticks(f64::NAN), [0.0, 1.0]);
    }

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(
            escape("<a href='x'>&\u{0}\"</a>"),
            "&lt;a href=&#39;x&#39;&gt;&amp;\u{fffd}&quot;&lt;/a&gt;"
        );
        let label = "<script>".to_owned();
        let series = Series {
            label: label.clone(),
            style: 0,
            values: vec![Some((1.0, 0.1)), None],
        };
        let chart = lines(&label, "ms", &[label.clone(), label.clone()], &[series]);
        assert!(!chart.contains("<script>"));
    }

    #[test]
    fn nothing_to_show_is_still_a_chart() {
        for chart in [
            lines("t", "ms", &[], &[]),
            bars("t", 1.0, &[]),
            whiskers("t", 1.0, &[]),
            waterfall("t", &[]),
        ] {
            assert!(
                chart.starts_with("<svg")
                    && chart.ends_with("</svg>")
                    && !chart.contains("NaN")
                    && !chart.contains("inf"),
                "{chart}"
            );
        }
    }
}
