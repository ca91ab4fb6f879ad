//! The per-op baseline on an NVIDIA GPU, launched one by one (B0) or from a CUDA graph (B1).
//!
//! Host time is as [`Timings`](mirage_runtime::baseline::Timings) has it, which leaves out the copy of the prompts and
//! the recording of the graph, to the baseline's favour. Device time is prefill and decode steps between events, gaps
//! between launches included. With stop tokens, when a sequence ended is known only of those that the batch's last step
//! made a token for.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::anyhow;
use mirage_runtime::baseline::{Baseline, BaselineError, GenerateRequest, LaunchMode, Prompt};
use mirage_runtime::gpu::Gpu;

use super::gpu::gpu_error;
use super::sampling;
use crate::model::Model;
use crate::results::{MatrixProduct, Role, Setup, SideFacts};
use crate::side::{Generation, Interrupt, SequenceTimes, Shape, Side, SideError, Work};

fn baseline_error(error: BaselineError) -> SideError {
    match error {
        BaselineError::Gpu(error) => gpu_error(error),
        error => SideError::Failed(error.into()),
    }
}

/// It does not look at single tokens, so that the GPU never waits for the host: all sequences have their first token at
/// one time, and only those with a token of the batch's last step, its token number `made`, are known to end with it.
fn sequence_times(tokens: &[Vec<u32>], made: usize, first: f64, last: f64) -> Vec<SequenceTimes> {
    let times = |tokens: &Vec<u32>| SequenceTimes {
        first,
        last: (tokens.len() == made).then_some(last),
        gaps: Vec::new(),
    };
    tokens.iter().map(times).collect()
}

/// The baseline's model, which its launch modes share.
pub struct SharedBaseline<'a> {
    model: &'a Model,
    gpu: Gpu,
    loaded: Option<Baseline>,
}

impl<'a> SharedBaseline<'a> {
    /// Loads nothing yet.
    pub fn new(model: &'a Model, gpu: &Gpu) -> Rc<RefCell<SharedBaseline<'a>>> {
        Rc::new(RefCell::new(SharedBaseline {
            model,
            gpu: gpu.clone(),
            loaded: None,
        }))
    }

    /// The loaded model with room for that shape.
    fn fit(&mut self, shape: Shape) -> Result<&mut Baseline, SideError> {
        let fits = |baseline: &Baseline| {
            baseline.max_batch() >= shape.batch && baseline.max_seq() >= shape.context
        };
        if !self.loaded.as_ref().is_some_and(fits) {
            // The old one goes first: both at once may not fit.
            self.loaded = None;
            let made = Baseline::new(
                &self.gpu,
                &self.model.typed,
                &self.model.checkpoint,
                shape.batch,
                shape.context,
            )
            .map_err(baseline_error)?;
            self.loaded = Some(made);
        }
        self.get()
    }

    fn get(&mut self) -> Result<&mut Baseline, SideError> {
        self.loaded
            .as_mut()
            .ok_or_else(|| SideError::Failed(anyhow!("it was not prepared")))
    }
}

/// The baseline in one launch mode.
pub struct PerOp<'a> {
    shared: Rc<RefCell<SharedBaseline<'a>>>,
    mode: LaunchMode,
    batch: usize,
}

impl<'a> PerOp<'a> {
    /// B0 or B1, by the mode.
    pub fn new(shared: &Rc<RefCell<SharedBaseline<'a>>>, mode: LaunchMode) -> PerOp<'a> {
        PerOp {
            shared: Rc::clone(shared),
            mode,
            batch: 1,
        }
    }
}

impl Side for PerOp<'_> {
    fn facts(&self) -> SideFacts {
        let (key, label, launches) = match self.mode {
            LaunchMode::Eager => (
                "b0",
                "B0, per-op launches",
                "launched one by one by the host",
            ),
            LaunchMode::Graph => (
                "b1",
                "B1, per-op in a CUDA graph",
                "all launches of a step in one CUDA graph",
            ),
        };
        SideFacts {
            key: key.to_owned(),
            label: label.to_owned(),
            description: format!(
                "the unfused graph, one kernel for each operator, cuBLASLt for the matrix products with the fastest \
                 algorithm of each shape; {launches}"
            ),
            role: Role::Baseline,
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        let begin = Instant::now();
        let mut shared = self.shared.borrow_mut();
        let baseline = shared.fit(shape)?;
        baseline.prepare(shape.batch).map_err(baseline_error)?;
        self.batch = shape.batch;
        Ok(Setup {
            load_s: begin.elapsed().as_secs_f64(),
            launches: Some(format!(
                "{} launches a greedy step",
                baseline.launches_per_step()
            )),
            ..Setup::default()
        })
    }

    fn release(&mut self) {
        self.shared.borrow_mut().loaded = None;
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        if interrupt.is_set() {
            return Err(SideError::Interrupted);
        }
        let prompts = work.sequences.iter().map(|sequence| Prompt {
            tokens: sequence.prompt.clone(),
            sampling: sampling(work.sampling),
            sequence: sequence.stream,
        });
        let request = GenerateRequest {
            prompts: prompts.collect(),
            max_new_tokens: work.max_tokens,
            stop_tokens: work.stop_tokens.clone(),
            mode: self.mode,
        };
        let output = self
            .shared
            .borrow_mut()
            .get()?
            .generate(&request)
            .map_err(baseline_error)?;
        let timings = output.timings;
        let (first, last) = (timings.time_to_first_token / 1e3, timings.total / 1e3);
        let made = 1 + timings.decode_steps;
        Ok(Generation {
            sequences: sequence_times(&output.tokens, made, first, last),
            tokens: output.tokens,
            wall: last,
            device: Some((timings.prefill + timings.decode) / 1e3),
            device_step: (timings.decode_steps > 0)
                .then(|| timings.decode / 1e3 / timings.decode_steps as f64),
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        self.shared
            .borrow_mut()
            .get()?
            .logits(tokens, from..tokens.len())
            .map_err(baseline_error)
    }

    fn matrix_products(&mut self) -> Result<Vec<MatrixProduct>, SideError> {
        let products = self
            .shared
            .borrow_mut()
            .get()?
            .linears(self.batch)
            .map_err(baseline_error)?;
        Ok(products
            .into_iter()
            .map(|product| MatrixProduct {
                gb_s: product.gigabytes_per_second(),
                values: product.values,
                outputs: product.outputs,
                inputs: product.inputs,
                launches: product.launches,
                time_us: product.microseconds,
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_cut_earlier_has_no_time_of_its_own() {
        let times = sequence_times(&[vec![1, 2, 3], vec![1, 9]], 3, 0.5, 2.0);
        assert_eq!((times[0].first, times[0].last), (0.5, Some(2.0)));
        assert_eq!((times[1].first, times[1].last), (0.5, None));
        // The steps that it made before it saw that all had stopped are nobody's.
        assert_eq!(sequence_times(&[vec![1, 9]], 4, 0.5, 2.0)[0].last, None);
    }
}
