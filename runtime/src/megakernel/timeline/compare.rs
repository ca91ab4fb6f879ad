//! A timeline beside the prediction of the same steps.

use std::fmt;

use mirage_compiler::cost::{Machine, Prediction};
use mirage_compiler::program::{Program, Step};

use super::Timeline;

/// Predicted and measured, phase by phase, of both kinds of step.
pub struct Comparison<'a> {
    program: &'a Program,
    clock_mhz: f64,
    /// By kind of step: the prediction and the clocks of each place, where steps were recorded.
    steps: Vec<(&'static str, &'a Step, Prediction, Vec<f64>)>,
}

impl<'a> Comparison<'a> {
    /// Compares what was recorded, at this clock, with what `machine` predicts for columns at position `depth`.
    pub fn new(
        timeline: &Timeline,
        program: &'a Program,
        machine: &Machine,
        depth: usize,
        clock_mhz: f64,
    ) -> Comparison<'a> {
        let kinds = [("prefill", &program.prefill), ("decode", &program.decode)];
        let kinds = kinds.into_iter().enumerate();
        let steps = kinds.filter(|(kind, _)| timeline.steps[*kind] > 0);
        let steps = steps.map(|(kind, (name, step))| {
            let predicted = Prediction::new(program, machine, kind == 1, depth);
            let places = step.layer.len() + 2;
            (
                name,
                step,
                predicted,
                timeline.clocks_of_places(kind, places),
            )
        });
        Comparison {
            program,
            clock_mhz,
            steps: steps.collect(),
        }
    }
}

impl fmt::Display for Comparison<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = self.program.layers as f64;
        for (name, step, predicted, clocks) in &self.steps {
            writeln!(
                f,
                "{name}: predicted and measured us at {:.0} MHz, on average over the CTAs",
                self.clock_mhz
            )?;
            let mut row = |predicted: f64, measured: f64, what: &str| {
                // What ends a prefill step belongs to its last phase.
                if measured == 0.0 {
                    return Ok(());
                }
                writeln!(
                    f,
                    "  {predicted:8.2} {measured:8.2}  {:5.2}  {what}",
                    predicted / measured
                )
            };
            let us = |clocks: &[f64]| clocks.iter().sum::<f64>() / self.clock_mhz;
            let [_, phases @ .., _] = clocks.as_slice() else {
                continue;
            };
            for ((phase, time), clocks) in step.layer.iter().zip(&predicted.phases).zip(phases) {
                row(
                    *time,
                    us(&[*clocks]) / layers,
                    &self.program.describe(phase),
                )?;
            }
            row(
                predicted.phases.iter().sum(),
                us(phases) / layers,
                "a layer",
            )?;
            row(
                predicted.head,
                us(&clocks[clocks.len() - 1..]),
                "after the layers",
            )?;
            row(predicted.total, us(clocks), "a step")?;
        }
        Ok(())
    }
}
