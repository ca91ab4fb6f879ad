//! Happens-before: nobody waits for a word that does not come, and nobody overwrites one that is still to be read.
//!
//! Every CTA has a vector clock: how much of every other CTA's run it knows to be over. It learns by waiting: a word
//! carries what its writer knew. `t` counts phases over the whole trace; a CTA's entry is the number of phases whose reads
//! it has done. One order of execution is walked, but the clocks hold only what every order has in common.
//!
//! The trace is the shortest that shows every reuse: two layers of a step (the first and the last; more only add
//! knowledge), two prefill steps of which the second makes tokens, three greedy decode steps, two that sample, and a greedy one.

mod rows;

use std::collections::HashMap;
use std::rc::Rc;

use super::{Rule, Violation, views};
use crate::plan::{StreamForm, Transport};
use crate::program::{Exchange, Phase, Program, Step, step_epochs};

/// What each CTA of the grid is known to have done.
type Clock = Rc<[u32]>;

/// Words that are written and read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Buffer {
    /// Outputs of a linear.
    Linear(usize),
    /// Heads of attention.
    Heads,
    /// The residual stream after a linear, for all.
    Gathered(usize),
    /// The same three in rows; their epoch is that of the flags.
    Rows(usize),
    HeadRows,
    StreamRows(usize),
    /// The replicated stream, for the CTAs without a part of the layers.
    Stream,
    /// Candidates of the head, by the parity of the step.
    Candidates(usize),
    /// Sums above the draws.
    Sums,
    /// Candidates of the sampler.
    Samples,
    /// Arrivals at the grid barrier. They hold no value: a later arrival is as good as the one waited for.
    Barrier,
}

/// The words of one CTA in a buffer.
struct Published {
    epoch: u64,
    clock: Clock,
    /// Who has read them, and when.
    readers: Vec<(usize, u32)>,
}

struct Trace<'a> {
    program: &'a Program,
    clocks: Vec<Clock>,
    /// By CTA.
    words: HashMap<Buffer, Vec<Option<Published>>>,
    now: u32,
    place: String,
}

pub(super) fn check(program: &Program) -> Result<(), Violation> {
    let prefill = ("prefill", &program.prefill);
    // A wide step is the last one or has narrower ones behind it.
    check_trace(program, &[prefill], prefill)?;
    if let Some(wide) = &program.wide {
        let wide = ("wide prefill", &wide.step);
        check_trace(program, &[wide, wide], prefill)?;
        check_trace(program, &[wide], wide)?;
    }
    Ok(())
}

/// Prefill steps, a last one that makes tokens, and decode steps.
fn check_trace(
    program: &Program,
    before: &[(&str, &Step)],
    prefill: (&str, &Step),
) -> Result<(), Violation> {
    let mut trace = Trace::new(program);
    let mut epoch = 0;
    let decode = ("decode", &program.decode);
    for &step in before {
        trace.layers(step, epoch)?;
        trace.all(
            Buffer::Barrier,
            epoch + program.layers as u64 + 1,
            "the barrier after a prefill step",
        )?;
        epoch += step_epochs(program.layers) as u64;
    }
    for (number, (step, sampled)) in [
        (prefill, false),
        (decode, false),
        (decode, false),
        (decode, false),
        (decode, true),
        (decode, true),
        (decode, false),
    ]
    .into_iter()
    .enumerate()
    {
        trace.layers(step, epoch)?;
        trace.idle(step.1, epoch)?;
        let last = epoch + program.layers as u64 + 1;
        trace.all(
            Buffer::Candidates(number % 2),
            last,
            "the head's candidates",
        )?;
        if sampled {
            // Barriers of the radix selection would only add knowledge.
            trace.all(Buffer::Sums, last, "the sums above the draws")?;
            trace.all(Buffer::Samples, last, "the sampler's candidates")?;
        }
        epoch += step_epochs(program.layers) as u64;
    }
    Ok(())
}

impl<'a> Trace<'a> {
    fn new(program: &'a Program) -> Self {
        let ctas = program.mesh.ctas;
        let start: Clock = vec![0; ctas].into();
        Trace {
            program,
            clocks: vec![start; ctas],
            words: HashMap::new(),
            now: 0,
            place: String::new(),
        }
    }

    fn layers(&mut self, (name, step): (&str, &Step), epoch: u64) -> Result<(), Violation> {
        let last = self.program.layers - 1;
        let layers = if last == 0 { vec![0] } else { vec![0, last] };
        for layer in layers {
            for (at, phase) in step.layer.iter().enumerate() {
                self.place = self.program.place(name, at, phase);
                self.phase(step, phase, epoch + layer as u64 + 1)?;
            }
        }
        Ok(())
    }

    fn phase(&mut self, step: &Step, phase: &Phase, epoch: u64) -> Result<(), Violation> {
        if step.transport == Transport::Rows {
            return self.phase_of_rows(phase, epoch);
        }
        let workers = self.program.mesh.workers();
        match phase {
            Phase::Linear(index) => {
                for cta in self.with_rows(*index) {
                    self.publish_what_it_knows(Buffer::Linear(*index), cta, epoch)?;
                }
            }
            Phase::Attention { exchange, .. } => {
                let before = self.clocks.clone();
                self.collect(exchange, epoch)?;
                if std::ptr::eq(step, &self.program.decode) {
                    // A task reads its own heads, and one whose part of the positions is empty reads nothing: nobody can
                    // be sure to have learnt anything.
                    self.clocks = before;
                }
                let members = self.program.mesh.members;
                let tasks = self.program.attention.tasks(step);
                for cta in (0..workers).filter(|cta| cta % members < tasks) {
                    let mut clock = self.clocks[cta].to_vec();
                    clock[cta] = self.now + 1; // it has q, k and v
                    self.publish(Buffer::Heads, cta, &clock, clock[..].into(), epoch)?;
                }
            }
            Phase::CollectHeads { all_groups, .. } => {
                let before = self.clocks.clone();
                let members = self.program.mesh.members;
                let tasks = self.program.attention.tasks(step);
                let mut known = HashMap::new();
                for cta in 0..workers {
                    let own = (!all_groups).then_some(cta / members);
                    let writers = (0..workers)
                        .filter(|w| {
                            own.is_none_or(|group| w / members == group) && w % members < tasks
                        })
                        .collect::<Vec<_>>();
                    self.join(cta, Buffer::Heads, &writers, epoch, &mut known, (own, None))?;
                }
                if step.kv_splits > 1 || step.replicate_below > 0 {
                    // Which parts are empty or replicated, and not waited for, depends on the positions.
                    self.clocks = before;
                }
            }
            Phase::Collect { exchange, .. } | Phase::AddToStream { exchange, .. } => {
                self.collect(exchange, epoch)?
            }
            Phase::ReduceScatter { exchange, .. } => self.reduce_scatter(step, exchange, epoch)?,
            Phase::GatherStream { exchange, .. } => {
                let owners = self.owners(step, exchange);
                let mut known = HashMap::new();
                for cta in 0..workers {
                    self.join(
                        cta,
                        Buffer::Gathered(exchange.source),
                        &owners,
                        epoch,
                        &mut known,
                        (None, None),
                    )?;
                }
            }
        }
        self.end_phase();
        Ok(())
    }

    /// A phase ends with a barrier inside each CTA: all its threads have read what they waited for.
    fn end_phase(&mut self) {
        self.now += 1;
        for (cta, clock) in self.clocks.iter_mut().enumerate() {
            Rc::make_mut(clock)[cta] = self.now;
        }
    }

    /// Workers whose slice of a linear has rows; the others publish nothing.
    fn with_rows(&self, linear: usize) -> Vec<usize> {
        let mesh = &self.program.mesh;
        let has_rows = |cta: &usize| {
            let (group, member) = mesh.coordinates(*cta);
            self.program.linears[linear]
                .slice(mesh, group, member)
                .0
                .count
                > 0
        };
        (0..mesh.workers()).filter(has_rows).collect()
    }

    /// Every worker waits for the words of an exchange.
    fn collect(&mut self, exchange: &Exchange, epoch: u64) -> Result<(), Violation> {
        let mut known = HashMap::new();
        for cta in 0..self.program.mesh.workers() {
            let at = self.program.mesh.coordinates(cta);
            let key = views::key(exchange, at);
            let writers: Vec<usize> = views::producers(self.program, exchange, at)
                .into_iter()
                .filter(|producer| producer.rows.count > 0)
                .flat_map(|producer| producer.partials)
                .collect();
            self.join(
                cta,
                Buffer::Linear(exchange.source),
                &writers,
                epoch,
                &mut known,
                key,
            )?;
        }
        Ok(())
    }

    /// A worker's warps each publish their words as soon as their own partial sums are there: such a word does not tell that
    /// the other threads have read theirs, and its writer knows only what all of them know when it overwrites one.
    fn reduce_scatter(
        &mut self,
        step: &Step,
        exchange: &Exchange,
        epoch: u64,
    ) -> Result<(), Violation> {
        let producers = views::producers(self.program, exchange, (0, 0));
        let mut of_owner: Vec<Vec<usize>> = vec![Vec::new(); self.program.mesh.workers()];
        for unit in views::stream_units(self.program, exchange, step.columns) {
            if of_owner[unit.owner].last() != Some(&unit.producer) {
                of_owner[unit.owner].push(unit.producer);
            }
        }
        let mut known = HashMap::new();
        for (cta, of_owner) in of_owner.iter().enumerate() {
            let before = self.clocks[cta].clone();
            let (mut of_each, mut of_all): (Option<Vec<u32>>, _) = (None, before.to_vec());
            for &producer in of_owner {
                let partials = &producers[producer].partials;
                let buffer = Buffer::Linear(exchange.source);
                self.clocks[cta] = before.clone();
                self.join(
                    cta,
                    buffer,
                    partials,
                    epoch,
                    &mut known,
                    (Some(producer), None),
                )?;
                let knows = &self.clocks[cta];
                join_clocks(&mut of_all, knows);
                of_each = Some(match of_each {
                    None => knows.to_vec(),
                    Some(least) => least
                        .iter()
                        .zip(&knows[..])
                        .map(|(a, b)| *a.min(b))
                        .collect(),
                });
            }
            self.clocks[cta] = of_all.into();
            if let Some(of_each) = of_each {
                let buffer = Buffer::Gathered(exchange.source);
                self.publish(buffer, cta, &of_each, self.clocks[cta].clone(), epoch)?;
            }
        }
        Ok(())
    }

    fn owners(&self, step: &Step, exchange: &Exchange) -> Vec<usize> {
        let units = views::stream_units(self.program, exchange, step.columns);
        let mut owners: Vec<usize> = units.into_iter().map(|unit| unit.owner).collect();
        owners.dedup();
        owners
    }

    /// What the CTAs without a part of the layers wait for after the last layer.
    fn idle(&mut self, step: &Step, epoch: u64) -> Result<(), Violation> {
        let mesh = self.program.mesh;
        if mesh.ctas == mesh.workers() {
            return Ok(());
        }
        self.place = "the residual stream for the CTAs without a part of the layers".to_owned();
        let epoch = epoch + self.program.layers as u64;
        let gathered = step.layer.iter().rev().find_map(|phase| match phase {
            Phase::GatherStream { exchange, .. } => Some(*exchange),
            _ => None,
        });
        let (buffer, writers) = match (step.stream, gathered) {
            (StreamForm::Scattered, Some(exchange)) if step.transport == Transport::Rows => (
                Buffer::StreamRows(exchange.source),
                (0..mesh.workers()).collect(),
            ),
            (StreamForm::Scattered, Some(exchange)) => (
                Buffer::Gathered(exchange.source),
                self.owners(step, &exchange),
            ),
            _ => {
                self.publish_what_it_knows(Buffer::Stream, 0, epoch)?;
                (Buffer::Stream, vec![0])
            }
        };
        let mut known = HashMap::new();
        for cta in mesh.workers()..mesh.ctas {
            self.join(cta, buffer, &writers, epoch, &mut known, (None, None))?;
        }
        self.end_phase();
        Ok(())
    }

    /// All CTAs publish, all wait for all.
    fn all(&mut self, buffer: Buffer, epoch: u64, place: &str) -> Result<(), Violation> {
        self.place = place.to_owned();
        let ctas: Vec<usize> = (0..self.program.mesh.ctas).collect();
        for &cta in &ctas {
            self.publish_what_it_knows(buffer, cta, epoch)?;
        }
        let mut known = HashMap::new();
        for &cta in &ctas {
            self.join(cta, buffer, &ctas, epoch, &mut known, (None, None))?;
        }
        self.end_phase();
        Ok(())
    }

    fn violation(&self, rule: Rule, message: String) -> Violation {
        Violation {
            rule,
            place: self.place.clone(),
            message,
        }
    }

    /// Words of threads that know all that their CTA knows.
    fn publish_what_it_knows(
        &mut self,
        buffer: Buffer,
        cta: usize,
        epoch: u64,
    ) -> Result<(), Violation> {
        let clock = self.clocks[cta].clone();
        self.publish(buffer, cta, &clock, clock.clone(), epoch)
    }

    /// `knows`: what each thread of the CTA knows when it writes; `clock`: what whoever has all the words learns.
    fn publish(
        &mut self,
        buffer: Buffer,
        cta: usize,
        knows: &[u32],
        clock: Clock,
        epoch: u64,
    ) -> Result<(), Violation> {
        if let Some(Some(old)) = self.words.get(&buffer).map(|words| &words[cta]) {
            if old.epoch >= epoch {
                return Err(self.violation(
                    Rule::Waits,
                    format!(
                        "CTA {cta} publishes {buffer:?} with epoch {epoch} after {}",
                        old.epoch
                    ),
                ));
            }
            let late = old
                .readers
                .iter()
                .find(|(reader, at)| knows[*reader] <= *at);
            if let Some((reader, _)) = late.filter(|_| buffer != Buffer::Barrier) {
                return Err(self.violation(
                    Rule::Reuse,
                    format!("CTA {cta} may overwrite {buffer:?} while CTA {reader} still waits for what it held"),
                ));
            }
        }
        let ctas = self.clocks.len();
        let words = self
            .words
            .entry(buffer)
            .or_insert_with(|| (0..ctas).map(|_| None).collect());
        words[cta] = Some(Published {
            epoch,
            clock,
            readers: Vec::new(),
        });
        Ok(())
    }

    /// CTA `cta` waits for the words of `writers` and knows what they knew. Readers with the same `key` read the same, so
    /// what they learn is worked out once.
    fn join(
        &mut self,
        cta: usize,
        buffer: Buffer,
        writers: &[usize],
        epoch: u64,
        known: &mut HashMap<(Option<usize>, Option<usize>), Clock>,
        key: (Option<usize>, Option<usize>),
    ) -> Result<(), Violation> {
        let now = self.now;
        let mut of_buffer = self.words.get_mut(&buffer);
        for &writer in writers {
            let words = of_buffer.as_mut().and_then(|words| words[writer].as_mut());
            let Some(words) = words.filter(|words| words.epoch == epoch) else {
                return Err(self.violation(
                    Rule::Waits,
                    format!("CTA {cta} waits for words of CTA {writer} in {buffer:?} that it does not publish before"),
                ));
            };
            words.readers.push((cta, now));
        }
        let learnt = known.entry(key).or_insert_with(|| {
            let mut all = vec![0; self.clocks.len()];
            for words in writers
                .iter()
                .filter_map(|writer| of_buffer.as_ref()?[*writer].as_ref())
            {
                join_clocks(&mut all, &words.clock);
            }
            all.into()
        });
        join_clocks(Rc::make_mut(&mut self.clocks[cta]), learnt);
        Ok(())
    }
}

fn join_clocks(into: &mut [u32], other: &[u32]) {
    for (into, other) in into.iter_mut().zip(other) {
        *into = (*into).max(*other);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::program;
    use super::*;

    /// Two greedy steps whose candidates lie in these buffers.
    fn two_steps(idle_ctas: bool, buffers: [Buffer; 2]) -> Result<(), Violation> {
        let mut program = program(StreamForm::Replicated, StreamForm::Replicated);
        if !idle_ctas {
            program.mesh.ctas = program.mesh.workers();
        }
        let mut trace = Trace::new(&program);
        for (buffer, epoch) in buffers.into_iter().zip([0, 100]) {
            trace.layers(("decode", &program.decode), epoch)?;
            trace.idle(&program.decode, epoch)?;
            trace.all(buffer, epoch + 99, "candidates")?;
        }
        Ok(())
    }

    #[test]
    fn idle_ctas_need_a_second_buffer_of_candidates() {
        let one = [Buffer::Candidates(0), Buffer::Candidates(0)];
        let violation = two_steps(true, one).unwrap_err();
        assert_eq!(violation.rule, Rule::Reuse, "{violation}");
        assert_eq!(
            two_steps(true, [Buffer::Candidates(0), Buffer::Candidates(1)]),
            Ok(())
        );
        // Workers keep step by the layers between.
        assert_eq!(two_steps(false, one), Ok(()));
    }

    #[test]
    fn words_that_hold_values_cannot_make_a_barrier() {
        let program = program(StreamForm::Replicated, StreamForm::Replicated);
        let twice = |buffer| {
            let mut trace = Trace::new(&program);
            trace
                .all(buffer, 1, "first")
                .and_then(|()| trace.all(buffer, 2, "second"))
        };
        assert_eq!(twice(Buffer::Samples).unwrap_err().rule, Rule::Reuse);
        assert_eq!(twice(Buffer::Barrier), Ok(()));
    }
}
