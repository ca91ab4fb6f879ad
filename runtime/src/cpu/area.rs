//! The exchange area: words that carry 96 bits of payload and the epoch in which they were written, as on the device
//! (`compiler/device/words.cuh`).
//!
//! Owns the word, its packing and the checks; which words a phase reads and writes is `exchange.rs`' concern.

use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use mirage_compiler::program::VALUES_PER_WORD;

/// The values of one word.
pub(super) type Values = [f32; VALUES_PER_WORD];

/// What stopped a phase. Each shows that the program is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PhaseFault {
    /// The word was not written in the epoch in which it is read.
    #[error("word {word} is read in epoch {expected} but was last written in epoch {found}")]
    Stale {
        /// Index in the exchange area.
        word: usize,
        /// The epoch it carries.
        found: u32,
        /// The epoch of the phase.
        expected: u32,
    },
    /// A word that is waited for has already been written for a later epoch.
    #[error(
        "word {word} is overwritten too early: it is awaited in epoch {expected}, but already carries epoch {found}"
    )]
    Overwritten {
        /// Index in the exchange area.
        word: usize,
        /// The epoch it carries.
        found: u32,
        /// The epoch of the phase.
        expected: u32,
    },
    /// Two writers of one word whose writes arrive in the wrong order.
    #[error("a write of epoch {epoch} falls on word {word}, which already carries epoch {found}")]
    Backwards {
        /// Index in the exchange area.
        word: usize,
        /// The epoch it carries.
        found: u32,
        /// The epoch of the write.
        epoch: u32,
    },
    /// A row of the KV cache is read before it is there.
    #[error("the row at element {at} of the KV cache is read before its writer's write is there")]
    Row {
        /// First element.
        at: usize,
    },
    /// Logits are read before they are there, or after they have been overwritten.
    #[error("the logits of CTA {cta} are read in epoch {expected} but are of epoch {found}")]
    Logits {
        /// Whose they are.
        cta: usize,
        /// Their epoch.
        found: u32,
        /// The epoch in which they are read.
        expected: u32,
    },
    /// What was chosen is no token.
    #[error("token {token} was chosen, which the vocabulary does not have")]
    Token {
        /// The token.
        token: u32,
    },
    /// Two writers of one word in one epoch.
    #[error("word {word} is written twice in epoch {epoch}")]
    Twice {
        /// Index in the exchange area.
        word: usize,
        /// The epoch.
        epoch: u32,
    },
    /// There is no such word.
    #[error("word {word} lies outside of the {words} words of the exchange area")]
    Outside {
        /// Index asked for.
        word: usize,
        /// Words there are.
        words: usize,
    },
    /// A phase takes more tiles than the CTA's weight stream has.
    #[error("its weight stream ends at byte {end}, but the phase reads up to byte {wanted}")]
    Stream {
        /// Bytes of the stream.
        end: usize,
        /// Bytes wanted.
        wanted: usize,
    },
    /// A phase waits although all CTAs have done the one before.
    #[error("the phase waits for what no phase before it has written")]
    Waits,
    /// A phase of a replicated residual stream in a step that scatters it, or the other way round.
    #[error("the phase does not fit the form in which the step keeps the residual stream")]
    Form,
}

impl PhaseFault {
    /// The word it is about, if it is about one.
    pub(super) fn word(&self) -> Option<usize> {
        match self {
            PhaseFault::Stale { word, .. }
            | PhaseFault::Overwritten { word, .. }
            | PhaseFault::Backwards { word, .. }
            | PhaseFault::Twice { word, .. } => Some(*word),
            PhaseFault::Row { .. }
            | PhaseFault::Token { .. }
            | PhaseFault::Logits { .. }
            | PhaseFault::Outside { .. }
            | PhaseFault::Stream { .. }
            | PhaseFault::Waits
            | PhaseFault::Form => None,
        }
    }
}

/// Payload in the lower 96 bits, epoch in the upper 32. Phases are separated by joins, so relaxed halves cannot tear.
#[derive(Default)]
struct Word {
    low: AtomicU64,
    high: AtomicU64,
}

/// All words. Epoch 0 is that of a word never written.
pub(super) struct ExchangeArea {
    words: Vec<Word>,
}

impl ExchangeArea {
    pub(super) fn new(words: usize) -> ExchangeArea {
        let words = std::iter::repeat_with(Word::default).take(words).collect();
        ExchangeArea { words }
    }

    /// Forgets all epochs.
    pub(super) fn clear(&mut self) {
        self.words.fill_with(Word::default);
    }

    fn word(&self, at: usize) -> Result<&Word, PhaseFault> {
        self.words.get(at).ok_or(PhaseFault::Outside {
            word: at,
            words: self.words.len(),
        })
    }

    /// Writes a word. It must not have been written in this epoch.
    pub(super) fn publish(
        &self,
        at: usize,
        [a, b, c]: [u32; 3],
        epoch: u32,
    ) -> Result<(), PhaseFault> {
        let word = self.word(at)?;
        let high = u64::from(epoch) << 32 | u64::from(c);
        word.low
            .store(u64::from(b) << 32 | u64::from(a), Ordering::Relaxed);
        if (word.high.swap(high, Ordering::Relaxed) >> 32) as u32 == epoch {
            return Err(PhaseFault::Twice { word: at, epoch });
        }
        Ok(())
    }

    /// The payload of a word that was written in this epoch.
    pub(super) fn take(&self, at: usize, epoch: u32) -> Result<[u32; 3], PhaseFault> {
        let word = self.word(at)?;
        let high = word.high.load(Ordering::Relaxed);
        let found = (high >> 32) as u32;
        if found != epoch {
            return Err(PhaseFault::Stale {
                word: at,
                found,
                expected: epoch,
            });
        }
        let low = word.low.load(Ordering::Relaxed);
        Ok([low as u32, (low >> 32) as u32, high as u32])
    }
}

/// Six values, rounded to bf16, as a word's payload.
pub(super) fn pack(values: &Values) -> [u32; 3] {
    let pair = |i: usize| u32::from(bits(values[i + 1])) << 16 | u32::from(bits(values[i]));
    [pair(0), pair(2), pair(4)]
}

/// The six values of a payload.
pub(super) fn unpack([a, b, c]: [u32; 3]) -> Values {
    let low = |pair: u32| f32::from_bits(pair << 16);
    let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
    [low(a), high(a), low(b), high(b), low(c), high(c)]
}

/// Rounds to bf16, to nearest even.
pub(super) fn round(value: f32) -> f32 {
    f32::from_bits(u32::from(bits(value)) << 16)
}

/// The 16 bits of a value rounded to bf16.
pub(super) fn bits(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

/// The value of 16 bits of bf16.
pub(super) fn value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
