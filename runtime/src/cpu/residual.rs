//! The residual stream: f32, updated by the linears that add to it, and handed on as the next linear's operand in bf16 with
//! the norm's factors applied. The twin of `compiler/device/residual.cuh`; the norm's scale follows in that linear's
//! epilogue.

use mirage_compiler::mesh::share;
use mirage_compiler::plan::StreamForm;
use mirage_compiler::program::{Exchange, VALUES_PER_WORD};

use super::area::{PhaseFault, Values};
use super::cta::{Cta, Now, Operand, Stream};
use super::exchange::View;

/// A worker's place in the scattered stream: a unit of a column.
struct Place {
    unit: usize,
    column: usize,
}

/// The scattered stream's units, `[producers side by side, columns, words]`, as they are shared out.
fn place(view: &View<'_>, columns: usize, index: usize) -> Place {
    let words = view.source().words();
    Place {
        unit: index / words / columns * words + index % words,
        column: index / words % columns,
    }
}

/// Where a unit lies: `[columns, units]`.
fn index_of(view: &View<'_>, unit: usize, column: usize) -> usize {
    column * view.units() + unit
}

impl Cta {
    /// Starts the stream with the embeddings of the step's tokens and prepares the first linear's operand. `writer`: the
    /// exchange of the linears that write the stream, which decides what a worker's share is.
    pub(super) fn embed(
        &mut self,
        now: &Now<'_>,
        form: StreamForm,
        writer: Exchange,
        operand: &Operand<'_>,
    ) {
        let hidden = now.shared.program.hidden;
        let embedding = &now.shared.weights.embedding;
        let columns = now.columns.len();
        let mut whole = Vec::with_capacity(columns * hidden);
        for column in now.columns {
            let row = &embedding[column.token as usize * hidden..][..hidden];
            whole.extend(row.iter().map(|value| value.to_f32()));
        }
        self.sum_squares.fill(0.0);
        for (column, row) in whole.chunks_exact(hidden).enumerate() {
            self.prepare(now, operand, column, 0, row);
        }
        self.stream = match form {
            StreamForm::Replicated => Stream::Replicated(whole),
            StreamForm::Scattered => {
                let view = View::new(now, writer, self);
                let share = share(
                    view.units() * columns,
                    now.shared.mesh.workers(),
                    self.index,
                );
                let of_share = (share.begin..share.begin + share.count).map(|index| {
                    let Place { unit, column } = place(&view, columns, index);
                    let mut values = Values::default();
                    let span = view.span(unit);
                    let row = &whole[column * hidden..][..hidden];
                    values[..span.len()].copy_from_slice(&row[span]);
                    values
                });
                Stream::Scattered(of_share.collect())
            }
        };
    }

    /// Writes a span of one column of the stream as the next linear's operand and adds to its sum of squares.
    fn prepare(
        &mut self,
        now: &Now<'_>,
        operand: &Operand<'_>,
        column: usize,
        begin: usize,
        values: &[f32],
    ) {
        for (index, value) in (begin..).zip(values) {
            let scaled = [value * operand.gamma(index)];
            self.store(now.shared.stride, column, operand.k, index, &scaled);
            self.sum_squares[column] += value * value;
        }
    }

    /// All-reduce: adds what a linear published and prepares the next operand.
    pub(super) fn add_to_stream(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        operand: &Operand<'_>,
    ) -> Result<(), PhaseFault> {
        let Stream::Replicated(mut stream) = std::mem::replace(&mut self.stream, Stream::none())
        else {
            return Err(PhaseFault::Form);
        };
        let view = View::new(now, exchange, self);
        let hidden = now.shared.program.hidden;
        self.sum_squares.fill(0.0);
        for column in 0..now.columns.len() {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if span.is_empty() {
                    continue;
                }
                let sum = view.collect(unit, column, now.epoch)?;
                let begin = span.start;
                let values = &mut stream[column * hidden..][..hidden][span];
                for (value, sum) in values.iter_mut().zip(sum) {
                    *value += sum;
                }
                self.prepare(now, operand, column, begin, values);
            }
        }
        self.stream = Stream::Replicated(stream);
        Ok(())
    }

    /// Reduce-scatter: adds the partials of this worker's share and publishes the new values from word `words_at` on.
    pub(super) fn reduce_scatter(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        words_at: usize,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        let columns = now.columns.len();
        let share = share(
            view.units() * columns,
            now.shared.mesh.workers(),
            self.index,
        );
        let Stream::Scattered(stream) = &mut self.stream else {
            return Err(PhaseFault::Form);
        };
        for (index, values) in (share.begin..).zip(stream) {
            let Place { unit, column } = place(&view, columns, index);
            if view.span(unit).is_empty() {
                continue;
            }
            let sum = view.collect(unit, column, now.epoch)?;
            for (value, sum) in values.iter_mut().zip(sum) {
                *value += sum;
            }
            let at = words_at + index_of(&view, unit, column);
            now.shared.area.publish_values(at, values, now.epoch)?;
        }
        Ok(())
    }

    /// All-gather: collects the published stream, now in bf16, and prepares the next operand.
    pub(super) fn gather_stream(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        words_at: usize,
        operand: &Operand<'_>,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        let columns = now.columns.len();
        self.sum_squares.fill(0.0);
        for column in 0..columns {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let at = words_at + index_of(&view, unit, column);
                    let values = now.shared.area.take_values(at, now.epoch)?;
                    self.prepare(now, operand, column, span.start, &values[..span.len()]);
                }
            }
        }
        Ok(())
    }

    /// Hands the replicated stream on to the CTAs that hold no part of the layers and only help with the head.
    pub(super) fn publish_stream(
        &self,
        now: &Now<'_>,
        writer: Exchange,
        words_at: usize,
    ) -> Result<(), PhaseFault> {
        let Stream::Replicated(stream) = &self.stream else {
            return Err(PhaseFault::Form);
        };
        let view = View::new(now, writer, self);
        let (columns, hidden) = (now.columns.len(), now.shared.program.hidden);
        for column in 0..columns {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let mut values = [0.0; VALUES_PER_WORD];
                    let row = &stream[column * hidden..][..hidden];
                    values[..span.len()].copy_from_slice(&row[span]);
                    let at = words_at + index_of(&view, unit, column);
                    now.shared.area.publish_values(at, &values, now.epoch)?;
                }
            }
        }
        Ok(())
    }
}

impl Stream {
    fn none() -> Stream {
        Stream::Scattered(Vec::new())
    }
}
