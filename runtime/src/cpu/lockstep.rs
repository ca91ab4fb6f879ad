//! The CPU executor's way through a step: all CTAs do a piece in parallel, and the next piece begins when all have done it.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use rayon::prelude::*;

use super::area::PhaseFault;
use super::cta::Column;
use super::memory::Lockstep;
use super::step::{Kind, Piece, Run};
use super::{CpuError, CpuModel, TILE};

impl CpuModel {
    /// Runs a step on its columns, as many as the step has. After one that makes logits every CTA holds its own.
    pub(super) fn step(&mut self, kind: Kind, columns: &[Column]) -> Result<(), CpuError> {
        let epoch = self.next_step();
        let CpuModel {
            shared,
            area,
            cache,
            ctas,
            ..
        } = self;
        let run = Run::new(shared, kind, columns, epoch).map_err(|fault| CpuError::Phase {
            phase: format!("{}, all phases", kind.name()),
            layer: 0,
            cta: 0,
            fault,
        })?;
        ctas.iter_mut().for_each(|cta| cta.read = 0);
        for piece in run.pieces() {
            let memory = Lockstep { area, cache };
            let faults: Vec<Option<CpuError>> = ctas
                .par_iter_mut()
                .map(|cta| {
                    if !run.has_part(cta.index, piece) {
                        return None;
                    }
                    let index = cta.index;
                    at_once(run.carry_out(cta, piece, &memory))
                        .err()
                        .map(|fault| CpuError::Phase {
                            phase: run.describe(piece),
                            layer: run.layer(piece),
                            cta: index,
                            fault,
                        })
                })
                .collect();
            // The fault of the lowest CTA counts.
            if let Some(fault) = faults.into_iter().flatten().next() {
                return Err(fault);
            }
            if matches!(piece, Piece::Phase { .. }) {
                cache.append(ctas.iter_mut().flat_map(|cta| cta.appends.drain(..)));
            }
        }
        Ok(())
    }

    /// The logits that the last step that makes some made for a column.
    pub(super) fn logits(&self, column: usize) -> Vec<f32> {
        let mut logits = Vec::with_capacity(self.shared.program.head.rows());
        for cta in &self.ctas {
            let width = self.shared.program.head_rows(cta.index).count * TILE;
            logits.extend_from_slice(&cta.logits[column * width..][..width]);
        }
        // The last tile's padding.
        logits.truncate(self.shared.program.vocab);
        logits
    }
}

/// Runs what never waits.
fn at_once(run: impl Future<Output = Result<(), PhaseFault>>) -> Result<(), PhaseFault> {
    match pin!(run).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => Err(PhaseFault::Waits),
    }
}
