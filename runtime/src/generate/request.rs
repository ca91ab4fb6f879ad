//! Requests and what they must fulfil.

use std::collections::BTreeSet;

use mirage_compiler::program::Program;

use crate::sampler::{SamplingError, SamplingParams};

/// What an executor can take, from the program it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences at once.
    pub batch: usize,
    /// Positions of a sequence: prompt and new tokens.
    pub context: usize,
    /// Number of tokens there are.
    pub vocab: usize,
}

/// One sequence to go on with.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// New tokens, at most; at least 1. The context may end the sequence earlier.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tells sequences of the same seed apart: the `sequence` of [`crate::sampler::Sampler::sample`].
    pub stream: u32,
    /// Tokens that end the sequence.
    pub stop_tokens: BTreeSet<u32>,
}

impl GenerateRequest {
    /// A greedy request without stop tokens.
    pub fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> GenerateRequest {
        GenerateRequest {
            prompt,
            max_new_tokens,
            sampling: SamplingParams::default(),
            stream: 0,
            stop_tokens: BTreeSet::new(),
        }
    }
}

/// A request that cannot be served. Sequences and positions count from 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Nothing to do.
    #[error("the batch is empty; give at least one sequence")]
    EmptyBatch,
    /// More sequences than the program has slots.
    #[error(
        "the batch has {found} sequences, but the program was compiled for {limit}; split the batch or compile with --batch {found}"
    )]
    BatchTooLarge {
        /// Sequences given.
        found: usize,
        /// Slots of the program.
        limit: usize,
    },
    /// A prompt without tokens.
    #[error(
        "sequence {sequence}: the prompt is empty; give at least one token, such as the model's begin-of-text token"
    )]
    EmptyPrompt {
        /// Which sequence.
        sequence: usize,
    },
    /// A prompt that does not fit the context.
    #[error(
        "sequence {sequence}: the prompt has {length} tokens, but the context is {context}; shorten the prompt or compile with --max-seq {length} or more"
    )]
    PromptTooLong {
        /// Which sequence.
        sequence: usize,
        /// Tokens of the prompt.
        length: usize,
        /// Positions there are.
        context: usize,
    },
    /// A token id that the model does not have.
    #[error(
        "sequence {sequence}: token {token} at position {position} is not in the vocabulary of {vocab}; use the tokenizer of this very model"
    )]
    UnknownToken {
        /// Which sequence.
        sequence: usize,
        /// Where in the prompt.
        position: usize,
        /// The id.
        token: u32,
        /// Ids there are.
        vocab: usize,
    },
    /// No new tokens are asked for.
    #[error(
        "sequence {sequence}: max_new_tokens is 0; ask for at least 1, or score the prompt instead"
    )]
    NoNewTokens {
        /// Which sequence.
        sequence: usize,
    },
    /// A sampling parameter is out of range.
    #[error("sequence {sequence}: {error}")]
    Sampling {
        /// Which sequence.
        sequence: usize,
        /// Which parameter.
        error: SamplingError,
    },
}

impl Limits {
    /// The limits of a program.
    pub fn of(program: &Program) -> Limits {
        Limits {
            batch: program.slots,
            context: program.max_seq,
            vocab: program.vocab,
        }
    }

    /// Checks a batch of requests.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self, batch: &[GenerateRequest]) -> Result<(), RequestError> {
        self.check_batch(batch.len())?;
        for (sequence, request) in batch.iter().enumerate() {
            self.check_tokens(sequence, &request.prompt)?;
            if request.max_new_tokens == 0 {
                return Err(RequestError::NoNewTokens { sequence });
            }
            let sampling = request.sampling.validate();
            sampling.map_err(|error| RequestError::Sampling { sequence, error })?;
        }
        Ok(())
    }

    /// Checks sequences that are to be scored.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check_sequences(&self, sequences: &[Vec<u32>]) -> Result<(), RequestError> {
        self.check_batch(sequences.len())?;
        for (sequence, tokens) in sequences.iter().enumerate() {
            self.check_tokens(sequence, tokens)?;
        }
        Ok(())
    }

    fn check_batch(&self, found: usize) -> Result<(), RequestError> {
        match found {
            0 => Err(RequestError::EmptyBatch),
            _ if found > self.batch => Err(RequestError::BatchTooLarge {
                found,
                limit: self.batch,
            }),
            _ => Ok(()),
        }
    }

    fn check_tokens(&self, sequence: usize, tokens: &[u32]) -> Result<(), RequestError> {
        if tokens.is_empty() {
            return Err(RequestError::EmptyPrompt { sequence });
        }
        if tokens.len() > self.context {
            return Err(RequestError::PromptTooLong {
                sequence,
                length: tokens.len(),
                context: self.context,
            });
        }
        let unknown = tokens
            .iter()
            .position(|&token| token as usize >= self.vocab);
        match unknown {
            None => Ok(()),
            Some(position) => Err(RequestError::UnknownToken {
                sequence,
                position,
                token: tokens[position],
                vocab: self.vocab,
            }),
        }
    }
}
