//! The phases of a step that exchanges rows, as `device/rows.cuh` has them: every worker waits for the flags of all workers,
//! or of its group's, and raises its own once all its threads are through. Whether it had anything to hand on does not
//! matter: a flag tells all that its CTA knows.

use std::collections::HashMap;

use super::super::Violation;
use super::{Buffer, Trace};
use crate::program::{Along, Phase};

impl Trace<'_> {
    pub(super) fn phase_of_rows(&mut self, phase: &Phase, epoch: u64) -> Result<(), Violation> {
        let own_group = |groups: Along| groups == Along::Own;
        match phase {
            Phase::Linear(index) => self.raise(Buffer::Rows(*index), epoch)?,
            Phase::Attention { exchange, .. } => {
                self.await_flags(Buffer::Rows(exchange.source), true, epoch)?;
                self.raise_after_reads(Buffer::HeadRows, epoch)?;
            }
            Phase::CollectHeads { all_groups, .. } => {
                self.await_flags(Buffer::HeadRows, !all_groups, epoch)?;
            }
            Phase::Collect { exchange, .. } => {
                let own = own_group(exchange.groups);
                self.await_flags(Buffer::Rows(exchange.source), own, epoch)?;
            }
            Phase::AddToStream { exchange, .. } => {
                self.await_flags(Buffer::Rows(exchange.source), false, epoch)?;
            }
            Phase::ReduceScatter { exchange, .. } => {
                self.await_flags(Buffer::Rows(exchange.source), false, epoch)?;
                self.raise_after_reads(Buffer::StreamRows(exchange.source), epoch)?;
            }
            Phase::GatherStream { exchange, .. } => {
                self.await_flags(Buffer::StreamRows(exchange.source), false, epoch)?;
            }
        }
        self.end_phase();
        Ok(())
    }

    fn raise(&mut self, buffer: Buffer, epoch: u64) -> Result<(), Violation> {
        for cta in 0..self.program.mesh.workers() {
            self.publish_what_it_knows(buffer, cta, epoch)?;
        }
        Ok(())
    }

    /// The flag of a phase that has read something itself. Rows are overwritten by single threads before it.
    fn raise_after_reads(&mut self, buffer: Buffer, epoch: u64) -> Result<(), Violation> {
        for cta in 0..self.program.mesh.workers() {
            let knows = self.clocks[cta].clone();
            let mut tells = knows.to_vec();
            tells[cta] = self.now + 1;
            self.publish(buffer, cta, &knows, tells.into(), epoch)?;
        }
        Ok(())
    }

    fn await_flags(&mut self, buffer: Buffer, own: bool, epoch: u64) -> Result<(), Violation> {
        let mesh = self.program.mesh;
        let mut known = HashMap::new();
        for cta in 0..mesh.workers() {
            let group = own.then_some(cta / mesh.members);
            let writers: Vec<usize> = match group {
                Some(group) => (group * mesh.members..(group + 1) * mesh.members).collect(),
                None => (0..mesh.workers()).collect(),
            };
            self.join(cta, buffer, &writers, epoch, &mut known, (group, None))?;
        }
        Ok(())
    }
}
