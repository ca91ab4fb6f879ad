//! How prompts go through prefill steps: all positions of all prompts, in the order of the sequences, cut into steps of
//! the program's prefill columns. The last step holds the last position of every prompt, whose logits make its first
//! token.
//!
//! A step may hold the end of one prompt and the start of the next. Columns of one sequence lie side by side in the order
//! of their positions, so a column finds the keys of this step's earlier positions in the columns before it; those of
//! earlier steps are in the cache.

/// One column of a prefill step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillColumn {
    /// Slot of its sequence in the KV cache; `None` for an idle column at the end of a step.
    pub slot: Option<u32>,
    /// Its position in the sequence; 0 where idle.
    pub position: u32,
    /// The token there; 0 where idle.
    pub token: u32,
    /// The column of this step at which its sequence's run of positions begins; itself where idle.
    pub first: u32,
}

/// The columns of all prefill steps, `columns` to a step, which are no fewer than there are prompts; prompt `i` is in
/// slot `i`.
///
/// What comes before the last positions fills the steps in order. What is left over goes into the last step where it has
/// room beside them, so there are no more steps than the positions ask for.
pub fn prefill_steps(prompts: &[&[u32]], columns: usize) -> Vec<Vec<PrefillColumn>> {
    let at = |slot: u32, position: u32, token: u32| PrefillColumn {
        slot: Some(slot),
        position,
        token,
        first: 0,
    };
    let all = (0u32..).zip(prompts).filter_map(|(slot, prompt)| {
        let (&token, before) = prompt.split_last()?;
        Some((slot, before, token))
    });
    let before: Vec<PrefillColumn> = all
        .clone()
        .flat_map(|(slot, before, _)| {
            let positions = (0u32..).zip(before);
            positions.map(move |(position, &token)| at(slot, position, token))
        })
        .collect();
    let left_over = before.len() % columns.max(1);
    let beside = if left_over + prompts.len() <= columns {
        left_over
    } else {
        0
    };
    let (before, beside) = before.split_at(before.len() - beside);
    let last = all.flat_map(|(slot, before, token)| {
        let beside = beside
            .iter()
            .filter(move |column| column.slot == Some(slot));
        let last = at(slot, before.len() as u32, token);
        beside.copied().chain([last])
    });
    let steps = before.chunks(columns.max(1)).map(<[_]>::to_vec);
    steps
        .chain([last.collect()])
        .filter(|step| !step.is_empty())
        .map(|step| fill(step, columns))
        .collect()
}

/// Tells each column where its sequence's run begins, and adds idle ones.
fn fill(mut step: Vec<PrefillColumn>, columns: usize) -> Vec<PrefillColumn> {
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
}
