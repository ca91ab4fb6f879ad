//! The generation loop: prefill steps, then decode steps until every sequence has ended. The twin of
//! `compiler/device/generate.cuh`, with the sampler on the host.

use super::cta::Column;
use super::sequences::{Sequences, decode_columns, last_columns};
use super::step::Kind;
use super::{CpuError, CpuModel};
use crate::generate::{
    CancelHandle, Event, GenerateError, GenerateRequest, Logits, PrefillColumn, Widths,
    prefill_steps,
};

impl CpuModel {
    /// Generates; `on_logits` hears of the logits of each step, by sequence, where these are wanted.
    pub(super) fn run_requests(
        &mut self,
        batch: &[GenerateRequest],
        cancel: &CancelHandle,
        on_event: &mut dyn FnMut(Event),
        mut on_logits: Option<&mut dyn FnMut(Vec<Vec<f32>>)>,
    ) -> Result<(), GenerateError> {
        let mut sequences = Sequences::new(batch, self.shared.program.max_seq)?;
        let prompts: Vec<&[u32]> = batch.iter().map(|r| &r.prompt[..]).collect();
        let steps = prefill_steps(&prompts, Widths::of(&self.shared.program));
        let mut last = self.prefill(&steps, || cancel.is_cancelled())?;
        while sequences.any() {
            if cancel.is_cancelled() && last.is_none() {
                sequences.cancel(on_event);
                break;
            }
            // The columns of the sequences: those of their last positions after prefill, their own after a decode step.
            let columns = match last.take() {
                Some(columns) => columns,
                None => {
                    self.decode_step(sequences.places())?;
                    (0..batch.len()).collect()
                }
            };
            if let Some(on_logits) = &mut on_logits {
                let of_sequences = sequences.iter().zip(&columns);
                let logits = of_sequences.map(|(r, &c)| r.map_or(Vec::new(), |_| self.logits(c)));
                on_logits(logits.collect());
            }
            sequences.advance(|s, r| r.sample(&self.logits(columns[s])), on_event);
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
        let last: Vec<Column> = last.iter().map(column_of).collect();
        Ok(Some(last_columns(&last)))
    }

    /// Runs a decode step with sequence `i`, where there is one, at its position in column and slot `i`.
    pub(super) fn decode_step(
        &mut self,
        places: impl Iterator<Item = Option<(usize, u32)>>,
    ) -> Result<(), CpuError> {
        let columns = decode_columns(places, self.shared.program.decode.columns);
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

pub(super) fn column_of(column: &PrefillColumn) -> Column {
    Column {
        slot: column.slot.map(|slot| slot as usize),
        position: column.position as usize,
        token: column.token,
        first: column.first as usize,
    }
}
