//! What the harness measures: one side of the comparison, behind a trait.
//!
//! Owns the trait, the work that a side is given and what it hands back. A side does its own timing, because only it knows
//! what its clock must enclose; so the harness can be tested with sides that make their times up. It must not know any
//! executor.

use mirage_runtime::generate::CancelHandle;

use crate::results::{MatrixProduct, Setup, SideFacts};

/// Asks for the end of the whole run (Ctrl-C). Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(CancelHandle);

impl Interrupt {
    /// Asks for the end.
    pub fn set(&self) {
        self.0.cancel();
    }

    /// Whether somebody has asked for the end.
    pub fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Ends a generation of ours with the run.
    pub fn cancel_handle(&self) -> &CancelHandle {
        &self.0
    }
}

/// What a side must have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of a sequence, prompt and answer together.
    pub context: usize,
}

/// How tokens are chosen; the same on all sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for greedy.
    pub temperature: f32,
    /// Probability that the tokens chosen from must have together; 1 for all.
    pub top_p: f32,
    /// Of the random numbers.
    pub seed: u64,
}

/// One sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tells sequences of the same seed apart.
    pub stream: u32,
}

/// One batch to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// The sequences, at least one.
    pub sequences: Vec<Sequence>,
    /// New tokens for each, at most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end a sequence; none where every sequence shall have `max_tokens`.
    pub stop_tokens: Vec<u32>,
}

/// Times of one sequence, in seconds from the start of the batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceTimes {
    /// When its first new token was at the host.
    pub first: f64,
    /// When its last one was; none where the side did not see it.
    pub last: Option<f64>,
    /// Time between successive tokens, where the side sees each one when it is made; else empty.
    pub gaps: Vec<f64>,
}

/// One batch, generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// New tokens of each sequence.
    pub tokens: Vec<Vec<u32>>,
    /// Host time of the whole batch, in seconds: from prompts as token ids to the last token at the host.
    pub wall: f64,
    /// Time of the same on the device's own clock, in seconds, where it has one.
    pub device: Option<f64>,
    /// Mean time of a decode step on the device's own clock, in seconds, where it is known apart from prefill.
    pub device_step: Option<f64>,
    /// Times of each sequence.
    pub sequences: Vec<SequenceTimes>,
}

/// Why a side did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// There is no room for this batch or context; the run goes on with the next one.
    #[error("{0}")]
    NoRoom(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Everything else ends the run.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// One engine, with the model's weights.
pub trait Side {
    /// What it is.
    fn facts(&self) -> SideFacts;

    /// Gets ready for batches of this shape: compiles, loads, chooses algorithms, so that nothing of it is timed later.
    /// Called again for another shape.
    ///
    /// # Errors
    /// [`SideError::NoRoom`] where the memory does not suffice.
    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError>;

    /// Gives back what `prepare` took, so that there is room for another side's next shape.
    fn release(&mut self) {}

    /// Generates a batch, within the prepared shape.
    ///
    /// # Errors
    /// [`SideError::Interrupted`] where `interrupt` ended it early.
    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError>;

    /// Logits after each of the given tokens from position `from` on (teacher forcing), one row of the vocabulary after
    /// the other.
    ///
    /// # Errors
    /// The executor's own.
    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError>;

    /// Bandwidth that its matrix products reach at the prepared batch, where it knows.
    ///
    /// # Errors
    /// The executor's own.
    fn matrix_products(&mut self) -> Result<Vec<MatrixProduct>, SideError> {
        Ok(Vec::new())
    }
}
