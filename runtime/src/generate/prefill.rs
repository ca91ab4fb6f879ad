//! How prompts go through prefill steps: the positions before each sequence's first decode step, in the order of the
//! sequences, cut into steps of the program's prefill columns.
//!
//! A step may hold the end of one prompt and the start of the next. Columns of one sequence lie side by side in the order
//! of their positions, so a column finds the keys of this step's earlier positions in the columns before it; those of
//! earlier steps are in the cache.

/// One column of a prefill step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillColumn {
    /// Slot of its sequence in the KV cache; `None` for an idle column at the end of the last step.
    pub slot: Option<u32>,
    /// Its position in the sequence; 0 where idle.
    pub position: u32,
    /// The token there; 0 where idle.
    pub token: u32,
    /// The column of this step at which its sequence's run of positions begins; itself where idle.
    pub first: u32,
}

/// What of a sequence goes through prefill steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillSequence<'a> {
    /// Its tokens.
    pub prompt: &'a [u32],
    /// Position of its first decode step: the last token's where tokens are generated, 0 where everything is scored.
    pub first_decode: usize,
}

/// The columns of all prefill steps, `columns` to a step; sequence `i` is in slot `i`. Empty where no position comes before
/// a first decode step.
pub fn prefill_steps(sequences: &[PrefillSequence<'_>], columns: usize) -> Vec<Vec<PrefillColumn>> {
    let positions: Vec<PrefillColumn> = (0u32..)
        .zip(sequences)
        .flat_map(|(slot, sequence)| {
            let tokens = sequence.prompt.iter().take(sequence.first_decode);
            (0u32..)
                .zip(tokens)
                .map(move |(position, &token)| PrefillColumn {
                    slot: Some(slot),
                    position,
                    token,
                    first: 0,
                })
        })
        .collect();
    positions
        .chunks(columns.max(1))
        .map(|step| {
            let mut step = step.to_vec();
            let mut first = 0;
            for column in 0..step.len() {
                if column > 0 && step[column].slot != step[column - 1].slot {
                    first = column as u32;
                }
                step[column].first = first;
            }
            for column in step.len()..columns {
                step.push(PrefillColumn {
                    slot: None,
                    position: 0,
                    token: 0,
                    first: column as u32,
                });
            }
            step
        })
        .collect()
}
