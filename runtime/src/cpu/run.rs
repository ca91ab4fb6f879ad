//! The generation loop: prefill steps, then decode steps until every sequence has ended. The twin of
//! `compiler/device/generate.cuh`, with the sampler on the host.

use std::collections::BTreeSet;

use super::cta::Column;
use super::step::Kind;
use super::{CpuError, CpuModel};
use crate::generate::{
    CancelHandle, Event, FinishReason, GenerateError, GenerateRequest, Logits, PrefillColumn,
    RequestError, Widths, prefill_steps,
};
use crate::sampler::Sampler;

/// A sequence under way in the slot of its index.
struct Running<'a> {
    prompt: &'a [u32],
    position: usize,
    token: u32,
    max_new: usize,
    sampler: Sampler,
    stream: u32,
    stop_tokens: &'a BTreeSet<u32>,
}

const IDLE: Column = Column {
    slot: None,
    position: 0,
    token: 0,
    first: 0,
};

impl CpuModel {
    pub(super) fn run_requests(
        &mut self,
        batch: &[GenerateRequest],
        cancel: &CancelHandle,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), GenerateError> {
        let mut running = Vec::with_capacity(batch.len());
        for (sequence, request) in batch.iter().enumerate() {
            let sampler = request.sampling.sampler();
            let position = request.prompt.len() - 1;
            running.push(Some(Running {
                prompt: &request.prompt,
                position,
                token: request.prompt[position],
                max_new: request.max_new_tokens,
                sampler: sampler.map_err(|error| RequestError::Sampling { sequence, error })?,
                stream: request.stream,
                stop_tokens: &request.stop_tokens,
            }));
        }
        let prompts: Vec<&[u32]> = batch.iter().map(|r| &r.prompt[..]).collect();
        let steps = prefill_steps(&prompts, Widths::of(&self.shared.program));
        if let Some(last) = self.prefill(&steps, || cancel.is_cancelled())? {
            self.take_tokens(&last, &mut running, on_event);
        }
        while running.iter().any(Option::is_some) {
            if cancel.is_cancelled() {
                for (sequence, slot) in running.iter_mut().enumerate() {
                    if slot.take().is_some() {
                        let reason = FinishReason::Cancelled;
                        on_event(Event::Finished { sequence, reason });
                    }
                }
                break;
            }
            self.decode(&mut running, on_event)?;
        }
        Ok(())
    }

    /// Runs prefill steps. Returns the column of each sequence's last position in the last step, of which there are logits
    /// then; `None` where it was stopped before.
    pub(super) fn prefill(
        &mut self,
        steps: &[Vec<PrefillColumn>],
        stopped: impl Fn() -> bool,
    ) -> Result<Option<Vec<usize>>, CpuError> {
        let Some((last, before)) = steps.split_last() else {
            return Ok(None);
        };
        for (kind, step) in
            (before.iter().map(|step| (Kind::Prefill, step))).chain([(Kind::LastPrefill, last)])
        {
            if stopped() {
                return Ok(None);
            }
            let columns: Vec<Column> = step.iter().map(column_of).collect();
            self.step(kind, &columns)?;
        }
        let slots = last.iter().map(|column| column.slot);
        let next = slots.clone().skip(1).chain([None]);
        let ends = slots.zip(next).enumerate();
        let ends = ends.filter(|(_, (slot, next))| slot.is_some() && slot != next);
        Ok(Some(ends.map(|(column, _)| column).collect()))
    }

    /// One decode step: a token for every sequence that goes on.
    fn decode(
        &mut self,
        running: &mut [Option<Running<'_>>],
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), CpuError> {
        let places = running
            .iter()
            .map(|slot| slot.as_ref().map(|r| (r.position, r.token)));
        self.decode_step(places)?;
        let columns: Vec<usize> = (0..running.len()).collect();
        self.take_tokens(&columns, running, on_event);
        Ok(())
    }

    /// Takes a token for every sequence that goes on from the logits of its column.
    fn take_tokens(
        &self,
        columns: &[usize],
        running: &mut [Option<Running<'_>>],
        on_event: &mut dyn FnMut(Event),
    ) {
        let context = self.shared.program.max_seq;
        for ((sequence, slot), &column) in running.iter_mut().enumerate().zip(columns) {
            let Some(r) = slot else { continue };
            let next = r.position + 1;
            // Positions are below 2^20.
            let token = r
                .sampler
                .sample(&self.logits(column), r.stream, next as u32);
            let index = next - r.prompt.len();
            on_event(Event::Token {
                sequence,
                index,
                token,
            });
            let reason = if r.stop_tokens.contains(&token) {
                Some(FinishReason::Stop)
            } else if index + 1 >= r.max_new {
                Some(FinishReason::Length)
            } else if next >= context {
                Some(FinishReason::Context)
            } else {
                None
            };
            (r.position, r.token) = (next, token);
            if let Some(reason) = reason {
                *slot = None;
                on_event(Event::Finished { sequence, reason });
            }
        }
    }

    /// Runs a decode step with sequence `i`, where there is one, at its position in column and slot `i`.
    pub(super) fn decode_step(
        &mut self,
        places: impl Iterator<Item = Option<(usize, u32)>>,
    ) -> Result<(), CpuError> {
        let idle = std::iter::repeat(None);
        let columns: Vec<Column> = places
            .chain(idle)
            .take(self.shared.program.decode.columns)
            .enumerate()
            .map(|(index, place)| {
                place.map_or(IDLE, |(position, token)| Column {
                    slot: Some(index),
                    position,
                    token,
                    first: index,
                })
            })
            .collect();
        self.step(Kind::Decode, &columns)
    }

    pub(super) fn run_scoring(&mut self, sequences: &[Vec<u32>]) -> Result<Vec<Logits>, CpuError> {
        let vocab = self.shared.program.vocab;
        let mut scored: Vec<Logits> = sequences
            .iter()
            .map(|tokens| Logits {
                vocab,
                values: Vec::with_capacity(tokens.len() * vocab),
            })
            .collect();
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        for position in 0..longest {
            let given = |tokens: &Vec<u32>| Some((position, *tokens.get(position)?));
            self.decode_step(sequences.iter().map(given))?;
            for (column, (tokens, logits)) in sequences.iter().zip(&mut scored).enumerate() {
                if position < tokens.len() {
                    logits.values.extend(self.logits(column));
                }
            }
        }
        Ok(scored)
    }
}

fn column_of(column: &PrefillColumn) -> Column {
    Column {
        slot: column.slot.map(|slot| slot as usize),
        position: column.position as usize,
        token: column.token,
        first: column.first as usize,
    }
}
