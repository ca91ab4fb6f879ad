//! The launch parameters of a generated kernel: the Rust twins of the structures in `compiler/device/context.cuh`.

use bytemuck::{Pod, Zeroable};

/// One sequence of the batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Sequence {
    /// Positions below are given, not generated.
    pub(super) prompt_length: u32,
    /// Position of the first decode step.
    pub(super) first_decode: u32,
    /// Generated tokens, at most.
    pub(super) max_new: u32,
    /// Likeliest tokens to choose from; 0 for all.
    pub(super) top_k: u32,
    /// 0 for greedy.
    pub(super) inverse_temperature: f32,
    /// Probability that the tokens chosen from have together.
    pub(super) top_p: f32,
    /// Of the random numbers.
    pub(super) seed: u64,
    /// Index of the sequence among those of the same seed.
    pub(super) stream: u32,
    /// Row of the logits dump for position 0, or -1.
    pub(super) logits_row: i32,
}

/// One column of a prefill step.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct PrefillColumn {
    /// The sequence, or -1 for an idle column.
    pub(super) slot: i32,
    /// The position computed.
    pub(super) position: u32,
    /// Its token.
    pub(super) token: u32,
    /// The column of the same step at which this sequence's run of positions begins.
    pub(super) first: u32,
}

impl PrefillColumn {
    /// A column that computes nothing of use.
    pub(super) const IDLE: PrefillColumn = PrefillColumn { slot: -1, position: 0, token: 0, first: 0 };
}

/// The kernel's one parameter. Addresses are of device memory, but for the last two.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Params {
    pub(super) weights: u64,
    pub(super) stream_offsets: u64,
    pub(super) embedding: u64,
    pub(super) norms: u64,
    pub(super) rope: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) exchange: u64,
    pub(super) logits: u64,
    pub(super) logits_dump: u64,
    pub(super) prompts: u64,
    pub(super) sequences: u64,
    pub(super) prefill: u64,
    pub(super) stop_tokens: u64,
    pub(super) tokens_out: u64,
    pub(super) cancel: u64,
    pub(super) stop_count: u32,
    pub(super) prefill_steps: u32,
    pub(super) batch: u32,
    pub(super) epoch: u32,
}

/// The prefill columns of a batch: every position below a sequence's first decode, sequence after sequence, `columns` to
/// a step. `prompts[slot]` are the tokens, `first_decode[slot]` how many of them come through prefill.
pub(super) fn prefill_columns(prompts: &[&[u32]], first_decode: &[u32], columns: usize) -> Vec<PrefillColumn> {
    let mut out: Vec<PrefillColumn> = Vec::new();
    for (slot, (prompt, &count)) in prompts.iter().zip(first_decode).enumerate() {
        for (position, &token) in prompt.iter().take(count as usize).enumerate() {
            let column = out.len() % columns;
            let first = match out.last() {
                Some(before) if column > 0 && before.slot == slot as i32 => before.first,
                _ => column as u32,
            };
            out.push(PrefillColumn { slot: slot as i32, position: position as u32, token, first });
        }
    }
    while !out.len().is_multiple_of(columns) {
        out.push(PrefillColumn::IDLE);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_packed_over_sequences() {
        let columns = prefill_columns(&[&[5, 6, 7], &[8], &[9, 10, 11]], &[2, 0, 3], 4);
        let read: Vec<(i32, u32, u32, u32)> =
            columns.iter().map(|c| (c.slot, c.position, c.token, c.first)).collect();
        assert_eq!(
            read,
            [
                (0, 0, 5, 0),
                (0, 1, 6, 0),
                (2, 0, 9, 2),
                (2, 1, 10, 2),
                (2, 2, 11, 0),
                (-1, 0, 0, 0),
                (-1, 0, 0, 0),
                (-1, 0, 0, 0)
            ]
        );
    }

    #[test]
    fn sizes_are_those_of_the_device() {
        assert_eq!(size_of::<Sequence>(), 40);
        assert_eq!(size_of::<PrefillColumn>(), 16);
        assert_eq!(size_of::<Params>(), 144);
    }
}
