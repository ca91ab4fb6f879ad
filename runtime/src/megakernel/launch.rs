//! The launch parameters of a generated kernel: the Rust twins of the structures in `compiler/device/context.cuh`.

use bytemuck::{Pod, Zeroable};

use crate::generate;

/// One sequence of the batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Sequence {
    /// Positions below are given, not generated.
    pub(super) prompt_length: u32,
    /// The first position whose logits are of use.
    pub(super) first_logits: u32,
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
    /// First of its stop tokens in the launch's list.
    pub(super) stop_begin: u32,
    /// How many there are.
    pub(super) stop_count: u32,
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

/// The kernel's one parameter. Addresses are of device memory, but for those of `tokens_out` and `cancel`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
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
    pub(super) wide_steps: u32,
    pub(super) prefill_steps: u32,
    pub(super) batch: u32,
    pub(super) epoch: u32,
    /// Events of a CTA that fit the trace.
    pub(super) trace_events: u32,
    pub(super) padding: u32,
    /// Of a kernel with a timeline, else null.
    pub(super) trace: u64,
}

impl From<generate::PrefillColumn> for PrefillColumn {
    fn from(column: generate::PrefillColumn) -> PrefillColumn {
        PrefillColumn {
            slot: column.slot.map_or(-1, |slot| slot as i32),
            position: column.position,
            token: column.token,
            first: column.first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_device() {
        assert_eq!(size_of::<Sequence>(), 48);
        assert_eq!(size_of::<PrefillColumn>(), 16);
        assert_eq!(size_of::<Params>(), 160);
    }
}
