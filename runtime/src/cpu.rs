//! The CPU executor: runs a compiled program on threads, one virtual CTA for each CTA of its mesh.
//!
//! It is the other executor of the program that the CUDA kernel runs, and computes the same thing phase by phase: every
//! CTA reads its own weight stream, keeps its own activations, and hears of the others only through words of the exchange
//! area. Values are rounded to bf16 where the device library rounds them. Sums run in another order than on tensor
//! cores, so results are close to a GPU's, not equal to them; on one program they repeat bit for bit, whatever the
//! number of threads.
//!
//! The CTAs do a phase in parallel, and the next phase begins when all have done it. So a reader never waits: a word that
//! does not carry the current epoch when it is read means that the program is wrong, and is reported as such.
//! What the CPU does not show is a word overwritten too early; finding that is the [`simulator`]'s business, which runs the same phases
//! over another memory.
//!
//! It must not know a graph or a model, and holds nothing that is specific to one.

mod area;
mod attention;
mod cta;
mod exchange;
mod kv_cache;
mod linear;
mod lockstep;
mod memory;
mod residual;
mod run;
mod sequences;
pub mod simulator;
mod step;
#[cfg(test)]
mod tests;

use mirage_compiler::mesh::Mesh;
use mirage_compiler::program::{Program, TILE, step_epochs};

use crate::checkpoint::Checkpoint;
use crate::generate::{
    CancelHandle, Event, Executor, GenerateError, GenerateRequest, Limits, Logits,
};
use crate::pack::{HostWeights, PackError};

use area::ExchangeArea;
pub use area::PhaseFault;
use cta::Cta;
use kv_cache::KvCache;

/// Why the CPU executor cannot go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CpuError {
    /// Arrays that were packed for another program.
    #[error(
        "{what} has {found} elements, but the program {program} takes {expected}; pack the weights for this very program"
    )]
    Weights {
        /// The program's name.
        program: String,
        /// Which array.
        what: &'static str,
        /// Elements the program takes.
        expected: usize,
        /// Elements there are.
        found: usize,
    },
    /// A phase cannot be done: the program is wrong.
    #[error(
        "internal error in the {phase}, layer {layer}, CTA {cta}: {fault}; the compiled program is wrong, please report it"
    )]
    Phase {
        /// Step and phase, in words.
        phase: String,
        /// Layer; the number of layers for the head.
        layer: usize,
        /// CTA that met the fault.
        cta: usize,
        /// What it met.
        fault: PhaseFault,
    },
}

impl From<CpuError> for GenerateError {
    fn from(error: CpuError) -> GenerateError {
        GenerateError::Executor(Box::new(error))
    }
}

/// What all CTAs see and none changes.
struct Shared {
    program: Program,
    mesh: Mesh,
    weights: HostWeights,
    /// Elements of a column of the widest activation.
    stride: usize,
}

/// A program with its weights, ready to run on the CPU.
pub struct CpuModel {
    shared: Shared,
    area: ExchangeArea,
    cache: KvCache,
    ctas: Vec<Cta>,
    /// No word carries an epoch above it.
    epoch: u32,
}

impl CpuModel {
    /// Takes a program and the arrays packed for it.
    ///
    /// # Errors
    /// [`CpuError::Weights`] where an array's length is not what the program takes.
    pub fn new(program: Program, weights: HostWeights) -> Result<CpuModel, CpuError> {
        let offsets = program.stream_offsets();
        let sizes = [
            (
                "the array of weight streams",
                offsets.last().map_or(0, |&end| end as usize),
                weights.streams.len(),
            ),
            (
                "the list of stream offsets",
                offsets.len(),
                weights.stream_offsets.len(),
            ),
            (
                "the embedding table",
                program.vocab * program.hidden,
                weights.embedding.len(),
            ),
            ("the array of norms", program.norms.len, weights.norms.len()),
            (
                "the table of rotary angles",
                program.max_seq * program.attention.head_dim / 2,
                weights.rope.len(),
            ),
        ];
        for (what, expected, found) in sizes {
            if expected != found {
                return Err(CpuError::Weights {
                    program: program.name.clone(),
                    what,
                    expected,
                    found,
                });
            }
        }
        let widths = program.linears.iter().chain([&program.head]);
        let stride = widths
            .map(|linear| linear.width())
            .chain([program.attention.width()])
            .max()
            .unwrap_or(0);
        let ctas = (0..program.mesh.ctas)
            .map(|cta| Cta::new(&program, cta, stride))
            .collect();
        Ok(CpuModel {
            area: ExchangeArea::new(program.exchange.words),
            cache: KvCache::new(&program),
            ctas,
            epoch: 0,
            shared: Shared {
                mesh: program.mesh,
                program,
                weights,
                stride,
            },
        })
    }

    /// Packs the weights of a checkpoint for the program and takes both.
    ///
    /// # Errors
    /// Tensors that are missing or misshapen.
    pub fn load(program: Program, checkpoint: &Checkpoint) -> Result<CpuModel, LoadError> {
        let weights = HostWeights::pack(&program, checkpoint)?;
        Ok(CpuModel::new(program, weights)?)
    }

    /// The program it runs.
    pub fn program(&self) -> &Program {
        &self.shared.program
    }

    /// The epoch that the next step counts from; every step takes the next [`step_epochs`].
    fn next_step(&mut self) -> u32 {
        let taken = u32::try_from(step_epochs(self.shared.program.layers)).unwrap_or(u32::MAX);
        if self.epoch.checked_add(taken).is_none() {
            self.area.clear();
            self.epoch = 0;
        }
        let epoch = self.epoch;
        self.epoch = epoch.saturating_add(taken);
        epoch
    }
}

/// Why a checkpoint does not become a [`CpuModel`].
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The weights cannot be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The arrays do not fit.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

impl Executor for CpuModel {
    fn limits(&self) -> Limits {
        Limits::of(&self.shared.program)
    }

    fn generate(
        &mut self,
        batch: &[GenerateRequest],
        cancel: &CancelHandle,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), GenerateError> {
        self.limits().check(batch)?;
        self.run_requests(batch, cancel, on_event, None)
    }

    fn score(&mut self, sequences: &[Vec<u32>]) -> Result<Vec<Logits>, GenerateError> {
        self.limits().check_sequences(sequences)?;
        Ok(self.run_scoring(sequences)?)
    }
}
