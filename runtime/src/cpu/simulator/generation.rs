//! A generation as one simulated CTA goes through it: the twin of `compiler/device/generate.cuh`, with the exchanges that the
//! CPU executor leaves to the host, the barrier after prefill steps, candidates and samples.
//!
//! A drawn token is computed by every CTA from all logits, which are plain memory here; how the device shares that work out
//! is not simulated, but what it waits for is.

use std::future::poll_fn;
use std::task::Poll;

use mirage_compiler::mesh::share;
use mirage_compiler::plan::Transport;
use mirage_compiler::program::{TILE, step_epochs};

use super::rows;
use super::world::{View, World};
use crate::cpu::Shared;
use crate::cpu::area::PhaseFault;
use crate::cpu::cta::{Column, Cta};
use crate::cpu::memory::Memory;
use crate::cpu::sequences::{Sequences, decode_columns, last_columns};
use crate::cpu::step::{Kind, Piece, Run};
use crate::generate::Event;

/// Levels of the sampler's selection, a barrier each (`device/radix.cuh`).
const LEVELS: u32 = 4;

/// Where a CTA is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Piece {
        kind: Kind,
        columns: usize,
        piece: Piece,
    },
    Barrier,
    Candidates,
    Samples,
}

/// What the loop over steps does for order's sake. Tests take it away, bit by bit, to see what it is good for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protocol {
    /// Buffers of candidates, used in turns.
    pub(super) candidate_buffers: usize,
    /// Whether a barrier follows each prefill step but the last.
    pub(super) barrier: bool,
    /// Whether there are fences ahead of the barrier, of the candidates and of flags.
    pub(super) fences: bool,
    /// Whether steps that exchange rows wait for flags.
    pub(super) flags: bool,
}

impl Default for Protocol {
    /// The device's.
    fn default() -> Protocol {
        Protocol {
            candidate_buffers: 2,
            barrier: true,
            fences: true,
            flags: true,
        }
    }
}

/// What all CTAs of a generation are given.
pub(super) struct Task<'a> {
    pub(super) shared: &'a Shared,
    pub(super) protocol: Protocol,
    pub(super) prefill: Vec<Vec<Column>>,
    pub(super) sequences: Sequences<'a>,
}

/// What a CTA has made.
#[derive(Default)]
pub(super) struct Made {
    /// Its own logits of the sequences that went on, `[steps][sequences][rows]`.
    pub(super) logits: Vec<Vec<Vec<f32>>>,
    /// Tokens of each sequence.
    pub(super) tokens: Vec<Vec<u32>>,
}

/// A CTA under way.
pub(super) struct Walk<'a> {
    task: &'a Task<'a>,
    cta: Cta,
    memory: View<'a>,
    enter: &'a dyn Fn(usize, usize, Place),
    step: usize,
}

/// Lets others go on.
async fn pause() {
    let mut paused = false;
    poll_fn(|_| {
        if std::mem::replace(&mut paused, true) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

impl<'a> Walk<'a> {
    /// `enter` hears of CTA, step and place wherever the CTA comes.
    pub(super) fn new(
        task: &'a Task<'a>,
        cta: usize,
        world: &'a World,
        enter: &'a dyn Fn(usize, usize, Place),
    ) -> Walk<'a> {
        Walk {
            cta: Cta::new(&task.shared.program, cta, task.shared.stride),
            memory: world.of(cta),
            task,
            enter,
            step: 0,
        }
    }

    fn enter(&self, place: Place) {
        (self.enter)(self.cta.index, self.step, place);
    }

    /// The whole generation.
    pub(super) async fn generate(mut self) -> Result<Made, PhaseFault> {
        let program = &self.task.shared.program;
        let mut sequences = self.task.sequences.clone();
        let mut made = Made {
            tokens: vec![Vec::new(); sequences.iter().count()],
            ..Made::default()
        };
        let layers = program.layers as u32;
        let epochs = step_epochs(program.layers) as u32;
        let mut epoch = 0;
        let mut places: Vec<usize> = Vec::new();
        for (number, columns) in self.task.prefill.iter().enumerate() {
            if number + 1 < self.task.prefill.len() {
                self.run(Kind::Prefill, columns, epoch).await?;
                if self.task.protocol.barrier {
                    self.barrier(epoch + layers + 1).await?;
                }
                epoch += epochs;
                self.step += 1;
            } else {
                self.run(Kind::LastPrefill, columns, epoch).await?;
                places = last_columns(columns);
            }
        }
        loop {
            self.choose(&mut sequences, &places, epoch, &mut made)
                .await?;
            if !sequences.any() {
                return Ok(made);
            }
            epoch += epochs;
            self.step += 1;
            let columns = decode_columns(sequences.places(), program.decode.columns);
            self.run(Kind::Decode, &columns, epoch).await?;
            places = (0..made.tokens.len()).collect();
        }
    }

    /// The layers of a step, and the head where it makes logits.
    async fn run(&mut self, kind: Kind, columns: &[Column], epoch: u32) -> Result<(), PhaseFault> {
        let run = Run::new(self.task.shared, kind, columns, epoch)?;
        self.cta.read = 0;
        let of_rows = run.step.transport == Transport::Rows;
        let memory = if of_rows {
            self.memory.of_rows()
        } else {
            self.memory
        };
        for piece in run.pieces() {
            if !run.has_part(self.cta.index, piece) {
                continue;
            }
            self.enter(Place::Piece {
                kind,
                columns: columns.len(),
                piece,
            });
            if of_rows {
                self.await_flags(&run, piece).await?;
            }
            run.carry_out(&mut self.cta, piece, &memory).await?;
            self.cta
                .appends
                .drain(..)
                .for_each(|row| self.memory.append(row));
            let program = &self.task.shared.program;
            if let Some(at) = rows::raised(program, &run, piece).filter(|_| of_rows) {
                self.fence();
                let flag = at + self.cta.index;
                self.memory.publish(flag, [0; 3], run.epoch_of(piece));
            }
            pause().await;
        }
        Ok(())
    }

    /// Waits for the flags of all workers, or of the own group's, where a piece needs them.
    async fn await_flags(&self, run: &Run<'_>, piece: Piece) -> Result<(), PhaseFault> {
        let program = &self.task.shared.program;
        let awaited = rows::awaited(program, run, piece, self.cta.worker);
        let Some((at, own_group)) = awaited.filter(|_| self.task.protocol.flags) else {
            return Ok(());
        };
        let members = program.mesh.members;
        let raisers = if own_group {
            self.cta.group * members..(self.cta.group + 1) * members
        } else {
            0..program.mesh.workers()
        };
        for cta in raisers {
            self.memory.take(at + cta, run.epoch_of(piece)).await?;
        }
        Ok(())
    }

    fn fence(&self) {
        if self.task.protocol.fences {
            self.memory.fence();
        }
    }

    async fn barrier(&mut self, epoch: u32) -> Result<(), PhaseFault> {
        let program = &self.task.shared.program;
        self.enter(Place::Barrier);
        let at = program.exchange.barrier_at;
        self.fence();
        self.memory.write(at + self.cta.index, [0; 3], epoch)?;
        for cta in 0..program.mesh.ctas {
            // Whoever came through early may have arrived at the next barrier by now.
            self.memory.arrived(at + cta, epoch).await;
        }
        Ok(())
    }

    /// Every CTA publishes a word for each column of a decode step, and gives those of all CTAs to `each`.
    async fn exchange(
        &mut self,
        at: usize,
        epoch: u32,
        mine: impl Fn(usize) -> [u32; 3],
        mut each: impl FnMut(usize, [u32; 3]),
    ) -> Result<(), PhaseFault> {
        let program = &self.task.shared.program;
        let ctas = program.mesh.ctas;
        for column in 0..program.decode.columns {
            let word = at + column * ctas + self.cta.index;
            self.memory.write(word, mine(column), epoch)?;
        }
        for column in 0..program.decode.columns {
            for cta in 0..ctas {
                let word = at + column * ctas + cta;
                each(column, self.memory.take(word, epoch).await?);
            }
        }
        Ok(())
    }

    /// Tokens for the sequences that go on, from the logits of the step that just was. `places`: their columns.
    async fn choose(
        &mut self,
        sequences: &mut Sequences<'_>,
        places: &[usize],
        epoch: u32,
        made: &mut Made,
    ) -> Result<(), PhaseFault> {
        let program = &self.task.shared.program;
        let (ctas, columns) = (program.mesh.ctas, program.decode.columns);
        let last = epoch + program.layers as u32 + 1;
        let width = program.head_rows(self.cta.index).count * TILE;
        let first = program.head_rows(self.cta.index).begin * TILE;
        let logits: Vec<Vec<f32>> = places
            .iter()
            .map(|column| self.cta.logits[column * width..][..width].to_vec())
            .collect();
        let greedy = |r: &crate::cpu::sequences::Running<'_>| r.sampler.params().is_greedy();
        let drawn = sequences.iter().flatten().any(|r| !greedy(r));

        // The step's rows of the cache and the logits are there for whoever sees the candidates.
        self.enter(Place::Candidates);
        if drawn {
            self.memory.write_logits(logits.concat(), last);
        }
        self.fence();
        let buffers = self.task.protocol.candidate_buffers;
        let parity = epoch as usize / step_epochs(program.layers) % buffers;
        let best = |column: usize| {
            let mut best = (f32::MIN, 0);
            for (token, &logit) in
                (first..program.vocab).zip(logits.get(column).into_iter().flatten())
            {
                if logit > best.0 {
                    best = (logit, token as u32);
                }
            }
            [best.0.to_bits(), best.1, 0]
        };
        let mut winners = vec![(f32::MIN, 0); columns];
        let at = program.exchange.candidates_at + parity * columns * ctas;
        self.exchange(at, last, best, |column, [logit, token, _]| {
            let logit = f32::from_bits(logit);
            let winner: &mut (f32, u32) = &mut winners[column];
            if logit > winner.0 || (logit == winner.0 && token < winner.1) {
                *winner = (logit, token);
            }
        })
        .await?;

        let mut tokens: Vec<u32> = winners.into_iter().map(|(_, token)| token).collect();
        if drawn {
            self.draw(sequences, last, &mut tokens).await?;
        }
        if let Some(&token) = tokens
            .iter()
            .find(|token| **token as usize >= program.vocab)
        {
            return Err(PhaseFault::Token { token });
        }
        let of_step = sequences.iter().zip(&logits);
        let of_step = of_step.map(|(r, logits)| r.map_or(Vec::new(), |_| logits.clone()));
        made.logits.push(of_step.collect());
        sequences.advance(|sequence, _| tokens[sequence], &mut |event| {
            if let Event::Token {
                sequence, token, ..
            } = event
            {
                made.tokens[sequence].push(token);
            }
        });
        Ok(())
    }

    /// Replaces the tokens of the sequences that draw them.
    async fn draw(
        &mut self,
        sequences: &Sequences<'_>,
        last: u32,
        tokens: &mut [u32],
    ) -> Result<(), PhaseFault> {
        let program = &self.task.shared.program;
        let mut all = vec![Vec::with_capacity(program.head.rows()); tokens.len()];
        for cta in 0..program.mesh.ctas {
            let width = share(program.head.row_units, program.mesh.ctas, cta).count * TILE;
            let logits = self.memory.logits(cta, last)?;
            for (all, logits) in all.iter_mut().zip(logits.chunks_exact(width.max(1))) {
                all.extend_from_slice(logits);
            }
        }
        let drawn = |params: &crate::sampler::SamplingParams| !params.is_greedy();
        let params = || sequences.iter().flatten().map(|r| *r.sampler.params());
        let levels = [
            params().any(|p| drawn(&p) && p.top_k > 0),
            params().any(|p| drawn(&p) && p.top_p < 1.0),
        ];
        for (epoch, used) in [last + 1, last + 1 + LEVELS].into_iter().zip(levels) {
            for level in 0..if used { LEVELS } else { 0 } {
                self.barrier(epoch + level).await?;
            }
        }
        for ((token, logits), r) in tokens.iter_mut().zip(&mut all).zip(sequences.iter()) {
            if let Some(r) = r.filter(|r| drawn(r.sampler.params())) {
                logits.truncate(program.vocab);
                *token = r.sample(logits);
            }
        }
        self.enter(Place::Samples);
        let mine = tokens.to_vec();
        let at = program.exchange.samples_at;
        // All have drawn the same.
        self.exchange(
            at,
            last,
            |column| [mine[column]; 3],
            |column, [token, ..]| {
                tokens[column] = token;
            },
        )
        .await
    }
}
