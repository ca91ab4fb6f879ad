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
    /// Id of a prompt and the first side's greedy tokens for it.
    pub sample: Option<(String, Vec<u32>)>,
    /// What ended the run early, if anything did.
    pub failure: Option<RunError>,
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

impl Harness<'_> {
    /// Measures all points on all sides; the first side is the one that the others are compared with. Too little memory
    /// and Ctrl-C are no failures.
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
                match self.point(batch, depth, from, sides, observer, &mut measured) {
                    Ok(point) => {
                        observer.point_done(&point);
                        measured.points.push(point);
                    }
                    Err(failure) => {
                        measured.complete = false;
                        measured.failure = Some(failure);
                        break 'all;
                    }
                }
                from += batch * (self.schedule.warmup + self.schedule.iterations);
                for side in &mut *sides {
                    side.release();
                }
            }
        }
        measured
    }

    fn point(
        &self,
        batch: usize,
        depth: Option<usize>,
        from: usize,
        sides: &mut [Box<dyn Side + '_>],
        observer: &mut dyn Observer,
        measured: &mut Measured,
    ) -> Result<Point, RunError> {
        let schedule = self.schedule;
        let runs = (schedule.warmup + schedule.iterations) * sides.len();
        observer.point(batch, depth, runs);
        let mut point = Point {
            batch,
            context_depth: depth,
            refused: None,
            gate: None,
            sides: Vec::new(),
            speedups: Vec::new(),
            withheld: None,
        };
        let longest = depth.unwrap_or_else(|| self.workload.longest());
        let gate_needs = gate::LONGEST_PROMPT.min(self.workload.longest()) + gate::NEW_TOKENS;
        let context = (longest + schedule.answer.max_tokens)
            .max(gate_needs)
            .min(self.model.context);
        let shape = Shape { batch, context };
        let mut setups = Vec::new();
        for side in &mut *sides {
            observer.stage(&format!("preparing {}", side.facts().label));
            match side.prepare(shape) {
                Ok(setup) => setups.push(setup),
                Err(SideError::NoRoom(reason)) => {
                    point.refused = Some(format!(
                        "{}: {reason}; {NO_ROOM_ADVICE}",
                        side.facts().label
                    ));
                    return Ok(point);
                }
                Err(SideError::Interrupted) => {
                    measured.complete = false;
                    return Ok(point);
                }
                Err(SideError::Failed(cause)) => return Err(failed(side.as_ref(), cause)),
            }
        }

        observer.stage("checking that the sides agree");
        let gate_prompts = self.workload.gate_prompts(gate::LONGEST_PROMPT);
        match gate::check(sides, &gate_prompts, shape, &self.interrupt) {
            Ok(checked) => {
                if measured.sample.is_none() {
                    let first = gate_prompts.first().map(|prompt| prompt.id.clone());
                    measured.sample = first.zip(checked.tokens.into_iter().next());
                }
                if sides.len() > 1 {
                    point.gate = Some(checked.gate);
                }
            }
            Err(SideError::Interrupted) => {
                measured.complete = false;
                return Ok(point);
            }
            Err(SideError::NoRoom(reason)) => {
                point.refused = Some(format!("the correctness check: {reason}; {NO_ROOM_ADVICE}"));
                return Ok(point);
            }
            Err(SideError::Failed(cause)) => {
                return Err(RunError {
                    side: "the correctness check".to_owned(),
                    cause,
                });
            }
        }

        let mut series: Vec<Vec<Iteration>> = vec![Vec::new(); sides.len()];
        let mut gaps: Vec<Vec<f64>> = vec![Vec::new(); sides.len()];
        observer.stage("measuring");
        'iterations: for index in 0..schedule.warmup + schedule.iterations {
            let work = self
                .workload
                .batch(from + index * batch, batch, depth, &schedule.answer);
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
                    measured.complete = false;
                    break 'iterations;
                }
                let side = &mut sides[at];
                match side.generate(&work.work, &self.interrupt) {
                    Ok(generation) => {
                        let (row, gaps) =
                            derive::iteration(counted.unwrap_or(index), turn, &work, &generation);
                        observer.run(&side.facts(), counted.is_some(), &row);
                        done.push((at, row, gaps));
                    }
                    Err(SideError::Interrupted) => {
                        measured.complete = false;
                        break 'iterations;
                    }
                    Err(SideError::NoRoom(reason)) => {
                        point.refused = Some(format!(
                            "{}: {reason}; {NO_ROOM_ADVICE}",
                            side.facts().label
                        ));
                        return Ok(point);
                    }
                    Err(SideError::Failed(cause)) => return Err(failed(side.as_ref(), cause)),
                }
            }
            // Only iterations that all sides finished are kept, so that a partial result is still a fair one.
            if counted.is_some() {
                for (at, row, more) in done {
                    series[at].push(row);
                    gaps[at].extend(more);
                }
            }
        }

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
            .zip(series.into_iter().zip(gaps))
        {
            let facts = side.facts();
            let Some(mut numbers) =
                derive::side_point(&facts.key, setup, rows, &gaps, ceiling, &category)
            else {
                continue;
            };
            numbers.matrix_products = match side.matrix_products() {
                Ok(products) => products,
                Err(error) => return Err(failed(side.as_ref(), anyhow::Error::new(error))),
            };
            point.sides.push(numbers);
        }
        compare(&mut point, sides);
        Ok(point)
    }
}

fn failed(side: &dyn Side, cause: anyhow::Error) -> RunError {
    RunError {
        side: side.facts().label,
        cause,
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
