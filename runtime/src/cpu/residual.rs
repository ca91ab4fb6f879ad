//! The residual stream: f32, updated by the linears that add to it, and handed on as the next linear's operand in bf16 with
//! the norm's factors applied. The twin of `compiler/device/residual.cuh`; the norm's scale follows in that linear's
//! epilogue.

use std::ops::Range;

use mirage_compiler::mesh::share;
use mirage_compiler::plan::StreamForm;
use mirage_compiler::program::Exchange;

use super::area::{PhaseFault, Values};
use super::cta::{Cta, Now, Operand, Stream};
use super::exchange::View;

/// What one pass of one producer gives of a column: the grain in which the scattered stream is shared out.
#[derive(Clone)]
struct Run {
    /// Counted over the column's runs.
    run: usize,
    column: usize,
    /// Its units.
    units: Range<usize>,
}

/// The runs of a worker.
fn runs(now: &Now<'_>, view: &View<'_>, cta: usize) -> Vec<Run> {
    let (linear, columns) = (view.source(), now.columns.len());
    let (passes, words) = (linear.tiling.passes, linear.pass_words());
    let all = runs_of_column(view) * columns;
    let share = share(all, now.shared.mesh.workers(), cta);
    let run = |index: usize| {
        let run = index / columns;
        let first = run / passes * linear.words() + run % passes * words;
        Run {
            run,
            column: index % columns,
            units: first..first + words,
        }
    };
    (share.begin..share.begin + share.count).map(run).collect()
}

fn runs_of_column(view: &View<'_>) -> usize {
    view.units() / view.source().pass_words()
}

/// Where a unit of the handed-on stream lies: `[columns, units]`.
fn operand_at(view: &View<'_>, unit: usize, column: usize) -> usize {
    column * view.units() + unit
}

/// Where a run's sum of squares lies, behind the units: `[columns, runs]`.
fn squares_at(now: &Now<'_>, view: &View<'_>, run: usize, column: usize) -> usize {
    now.columns.len() * view.units() + column * runs_of_column(view) + run
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
                let mut share = Vec::new();
                for Run { column, units, .. } in runs(now, &view, self.index) {
                    let row = &whole[column * hidden..][..hidden];
                    share.extend(units.map(|unit| {
                        let span = view.span(unit);
                        let mut values = Values::default();
                        values[..span.len()].copy_from_slice(&row[span]);
                        values
                    }));
                }
                Stream::Scattered(share)
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
    pub(super) async fn add_to_stream(
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
                let sum = view.collect(now, unit, column).await?;
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

    /// Reduce-scatter: adds the partials of this worker's share and publishes it, from word `words_at` on, as the next
    /// operand.
    pub(super) async fn reduce_scatter(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        words_at: usize,
        operand: &Operand<'_>,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        let runs = runs(now, &view, self.index);
        let Stream::Scattered(stream) = &mut self.stream else {
            return Err(PhaseFault::Form);
        };
        // A warp publishes a run when it has it.
        let mut order: Vec<usize> = (0..runs.len()).collect();
        now.memory.shuffle(&mut order);
        let of_run = view.source().pass_words();
        for index in order {
            let Run { run, column, units } = runs[index].clone();
            let stream = &mut stream[index * of_run..][..of_run];
            let mut squares = 0.0;
            for (unit, values) in units.zip(stream) {
                let span = view.span(unit);
                if span.is_empty() {
                    continue;
                }
                let sum = view.collect(now, unit, column).await?;
                let mut scaled = Values::default();
                for (((value, sum), scaled), index) in
                    values.iter_mut().zip(sum).zip(&mut scaled).zip(span)
                {
                    *value += sum;
                    *scaled = *value * operand.gamma(index);
                    squares += *value * *value;
                }
                now.publish_values(words_at + operand_at(&view, unit, column), &scaled)?;
            }
            let at = words_at + squares_at(now, &view, run, column);
            now.publish(at, [squares.to_bits(); 3])?;
        }
        Ok(())
    }

    /// All-gather: collects a handed-on stream as the next operand.
    pub(super) async fn gather_stream(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        words_at: usize,
        operand: &Operand<'_>,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        for column in 0..now.columns.len() {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let at = words_at + operand_at(&view, unit, column);
                    let values = now.take_values(at).await?;
                    let values = &values[..span.len()];
                    self.store(now.shared.stride, column, operand.k, span.start, values);
                }
            }
            let mut squares = 0.0;
            for run in 0..runs_of_column(&view) {
                let at = words_at + squares_at(now, &view, run, column);
                squares += f32::from_bits(now.take(at).await?[0]);
            }
            self.sum_squares[column] = squares;
        }
        Ok(())
    }

    /// Hands the operand, which the replicated stream was prepared for, on to the CTAs that hold no part of the layers and
    /// only help with the head.
    pub(super) fn publish_stream(
        &self,
        now: &Now<'_>,
        writer: Exchange,
        words_at: usize,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, writer, self);
        for column in 0..now.columns.len() {
            let row = &self.activation[column * now.shared.stride..];
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let mut values = Values::default();
                    values[..span.len()].copy_from_slice(&row[span]);
                    let at = words_at + operand_at(&view, unit, column);
                    now.publish_values(at, &values)?;
                }
            }
            // The whole sum stands in a column's first run.
            for run in 0..runs_of_column(&view) {
                let squares = if run == 0 {
                    self.sum_squares[column]
                } else {
                    0.0
                };
                let at = words_at + squares_at(now, &view, run, column);
                now.publish(at, [squares.to_bits(); 3])?;
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
