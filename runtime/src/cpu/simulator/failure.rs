//! What a simulation shows to be wrong, in words.

use std::fmt;

use mirage_compiler::program::{Phase, Program};

use super::schedule::Schedule;
use crate::cpu::area::PhaseFault;
use crate::generate::RequestError;

/// A CTA that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The CTA.
    pub cta: usize,
    /// Where it is, in words.
    pub at: String,
    /// The word it waits for, and the buffer that has it.
    pub word: usize,
    /// In words.
    pub buffer: String,
    /// The epoch it waits for.
    pub expected: u32,
    /// The epoch that the word carries.
    pub found: u32,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CTA {} ({}) waits for epoch {} of word {}, {}, which carries epoch {}",
            self.cta, self.at, self.expected, self.word, self.buffer, self.found
        )
    }
}

/// What is wrong with a program.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// A CTA has met a fault.
    #[error("{schedule}: CTA {cta}, {at}: {fault}{}", of_buffer(.buffer))]
    Fault {
        /// The interleaving.
        schedule: Schedule,
        /// The CTA; of a write that does damage, its writer.
        cta: usize,
        /// Where it is, in words.
        at: String,
        /// The buffer that has the word, if it is one.
        buffer: String,
        /// What it met.
        fault: PhaseFault,
    },
    /// All wait, and nothing is on its way.
    #[error("{schedule}: deadlock: {}", join(.stuck))]
    Deadlock {
        /// The interleaving.
        schedule: Schedule,
        /// Who waits for what.
        stuck: Vec<Stuck>,
    },
    /// The CTAs have not made the same tokens.
    #[error("{schedule}: CTA {cta} has made other tokens than CTA 0")]
    Disagreement {
        /// The interleaving.
        schedule: Schedule,
        /// The first that has.
        cta: usize,
    },
    /// It has made something else than the CPU executor.
    #[error("{schedule}: other tokens or logits than in lockstep")]
    Mismatch {
        /// The interleaving.
        schedule: Schedule,
    },
    /// What cannot be simulated at all.
    #[error(transparent)]
    Request(#[from] RequestError),
}

fn of_buffer(buffer: &str) -> String {
    if buffer.is_empty() {
        String::new()
    } else {
        format!(" ({buffer})")
    }
}

fn join(stuck: &[Stuck]) -> String {
    let lines: Vec<String> = stuck.iter().map(Stuck::to_string).collect();
    lines.join("; ")
}

/// The buffer of the exchange area that has a word.
pub(super) fn buffer_of(program: &Program, word: usize) -> String {
    let mut buffers = vec![
        (program.attention.words_at, "heads of attention".to_owned()),
        (program.exchange.stream_at, "stream handed over".to_owned()),
        (program.exchange.candidates_at, "candidates".to_owned()),
        (program.exchange.samples_at, "samples".to_owned()),
        (program.exchange.barrier_at, "barrier".to_owned()),
        (program.exchange.words, "flags".to_owned()),
    ];
    for linear in &program.linears {
        buffers.push((linear.words_at, format!("outputs of {}", linear.name)));
    }
    for (_, step) in program.steps() {
        for phase in &step.layer {
            if let Phase::ReduceScatter {
                exchange, words_at, ..
            } = phase
            {
                let name = &program.linears[exchange.source].name;
                buffers.push((*words_at, format!("stream after {name}")));
            }
        }
    }
    let before = buffers.into_iter().filter(|(at, _)| *at <= word);
    before
        .max_by_key(|(at, _)| *at)
        .map_or(String::new(), |(at, name)| {
            format!("word {} of the {name}", word - at)
        })
}
