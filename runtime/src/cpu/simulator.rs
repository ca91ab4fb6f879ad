//! The simulator: runs a program on the CPU with every CTA at its own pace and memory that is weak, to find what the CPU
//! executor cannot show: a word that is overwritten too early, a wait that is missing, a deadlock.
//!
//! The phases are the CPU executor's own (`step.rs`); a CTA is a future that stops where it waits for a word, between
//! phases, and now and then in between. A scheduler (`schedule.rs`) decides who goes on and which writes arrive, all from one
//! seed, so that what a seed has shown it shows again. What is computed must be what the CPU executor computes, to the bit.
//!
//! It simulates words, flags, fences and the barrier, not a CTA's warps: inside a CTA only the runs of a reduce-scatter change
//! their order. A write that has arrived is there for all.

mod failure;
mod generation;
mod rows;
mod schedule;
#[cfg(test)]
mod tests;
mod world;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use mirage_compiler::program::Program;

use self::failure::buffer_of;
use self::generation::{Made, Place, Protocol, Task, Walk};
use self::schedule::{Chooser, Random};
use self::world::World;
use super::area::PhaseFault;
use super::run::column_of;
use super::sequences::Sequences;
use super::step::describe;
use super::{CpuModel, LoadError};
use crate::checkpoint::Checkpoint;
use crate::generate::{
    CancelHandle, Event, Executor, GenerateError, GenerateRequest, Limits, Widths, prefill_steps,
};

pub use self::failure::{Failure, Stuck};
pub use self::schedule::{Delivery, Order, Schedule};

/// What a generation has made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Tokens of each sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Logits of the sequences that went on, `[steps][sequences][vocab]`; empty for the others.
    pub logits: Vec<Vec<Vec<f32>>>,
}

/// A generation in one interleaving.
#[derive(Clone, Debug)]
pub struct Interleaving {
    /// What it has made.
    pub outcome: Outcome,
    /// How often a CTA was let go on.
    pub turns: u64,
    /// Writes that were delivered.
    pub writes: u64,
}

/// A program with its weights, ready to be simulated.
pub struct Simulator {
    model: CpuModel,
    protocol: Protocol,
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<Made, PhaseFault>> + 'a>>;

impl Simulator {
    /// Packs the weights of a checkpoint for a program and takes both.
    ///
    /// # Errors
    /// Tensors that are missing or misshapen.
    pub fn load(program: Program, checkpoint: &Checkpoint) -> Result<Simulator, LoadError> {
        Ok(Simulator {
            model: CpuModel::load(program, checkpoint)?,
            protocol: Protocol::default(),
        })
    }

    /// What the CPU executor makes of a batch.
    ///
    /// # Errors
    /// Those of [`Executor::generate`].
    pub fn lockstep(&mut self, batch: &[GenerateRequest]) -> Result<Outcome, GenerateError> {
        let mut outcome = Outcome {
            tokens: vec![Vec::new(); batch.len()],
            logits: Vec::new(),
        };
        self.model.limits().check(batch)?;
        let logits = &mut outcome.logits;
        self.model.run_requests(
            batch,
            &CancelHandle::new(),
            &mut |event| {
                if let Event::Token {
                    sequence, token, ..
                } = event
                {
                    outcome.tokens[sequence].push(token);
                }
            },
            Some(&mut |of_step| logits.push(of_step)),
        )?;
        Ok(outcome)
    }

    /// Runs a generation in one interleaving and compares it with what the CPU executor has made of the batch.
    ///
    /// # Errors
    /// What the interleaving shows to be wrong.
    pub fn check(
        &self,
        batch: &[GenerateRequest],
        schedule: Schedule,
        want: &Outcome,
    ) -> Result<Interleaving, Failure> {
        let got = self.run(batch, schedule)?;
        if got.outcome == *want {
            Ok(got)
        } else {
            Err(Failure::Mismatch { schedule })
        }
    }

    /// Runs a generation in one interleaving.
    ///
    /// # Errors
    /// What the interleaving shows to be wrong.
    pub fn run(
        &self,
        batch: &[GenerateRequest],
        schedule: Schedule,
    ) -> Result<Interleaving, Failure> {
        let shared = &self.model.shared;
        let program = &shared.program;
        Limits::of(program).check(batch)?;
        let prompts: Vec<&[u32]> = batch.iter().map(|r| &r.prompt[..]).collect();
        let prefill = prefill_steps(&prompts, Widths::of(program));
        let task = Task {
            shared,
            protocol: self.protocol,
            prefill: prefill
                .iter()
                .map(|step| step.iter().map(column_of).collect())
                .collect(),
            sequences: Sequences::new(batch, program.max_seq)?,
        };
        let ctas = program.mesh.ctas;
        let mut random = Random::new(schedule.seed);
        let mut chooser = Chooser::new(schedule.order, &program.mesh, &mut random);
        let world = World::new(program, random);
        let places = RefCell::new(vec![(0, Place::Barrier); ctas]);
        let enter =
            |cta: usize, step: usize, place: Place| places.borrow_mut()[cta] = (step, place);
        let at = |cta: usize| self.describe(places.borrow()[cta]);
        let fault = |cta: usize, fault: PhaseFault| Failure::Fault {
            schedule,
            cta,
            at: at(cta),
            buffer: fault
                .word()
                .map_or(String::new(), |word| buffer_of(program, word)),
            fault,
        };
        let mut running: Vec<Option<Running<'_>>> = (0..ctas)
            .map(|cta| -> Option<Running<'_>> {
                Some(Box::pin(Walk::new(&task, cta, &world, &enter).generate()))
            })
            .collect();
        let mut made: Vec<Made> = (0..ctas).map(|_| Made::default()).collect();
        let mut able: Vec<usize> = (0..ctas).collect();
        let mut since = vec![0; ctas];
        let mut turns = 0;
        loop {
            let mut writers = world.writers(false);
            let held = writers.is_empty() && able.is_empty();
            if held {
                writers = world.writers(true);
            }
            let deliver = if writers.is_empty() {
                0
            } else {
                world.random(|random| match schedule.delivery {
                    Delivery::Prompt => 1 << 20,
                    Delivery::Random if chooser.holds_back(&able) || random.once_in(2) => {
                        1 + random.below(64)
                    }
                    Delivery::Late if chooser.holds_back(&able) => 1 + random.below(4),
                    Delivery::Random | Delivery::Late => 0,
                })
            };
            if deliver > 0 {
                let writer = world.random(|random| {
                    if random.once_in(2) {
                        chooser.choose(&writers, &since, random)
                    } else {
                        Some(random.below(writers.len()))
                    }
                });
                if let Some(&writer) = writer.and_then(|index| writers.get(index)) {
                    let before = able.len();
                    let delivered = world.deliver(writer, held, deliver, &mut able);
                    delivered.map_err(|found| fault(writer, found))?;
                    able[before..].iter().for_each(|&cta| since[cta] = turns);
                }
                if schedule.delivery != Delivery::Prompt || chooser.holds_back(&able) {
                    continue;
                }
            }
            let Some(index) = world.random(|random| chooser.choose(&able, &since, random)) else {
                if running.iter().all(Option::is_none) {
                    break;
                }
                return Err(Failure::Deadlock {
                    schedule,
                    stuck: self.stuck(&world, &at),
                });
            };
            turns += 1;
            let cta = able.swap_remove(index);
            let Some(future) = &mut running[cta] else {
                continue;
            };
            match future
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()))
            {
                Poll::Ready(done) => {
                    made[cta] = done.map_err(|found| fault(cta, found))?;
                    running[cta] = None;
                }
                Poll::Pending if world.wait_of(cta).is_none() => {
                    able.push(cta);
                    since[cta] = turns;
                }
                Poll::Pending => {}
            }
        }
        let writes = world.delivered();
        if let Some(cta) = (0..ctas).find(|&cta| made[cta].tokens != made[0].tokens) {
            return Err(Failure::Disagreement { schedule, cta });
        }
        Ok(Interleaving {
            outcome: whole(&made, program.vocab),
            turns,
            writes,
        })
    }

    fn describe(&self, (step, place): (usize, Place)) -> String {
        let program = &self.model.shared.program;
        let what = match place {
            Place::Piece {
                kind,
                columns,
                piece,
            } => describe(program, kind, columns, piece),
            Place::Barrier => "barrier".to_owned(),
            Place::Candidates => "candidates".to_owned(),
            Place::Samples => "samples".to_owned(),
        };
        format!("step {step}, {what}")
    }

    fn stuck(&self, world: &World, at: &dyn Fn(usize) -> String) -> Vec<Stuck> {
        let program = &self.model.shared.program;
        let waits = (0..program.mesh.ctas).filter_map(|cta| Some((cta, world.wait_of(cta)?)));
        waits
            .map(|(cta, wait)| Stuck {
                cta,
                at: at(cta),
                word: wait.word,
                buffer: buffer_of(program, wait.word),
                expected: wait.epoch,
                found: world.epoch_of(wait.word),
            })
            .collect()
    }
}

/// The logits of all CTAs side by side.
fn whole(made: &[Made], vocab: usize) -> Outcome {
    let first = &made[0];
    let logits = first.logits.iter().enumerate().map(|(step, sequences)| {
        let of_sequence = |sequence: usize| {
            let parts = made.iter().map(|made| &made.logits[step][sequence][..]);
            let mut logits: Vec<f32> = parts.collect::<Vec<_>>().concat();
            // The last tile's padding.
            logits.truncate(vocab);
            logits
        };
        (0..sequences.len()).map(of_sequence).collect()
    });
    Outcome {
        tokens: first.tokens.clone(),
        logits: logits.collect(),
    }
}
