//! The waterfall: what each rung of the ladder of baselines saves, and what is left to the floor.
//!
//! Owns the rungs' order and the words for their differences. Times are those of the rooflines: mean decode steps.

use crate::results::{Point, Results, Role};

/// One line of the waterfall.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// A rung's time, or a difference (negative: saved), in microseconds.
    pub microseconds: f64,
    /// What it is.
    pub what: String,
    /// Whether it is a rung and not a difference.
    pub rung: bool,
}

/// Keys of the baselines from the plainest, and what the rung after it no longer pays.
const RUNGS: [(&str, &str); 3] = [
    ("b0", "launch overhead: the same in a CUDA graph"),
    ("b1", "memory round trips: fused phases"),
    ("b2", "persistence and overlap: one streaming kernel"),
];

/// The waterfall of a point, from its plainest baseline to mirage and the floor; empty without both.
pub fn of(results: &Results, point: &Point) -> Vec<Step> {
    let time = |key: &str| Some(point.side(key)?.roofline.as_ref()?.step_us);
    let label = |key: &str| {
        results
            .side(key)
            .map_or(key, |side| side.label.as_str())
            .to_owned()
    };
    let Some(mirage) = results.sides.iter().find(|side| side.role == Role::Mirage) else {
        return Vec::new();
    };
    let Some(last) = point
        .side(&mirage.key)
        .and_then(|side| side.roofline.as_ref())
    else {
        return Vec::new();
    };
    let mut steps = Vec::new();
    let mut before: Option<(f64, Vec<&str>)> = None;
    let rungs = RUNGS
        .iter()
        .filter_map(|(key, saves)| Some((time(key)?, label(key), *saves)));
    let mut all: Vec<(f64, String, &str)> = rungs.collect();
    if all.is_empty() {
        return Vec::new();
    }
    all.push((last.step_us, mirage.label.clone(), ""));
    // A rung that was not measured leaves its saving in the next difference.
    let present: Vec<&str> = RUNGS
        .iter()
        .map(|(key, _)| *key)
        .filter(|key| time(key).is_some())
        .collect();
    for (rung, (microseconds, name, _)) in all.iter().enumerate() {
        if let Some((earlier, reasons)) = before.take() {
            steps.push(Step {
                microseconds: microseconds - earlier,
                what: reasons.join("; "),
                rung: false,
            });
        }
        steps.push(Step {
            microseconds: *microseconds,
            what: name.clone(),
            rung: true,
        });
        if let Some(key) = present.get(rung) {
            let next = present.get(rung + 1).copied();
            let from = RUNGS.iter().skip_while(|(name, _)| name != key);
            let reasons = from
                .take_while(|(name, _)| Some(*name) != next)
                .map(|(_, saves)| *saves)
                .collect();
            before = Some((*microseconds, reasons));
        }
    }
    steps.push(Step {
        microseconds: last.floor_us - last.step_us,
        what: "left to the floor".to_owned(),
        rung: false,
    });
    steps.push(Step {
        microseconds: last.floor_us,
        what: "floor: bytes over measured bandwidth".to_owned(),
        rung: true,
    });
    steps
}
