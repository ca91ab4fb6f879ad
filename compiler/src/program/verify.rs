//! Rules of a program, checked after lowering: what the device library and every other executor take for granted.
//!
//! A program that passes cannot deadlock, read a value that is not there yet, or overwrite one that is still being read,
//! whatever the order in which the CTAs run. The check knows the phases' meaning (`device/*.cuh`), and must not know how
//! lowering came to them: it starts from the program alone.
//!
//! Rules, each a [`Rule`]:
//! 1. Mesh: there are workers, no more than CTAs; the program and its plan agree on mesh, placements and steps.
//! 2. Weights: every place names a tensor of the checkpoint, of each layer or not, of the shape that it takes; every tensor
//!    has a place.
//! 3. Tiles: the packed rows are the checkpoint's rows, each once; every tile of a layer and of the head is streamed to
//!    exactly one CTA; linears that write the residual stream share one division of its elements.
//! 4. Pages: passes and pages divide a slice as the device code assumes; a flag is `exact` only where nothing is left over.
//! 5. Ring: it holds every page, more are never in flight than it has, and phases multiply in the order of the stream.
//! 6. Words: buffers of the exchange area are disjoint and large enough for both kinds of step.
//! 7. Shared: regions of shared memory are disjoint, aligned, and large enough for what every phase keeps there.
//! 8. Norms: every gamma lies in the array of norms where its reader looks for it.
//! 9. Steps: columns are powers of two up to 64, of steps that exchange words up to 16, enough for all sequences, and a
//!    prefill step has no fewer than a decode step; attention's tasks divide the heads.
//! 10. Views: an exchange sums where columns were split and nowhere else, over all partial sums of the same elements; a
//!     linear is read in one way only.
//! 11. Inputs: a linear multiplies what was prepared for it, and what was prepared holds its slice of the columns.
//! 12. Outputs: every output is read; what is added to the residual stream is added once.
//! 13. Waits: every word that is waited for is published earlier in the same order of phases, with that epoch; epochs grow.
//! 14. Reuse: no word is overwritten before its last reader has it. Shown by vector clocks over two layers of steps of
//!     both kinds and the steps' boundaries, idle CTAs included.

mod memory;
mod order;
mod phases;
mod rows;
#[cfg(test)]
mod tests;
mod tiles;
mod views;
mod weights;

use std::fmt;

use super::{Phase, Program};
use crate::arch::GpuModel;

/// A rule of the list above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Mesh and plan.
    Mesh,
    /// Tensors of the checkpoint.
    Weights,
    /// Every weight once.
    Tiles,
    /// Passes and pages.
    Pages,
    /// The ring and the order of the stream.
    Ring,
    /// Buffers of the exchange area.
    Words,
    /// Regions of shared memory.
    Shared,
    /// Places of the gammas.
    Norms,
    /// Sizes of a step.
    Steps,
    /// How a linear's output is read.
    Views,
    /// What a linear multiplies.
    Inputs,
    /// What becomes of a linear's output.
    Outputs,
    /// No wait without its publish.
    Waits,
    /// No overwrite before the last read.
    Reuse,
}

/// A rule that a program breaks, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// Which step, phase, linear, buffer or region.
    pub place: String,
    /// What is the matter, with numbers.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} (rule {:?} of compiled programs; this is a fault of the compiler, please report it)",
            self.place, self.message, self.rule
        )
    }
}

/// `Ok` where the rule holds.
fn ensure(
    holds: bool,
    rule: Rule,
    place: impl fmt::Display,
    message: impl FnOnce() -> String,
) -> Result<(), Violation> {
    if holds {
        return Ok(());
    }
    Err(Violation {
        rule,
        place: place.to_string(),
        message: message(),
    })
}

impl Program {
    /// Checks all rules that need no GPU model; [`Program::fits`] has the rest.
    ///
    /// # Errors
    /// The first rule that is broken, in the order of the list in this file.
    pub fn verify(&self) -> Result<(), Violation> {
        self.verify_mesh()?;
        weights::check(self)?;
        tiles::check(self)?;
        memory::check_norms(self)?;
        phases::check(self)?;
        memory::check_words(self)?;
        memory::check_shared(self)?;
        order::check(self)
    }

    /// Checks that the program is one for this GPU: no more CTAs than SMs, and no more shared memory than a block gets.
    ///
    /// # Errors
    /// The size that is exceeded.
    pub fn fits(&self, gpu: &GpuModel) -> Result<(), Violation> {
        ensure(
            self.mesh.ctas <= gpu.sms as usize,
            Rule::Mesh,
            gpu.name,
            || {
                format!(
                    "{} CTAs on {} SMs cannot be resident at once",
                    self.mesh.ctas, gpu.sms
                )
            },
        )?;
        let limit = gpu.smem_per_block_optin as usize;
        ensure(self.shared.bytes <= limit, Rule::Shared, gpu.name, || {
            format!(
                "{} B of shared memory, a block gets {limit}",
                self.shared.bytes
            )
        })
    }

    fn verify_mesh(&self) -> Result<(), Violation> {
        let (mesh, plan) = (&self.mesh, &self.plan);
        let fail = |message: String| ensure(false, Rule::Mesh, "the mesh", || message);
        if mesh.workers() == 0 || mesh.workers() > mesh.ctas {
            return fail(format!("{mesh} has {} workers", mesh.workers()));
        }
        if self.linears.is_empty() || self.layers == 0 {
            return fail(format!(
                "{} layers of {} linears",
                self.layers,
                self.linears.len()
            ));
        }
        if *mesh != plan.mesh {
            return fail(format!("the plan has {}", plan.mesh));
        }
        let planned = plan.placements.iter().flatten();
        if !planned.eq(self.linears.iter().map(|linear| &linear.placement)) {
            return fail("placements are not the plan's".to_owned());
        }
        if self.wide.is_some() != plan.wide.is_some() {
            return fail("wide steps are not the plan's".to_owned());
        }
        for ((name, step), (_, planned)) in self.steps().zip(plan.steps()) {
            let same = step.columns == planned.columns
                && step.transport == planned.transport
                && step.stream == planned.stream
                && step.kv_splits == planned.kv_splits
                && step.replicate_below == planned.replicate_below;
            if !same {
                return fail(format!("the {name} step is not the plan's"));
            }
        }
        ensure(
            self.attention.heads_per_task == plan.heads_per_task,
            Rule::Mesh,
            &self.attention.name,
            || {
                format!(
                    "{} heads a task, the plan has {}",
                    self.attention.heads_per_task, plan.heads_per_task
                )
            },
        )
    }

    /// A phase's place for people. Phases that name a linear that is not there have only their number.
    fn place(&self, step: &str, at: usize, phase: &Phase) -> String {
        let known = phases::linears_of(phase)
            .into_iter()
            .flatten()
            .all(|index| index < self.linears.len());
        if known {
            format!("{step} phase {at} ({})", self.describe(phase))
        } else {
            format!("{step} phase {at}")
        }
    }
}
