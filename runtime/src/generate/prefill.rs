//! How prompts go through prefill steps: all positions of all prompts, in the order of the sequences, cut into steps of
//! the program's columns. The last step holds the last position of every prompt, whose logits make its first token.
//!
//! A step may hold the end of one prompt and the start of the next. Columns of one sequence lie side by side in the order
//! of their positions, so a column finds the keys of this step's earlier positions in the columns before it; those of
//! earlier steps are in the cache.

use mirage_compiler::program::Program;

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

/// Columns of a program's prefill steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Of most steps; no fewer than there are sequences.
    pub narrow: usize,
    /// Of wide ones, if there are any: more.
    pub wide: Option<usize>,
}

impl Widths {
    /// Those of a program.
    pub fn of(program: &Program) -> Widths {
        Widths {
            narrow: program.prefill.columns,
            wide: program.wide.as_ref().map(|wide| wide.step.columns),
        }
    }
}

/// The columns of all prefill steps, each narrow or wide; prompt `i` is in slot `i`. Wide steps come first.
///
/// A wide step costs less than two narrow ones: it is taken wherever one narrow step does not hold what is left. What is
/// left beside the last positions goes into the last step if it has room, so there are no more steps than the positions ask
/// for.
pub fn prefill_steps(prompts: &[&[u32]], widths: Widths) -> Vec<Vec<PrefillColumn>> {
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
    let mut before = &before[..];
    let mut steps = Vec::new();
    loop {
        let left = before.len() + prompts.len();
        let columns = match widths.wide {
            Some(wide) if left > widths.narrow => wide,
            _ => widths.narrow,
        };
        if left <= columns {
            let last = all.flat_map(|(slot, of_slot, token)| {
                let beside = before.iter().filter(move |c| c.slot == Some(slot));
                let last = at(slot, of_slot.len() as u32, token);
                beside.copied().chain([last])
            });
            let last: Vec<PrefillColumn> = last.collect();
            if !last.is_empty() {
                steps.push(fill(last, columns));
            }
            return steps;
        }
        let (step, rest) = before.split_at(before.len().min(columns));
        steps.push(fill(step.to_vec(), columns));
        before = rest;
    }
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
