//! Collecting what other CTAs published: the twin of `compiler/device/exchange.cuh`.

use std::ops::Range;

use mirage_compiler::program::{Along, Exchange, Linear, VALUES_PER_WORD};

use super::Shared;
use super::area::{PhaseFault, Values};
use super::cta::{Cta, Now};

/// One CTA's view of a linear's output. A unit is one word's place: six values of one column of one of the producers that
/// are read side by side.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    shared: &'a Shared,
    source: &'a Linear,
    exchange: Exchange,
    columns: usize,
    group: usize,
    member: usize,
}

impl<'a> View<'a> {
    pub(super) fn new(now: &Now<'a>, exchange: Exchange, cta: &Cta) -> View<'a> {
        View {
            shared: now.shared,
            source: &now.shared.program.linears[exchange.source],
            exchange,
            columns: now.columns.len(),
            group: cta.group,
            member: cta.member,
        }
    }

    /// The linear that is read.
    pub(super) fn source(&self) -> &'a Linear {
        self.source
    }

    /// Units of a column.
    pub(super) fn units(&self) -> usize {
        let mesh = &self.shared.mesh;
        let side_by_side = |along: Along, size| if along == Along::Concat { size } else { 1 };
        side_by_side(self.exchange.groups, mesh.groups)
            * side_by_side(self.exchange.members, mesh.members)
            * self.source.words()
    }

    /// Coordinates of a unit's producer: of the first where it is a sum over several.
    fn producer(&self, unit: usize) -> (usize, usize) {
        let producer = unit / self.source.words();
        let members = if self.exchange.members == Along::Concat {
            self.shared.mesh.members
        } else {
            1
        };
        let along = |along: Along, own, index| match along {
            Along::Own => own,
            Along::Concat => index,
            Along::Sum => 0,
        };
        (
            along(self.exchange.groups, self.group, producer / members),
            along(self.exchange.members, self.member, producer % members),
        )
    }

    /// The outputs of the source that a unit holds; none where the word is not used.
    pub(super) fn span(&self, unit: usize) -> Range<usize> {
        let linear = self.source;
        let (group, member) = self.producer(unit);
        let (rows, _) = linear.slice(&self.shared.mesh, group, member);
        let word = unit % linear.words();
        let (pass, within) = (
            word / linear.pass_words(),
            word % linear.pass_words() * VALUES_PER_WORD,
        );
        let of_tile = linear.outputs_per_tile();
        let of_pass = linear.pass_rows(rows.count, pass) * of_tile;
        let used = of_pass.saturating_sub(within).min(VALUES_PER_WORD);
        if used == 0 {
            return 0..0;
        }
        let begin = (rows.begin + pass * linear.tiling.pass_tiles) * of_tile + within;
        begin..begin + used
    }

    /// The values of a unit of a column, summed over its partials in the order of the mesh.
    pub(super) async fn collect(
        &self,
        now: &Now<'_>,
        unit: usize,
        column: usize,
    ) -> Result<Values, PhaseFault> {
        let mesh = &self.shared.mesh;
        let words = self.source.words();
        let (group, member) = self.producer(unit);
        let summed = |along: Along, size, own: usize| match along {
            Along::Sum => 0..size,
            Along::Own | Along::Concat => own..own + 1,
        };
        let mut sum = Values::default();
        for g in summed(self.exchange.groups, mesh.groups, group) {
            for m in summed(self.exchange.members, mesh.members, member) {
                let producer = (g * mesh.members + m) * self.columns + column;
                let at = self.source.words_at + producer * words + unit % words;
                let part = now.take_values(at).await?;
                for (sum, part) in sum.iter_mut().zip(part) {
                    *sum += part;
                }
            }
        }
        Ok(sum)
    }
}

impl Cta {
    /// Collects a linear's output into the activation: what this CTA's slice of the columns of linear `next` needs.
    pub(super) async fn collect(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        next: &Linear,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        let (_, k) = self.slice(now.shared, next);
        for column in 0..now.columns.len() {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let values = view.collect(now, unit, column).await?;
                    let values = &values[..span.len()];
                    self.store(now.shared.stride, column, k, span.start, values);
                }
            }
        }
        Ok(())
    }
}

/// Publishes the values of one column as words of six, from word `at` on.
pub(super) fn publish(
    now: &Now<'_>,
    at: usize,
    values: impl ExactSizeIterator<Item = f32>,
) -> Result<(), PhaseFault> {
    let words = values.len().div_ceil(VALUES_PER_WORD);
    let mut values = values;
    for word in at..at + words {
        let mut six = Values::default();
        six.iter_mut().zip(&mut values).for_each(|(to, v)| *to = v);
        now.publish_values(word, &six)?;
    }
    Ok(())
}
