//! What every executor of a program offers: generating tokens for a batch of sequences, and scoring given ones.
//!
//! Owns the requests and events, their validation, and which positions of the prompts go through which column of which
//! prefill step: the CPU and the GPU run the same steps. It must not know how a step is computed.

mod prefill;
mod request;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use prefill::{PrefillColumn, Widths, prefill_steps};
pub use request::{GenerateRequest, Limits, RequestError};

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// Its last token is one of its stop tokens.
    Stop,
    /// It has all the tokens that were asked for.
    Length,
    /// Prompt and tokens fill the context.
    Context,
    /// The caller cancelled.
    Cancelled,
}

/// What happens while a batch is generated. Tokens of one sequence come in order; its end comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A new token.
    Token {
        /// Index of the request in the batch.
        sequence: usize,
        /// How many tokens of this sequence came before it.
        index: usize,
        /// The token. A stop token comes too.
        token: u32,
    },
    /// A sequence has ended.
    Finished {
        /// Index of the request in the batch.
        sequence: usize,
        /// Why.
        reason: FinishReason,
    },
}

/// Stops a generation from another thread. Clones cancel the same generation.
#[derive(Clone, Debug, Default)]
pub struct CancelHandle(Arc<AtomicBool>);

impl CancelHandle {
    /// A handle that has not cancelled anything yet.
    pub fn new() -> CancelHandle {
        CancelHandle::default()
    }

    /// Asks for the end. The step under way is finished first; its tokens still come.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A request that cannot be served.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The executor failed.
    #[error(transparent)]
    Executor(Box<dyn Error + Send + Sync>),
}

/// Logits of a sequence, f32 `[positions, vocab]`: row `p` is the prediction for position `p + 1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// Logits of a row.
    pub vocab: usize,
    /// All rows, one after the other.
    pub values: Vec<f32>,
}

impl Logits {
    /// One row for each token of the sequence.
    pub fn positions(&self) -> usize {
        self.values.len().checked_div(self.vocab).unwrap_or(0)
    }

    /// Logits after the token at `position`.
    ///
    /// # Panics
    /// Where the sequence has no such position.
    pub fn row(&self, position: usize) -> &[f32] {
        &self.values[position * self.vocab..][..self.vocab]
    }
}

/// All tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the prompt.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub reason: FinishReason,
}

/// Runs a compiled program with its weights.
///
/// A sequence's tokens depend on its own request only, never on what else is in the batch.
pub trait Executor {
    /// What requests it can take.
    fn limits(&self) -> Limits;

    /// Generates tokens for up to [`Limits::batch`] requests at once; `on_event` hears of each as it is made.
    ///
    /// # Errors
    /// A request that breaks a limit, before anything is computed; or the executor's own failure.
    fn generate(
        &mut self,
        batch: &[GenerateRequest],
        cancel: &CancelHandle,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), GenerateError>;

    /// Logits at every position of up to [`Limits::batch`] given sequences (teacher forcing), all through decode steps.
    ///
    /// # Errors
    /// As [`Executor::generate`].
    fn score(&mut self, sequences: &[Vec<u32>]) -> Result<Vec<Logits>, GenerateError>;

    /// Generates to the end and hands over all tokens at once.
    ///
    /// # Errors
    /// As [`Executor::generate`].
    fn generate_all(&mut self, batch: &[GenerateRequest]) -> Result<Vec<Generated>, GenerateError> {
        let unfinished = Generated {
            tokens: Vec::new(),
            reason: FinishReason::Cancelled,
        };
        let mut all = vec![unfinished; batch.len()];
        self.generate(batch, &CancelHandle::new(), &mut |event| match event {
            Event::Token {
                sequence, token, ..
            } => all[sequence].tokens.push(token),
            Event::Finished { sequence, reason } => all[sequence].reason = reason,
        })?;
        Ok(all)
    }
}
