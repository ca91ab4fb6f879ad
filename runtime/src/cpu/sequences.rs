//! The sequences of a generation: which go on, where each of them is, and why it ends.

use std::collections::BTreeSet;

use super::cta::Column;
use crate::generate::{Event, FinishReason, GenerateRequest, RequestError};
use crate::sampler::Sampler;

/// A sequence under way in the slot of its index.
#[derive(Clone)]
pub(super) struct Running<'a> {
    prompt: &'a [u32],
    position: usize,
    token: u32,
    max_new: usize,
    pub(super) sampler: Sampler,
    pub(super) stream: u32,
    stop_tokens: &'a BTreeSet<u32>,
}

impl Running<'_> {
    /// The position of the next token.
    pub(super) fn next(&self) -> usize {
        self.position + 1
    }

    /// The token that it takes from these logits.
    pub(super) fn sample(&self, logits: &[f32]) -> u32 {
        // Positions are below 2^20.
        self.sampler.sample(logits, self.stream, self.next() as u32)
    }
}

pub(super) const IDLE: Column = Column {
    slot: None,
    position: 0,
    token: 0,
    first: 0,
};

/// All sequences of a batch; those that have ended are `None`.
#[derive(Clone)]
pub(super) struct Sequences<'a> {
    running: Vec<Option<Running<'a>>>,
    context: usize,
}

impl<'a> Sequences<'a> {
    /// The sequences at the last positions of their prompts.
    pub(super) fn new(
        batch: &'a [GenerateRequest],
        context: usize,
    ) -> Result<Sequences<'a>, RequestError> {
        let mut running = Vec::with_capacity(batch.len());
        for (sequence, request) in batch.iter().enumerate() {
            let sampler = request.sampling.sampler();
            let position = request.prompt.len().saturating_sub(1);
            let token = request.prompt.get(position).copied();
            running.push(Some(Running {
                prompt: &request.prompt,
                position,
                token: token.ok_or(RequestError::EmptyPrompt { sequence })?,
                max_new: request.max_new_tokens,
                sampler: sampler.map_err(|error| RequestError::Sampling { sequence, error })?,
                stream: request.stream,
                stop_tokens: &request.stop_tokens,
            }));
        }
        Ok(Sequences { running, context })
    }

    /// The sequences by slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = Option<&Running<'a>>> {
        self.running.iter().map(Option::as_ref)
    }

    /// Whether any goes on.
    pub(super) fn any(&self) -> bool {
        self.running.iter().any(Option::is_some)
    }

    /// Position and token of each sequence that goes on.
    pub(super) fn places(&self) -> impl Iterator<Item = Option<(usize, u32)>> {
        self.iter().map(|r| r.map(|r| (r.position, r.token)))
    }

    /// Takes the next token of every sequence that goes on.
    pub(super) fn advance(
        &mut self,
        mut choose: impl FnMut(usize, &Running<'a>) -> u32,
        on_event: &mut dyn FnMut(Event),
    ) {
        for (sequence, slot) in self.running.iter_mut().enumerate() {
            let Some(r) = slot else { continue };
            let next = r.next();
            let token = choose(sequence, r);
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
            } else if next >= self.context {
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

    /// Ends all that go on.
    pub(super) fn cancel(&mut self, on_event: &mut dyn FnMut(Event)) {
        for (sequence, slot) in self.running.iter_mut().enumerate() {
            if slot.take().is_some() {
                let reason = FinishReason::Cancelled;
                on_event(Event::Finished { sequence, reason });
            }
        }
    }
}

/// The columns of a decode step with sequence `i`, where there is one, at its position in column and slot `i`.
pub(super) fn decode_columns(
    places: impl Iterator<Item = Option<(usize, u32)>>,
    columns: usize,
) -> Vec<Column> {
    places
        .chain(std::iter::repeat(None))
        .take(columns)
        .enumerate()
        .map(|(index, place)| {
            place.map_or(IDLE, |(position, token)| Column {
                slot: Some(index),
                position,
                token,
                first: index,
            })
        })
        .collect()
}

/// The column of each sequence's last position among those of the last prefill step.
pub(super) fn last_columns(columns: &[Column]) -> Vec<usize> {
    let slots = columns.iter().map(|column| column.slot);
    let next = slots.clone().skip(1).chain([None]);
    let ends = slots.zip(next).enumerate();
    let ends = ends.filter(|(_, (slot, next))| slot.is_some() && slot != next);
    ends.map(|(column, _)| column).collect()
}
