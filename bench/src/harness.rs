//! The measurement: which side runs when, on what, and what is kept.
//!
//! Owns the order of a run. For every batch size (and context depth) all sides are made ready, checked against each other
//! ([`gate`]), warmed up, and then measured in turns: iteration 0 in the order A B, iteration 1 in the order B A, and so on
//! (ABBA), so that a clock that drifts meets all sides alike. Equal iterations are equal token ids. It must not know an
//! executor, a clock, a file or a terminal.

use crate::derive::{self, Ceiling};
use crate::gate;
use crate::results::{Gate, Iteration, ModelFacts, Point, Role, SideFacts, SidePoint};
use crate::side::{Interrupt, Shape, Side, SideError};
use crate::workload::{Answer, Workload};

/// What to do when memory does not suffice: the guide's advice.
pub const NO_ROOM_ADVICE: &str = "use smaller --batch-sizes (for example 1 2 4), a smaller --max-tokens, or one side at a time \
    (--skip-baseline)";

/// The run's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Sequences at once.
    pub batch_sizes: Vec<usize>,
    /// Depths; `None` for the prompts as they are.
    pub depths: Vec<Option<usize>>,
    /// Iterations that are not counted.
    pub warmup: usize,
    /// Iterations that are.
    pub iterations: usize,
    /// How each prompt is continued.
    pub answer: Answer,
}

/// Hears how a run goes on.
pub trait Observer {
    /// A point begins; `runs` batches will be generated for it.
    fn point(&mut self, _batch: usize, _depth: Option<usize>, _runs: usize) {}
    /// Something that takes a while begins.
    fn stage(&mut self, _text: &str) {}
    /// A batch was generated.
    fn run(&mut self, _side: &SideFacts, _counted: bool, _iteration: &Iteration) {}
    /// A point is done.
    fn point_done(&mut self, _point: &Point) {}
}

/// An observer that does not listen.
pub struct Silent;
impl Observer for Silent {}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Measured {
    /// The points, in order.
    pub points: Vec<Point>,
    /// Whether all were measured in full.
    pub complete: bool,
    /// Id of a prompt and the first side's greedy tokens for it. The id is no prompt's where only its beginning was
    /// taken.
    pub sample: Option<(String, Vec<u32>)>,
    /// What ended the run early, if anything did.
    pub failure: Option<RunError>,
    /// What went wrong without ending it, in sentences.
    pub notes: Vec<String>,
}

/// The side that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("{side}: {cause:#}")]
pub struct RunError {
    /// Label of the side.
    pub side: String,
    /// What it said.
    pub cause: anyhow::Error,
}

/// What everything of a run needs.
pub struct Harness<'a> {
    /// The run's shape.
    pub schedule: &'a Schedule,
    /// Prompts.
    pub workload: &'a Workload,
    /// For rooflines.
    pub model: &'a ModelFacts,
    /// Measured bandwidth in GB/s, where there is one.
    pub bandwidth_gb_s: Option<f64>,
    /// Ctrl-C.
    pub interrupt: Interrupt,
}

/// What ends a point before its time.
enum Stop {
    /// Ctrl-C ends the run.
    Interrupted,
    /// There is no room, for this reason; the run goes on with the next point.
    Refused(String),
    /// A side's failure ends the run.
    Failed(RunError),
}

impl Stop {
    /// By what `who` said.
    fn of(who: &str, error: SideError) -> Stop {
        match error {
            SideError::Interrupted => Stop::Interrupted,
            SideError::NoRoom(reason) => {
                Stop::Refused(format!("{who}: {reason}; {NO_ROOM_ADVICE}"))
            }
            SideError::Failed(cause) => Stop::Failed(RunError {
                side: who.to_owned(),
                cause,
            }),
        }
    }
}

/// What the sides took in the counted iterations of a point: one entry for each side.
struct Taken {
    series: Vec<Vec<Iteration>>,
    /// Times between tokens.
    gaps: Vec<Vec<f64>>,
}

impl Harness<'_> {
    /// Measures all points on all sides; the first side is the one that the others are compared with. Too little memory
    /// and Ctrl-C are no failures. A point that ended early is there with what was measured of it, if anything was.
    pub fn run(&self, sides: &mut [Box<dyn Side + '_>], observer: &mut dyn Observer) -> Measured {
        let mut measured = Measured {
            complete: true,
            ..Measured::default()
        };
        let mut from = 0;
        'all: for &depth in &self.schedule.depths {
            for &batch in &self.schedule.batch_sizes {
                if self.interrupt.is_set() {
                    measured.complete = false;
                    break 'all;
                }
                let mut point = Point {
                    batch,
                    context_depth: depth,
                    refused: None,
                    gate: None,
                    sides: Vec::new(),
                    speedups: Vec::new(),
                    withheld: None,
                    only_quoted: Vec::new(),
                };
                let end = self.point(&mut point, from, sides, observer, &mut measured);
                let whole = match end {
                    Ok(()) => true,
                    Err(Stop::Refused(reason)) => {
                        point.refused = Some(reason);
                        true
                    }
                    Err(Stop::Interrupted) => false,
                    Err(Stop::Failed(failure)) => {
                        measured.failure = Some(failure);
                        false
                    }
                };
                let disagrees = point.gate.as_ref().is_some_and(|gate| !gate.passed);
                if whole || disagrees || !point.sides.is_empty() {
                    observer.point_done(&point);
                    measured.points.push(point);
                }
                if !whole {
                    measured.complete = false;
                    break 'all;
                }
                from += batch * (self.schedule.warmup + self.schedule.iterations);
                for side in &mut *sides {
                    side.release();
                }
            }
        }
        measured
    }

    /// Fills in a point. Where it stops early, what it had until then is there.
    fn point(
        &self,
        point: &mut Point,
        from: usize,
        sides: &mut [Box<dyn Side + '_>],
        observer: &mut dyn Observer,
        measured: &mut Measured,
    ) -> Result<(), Stop> {
        let (schedule, batch, depth) = (self.schedule, point.batch, point.context_depth);
        let runs = (schedule.warmup + schedule.iterations) * sides.len();
        observer.point(batch, depth, runs);
        let longest = depth.unwrap_or_else(|| self.workload.longest());
        let gate_needs = gate::LONGEST_PROMPT.min(self.workload.longest()) + gate::NEW_TOKENS;
        let context = (longest + schedule.answer.max_tokens)
            .max(gate_needs)
            .min(self.model.context);
        let shape = Shape { batch, context };
        let mut setups = Vec::new();
        for side in &mut *sides {
            let label = side.facts().label;
            observer.stage(&format!("preparing {label}"));
            setups.push(
                side.prepare(shape)
                    .map_err(|error| Stop::of(&label, error))?,
            );
        }

        observer.stage("checking that the sides agree");
        let longest = context
            .saturating_sub(gate::NEW_TOKENS)
            .clamp(1, gate::LONGEST_PROMPT);
        let gate_prompts = self.workload.gate_prompts(longest);
        let checked = gate::check(sides, &gate_prompts, shape, &self.interrupt)
            .map_err(|error| Stop::of("the correctness check", error))?;
        if measured.sample.is_none() {
            let first = gate_prompts.first().map(|prompt| prompt.id.clone());
            measured.sample = first.zip(checked.tokens.into_iter().next());
        }
        if sides.len() > 1 {
            point.gate = Some(checked.gate);
        }

        observer.stage("measuring");
        let mut taken = Taken {
            series: vec![Vec::new(); sides.len()],
            gaps: vec![Vec::new(); sides.len()],
        };
        let end = self.iterations(point, from, sides, observer, &mut taken);
        if let Err(Stop::Refused(_)) = end {
            return end;
        }
        derive::keep_common_times(&mut taken.series);

        let ceiling = self.bandwidth_gb_s.map(|bandwidth_gb_s| Ceiling {
            model: self.model,
            bandwidth_gb_s,
        });
        let category = |prompt: &str| {
            prompt
                .rsplit_once('/')
                .map_or(prompt, |(category, _)| category)
                .to_owned()
        };
        for ((side, setup), (rows, gaps)) in sides
            .iter_mut()
            .zip(setups)
            .zip(taken.series.into_iter().zip(taken.gaps))
        {
            let facts = side.facts();
            let Some(mut numbers) =
                derive::side_point(&facts.key, setup, rows, &gaps, ceiling, &category)
            else {
                continue;
            };
            // After a failure nothing more is asked of the sides.
            if end.is_ok() {
                match side.matrix_products() {
                    Ok(products) => numbers.matrix_products = products,
                    Err(error) => measured.notes.push(format!(
                        "The matrix products of {} at batch {batch} were not measured: {error}.",
                        facts.label
                    )),
                }
            }
            point.sides.push(numbers);
        }
        compare(point, sides);
        end
    }

    /// Warms up and measures. Only iterations that all sides finished are kept, so that a partial result is still a
    /// fair one.
    fn iterations(
        &self,
        point: &Point,
        from: usize,
        sides: &mut [Box<dyn Side + '_>],
        observer: &mut dyn Observer,
        taken: &mut Taken,
    ) -> Result<(), Stop> {
        let (schedule, batch) = (self.schedule, point.batch);
        for index in 0..schedule.warmup + schedule.iterations {
            let work = self.workload.batch(
                from + index * batch,
                batch,
                point.context_depth,
                &schedule.answer,
            );
            let counted = index.checked_sub(schedule.warmup);
            let mut done = Vec::new();
            for turn in 0..sides.len() {
                // Forth and back.
                let at = if index % 2 == 0 {
                    turn
                } else {
                    sides.len() - 1 - turn
                };
                if self.interrupt.is_set() {
                    return Err(Stop::Interrupted);
                }
                let side = &mut sides[at];
                let facts = side.facts();
                let generation = side
                    .generate(&work.work, &self.interrupt)
                    .map_err(|error| Stop::of(&facts.label, error))?;
                let (row, gaps) =
                    derive::iteration(counted.unwrap_or(index), turn, &work, &generation);
                observer.run(&facts, counted.is_some(), &row);
                done.push((at, row, gaps));
            }
            if counted.is_some() {
                for (at, row, more) in done {
                    taken.series[at].push(row);
                    taken.gaps[at].extend(more);
                }
            }
        }
        Ok(())
    }
}

/// Fills in the speedups, or why there are none.
fn compare(point: &mut Point, sides: &[Box<dyn Side + '_>]) {
    let tested = sides
        .first()
        .map(|side| side.facts())
        .filter(|facts| facts.role == Role::Mirage);
    let Some(ours) = tested.and_then(|facts| point.side(&facts.key).cloned()) else {
        return;
    };
    if let Some(gate) = point.gate.as_ref().filter(|gate| !gate.passed) {
        point.withheld = Some(format!("the sides do not agree: {}", first_failure(gate)));
        return;
    }
    point.withheld = derive::unequal_work(point);
    if point.withheld.is_none() {
        let others = point.sides.iter().filter(|other| other.side != ours.side);
        point.speedups = others
            .filter_map(|theirs: &SidePoint| derive::speedup(&ours, theirs))
            .collect();
    }
}

fn first_failure(gate: &Gate) -> String {
    let failures: Vec<&String> = gate
        .comparisons
        .iter()
        .flat_map(|comparison| &comparison.failures)
        .collect();
    match failures.as_slice() {
        [] => "no reason was given".to_owned(),
        [only] => (*only).clone(),
        [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
