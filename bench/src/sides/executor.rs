//! What both executors of a compiled program share: batches with the host's clock, and logits.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::anyhow;
use mirage_runtime::generate::{Event, Executor, GenerateError, GenerateRequest};
use mirage_runtime::gpu::GpuError;
use mirage_runtime::megakernel::MegakernelError;

use super::sampling;
use crate::side::{Generation, Interrupt, Sequence, SequenceTimes, SideError, Work};

/// Generates a batch, with the moment at which each token was at the host.
pub(super) fn generate(
    executor: &mut dyn Executor,
    work: &Work,
    interrupt: &Interrupt,
) -> Result<Generation, SideError> {
    let requests = requests(work);
    let mut stamps: Vec<Vec<f64>> = vec![Vec::new(); requests.len()];
    let mut tokens: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
    let begin = Instant::now();
    let result = executor.generate(
        &requests,
        interrupt.cancel_handle(),
        &mut |event| match event {
            Event::Token {
                sequence, token, ..
            } => {
                stamps[sequence].push(begin.elapsed().as_secs_f64());
                tokens[sequence].push(token);
            }
            Event::Finished { .. } => {}
        },
    );
    let wall = begin.elapsed().as_secs_f64();
    result.map_err(side_error)?;
    if interrupt.is_set() {
        return Err(SideError::Interrupted);
    }
    Ok(Generation {
        tokens,
        wall,
        device: None,
        device_step: None,
        sequences: stamps.iter().map(|stamps| times(stamps)).collect(),
    })
}

/// Logits after each of the tokens from position `from` on.
pub(super) fn logits(
    executor: &mut dyn Executor,
    tokens: &[u32],
    from: usize,
) -> Result<Vec<f32>, SideError> {
    let scored = executor.score(&[tokens.to_vec()]).map_err(side_error)?;
    let logits = scored
        .into_iter()
        .next()
        .ok_or_else(|| anyhow!("no logits came back"))?;
    let rows = logits.values.get(from * logits.vocab..);
    Ok(rows.unwrap_or_default().to_vec())
}

/// Too little memory is told apart from what ends a run.
fn side_error(error: GenerateError) -> SideError {
    if let GenerateError::Executor(cause) = &error {
        let of_gpu = cause.downcast_ref::<MegakernelError>();
        if let Some(MegakernelError::Gpu(gpu @ GpuError::OutOfMemory { .. })) = of_gpu {
            return SideError::NoRoom(gpu.to_string());
        }
    }
    SideError::Failed(error.into())
}

fn requests(work: &Work) -> Vec<GenerateRequest> {
    let request = |sequence: &Sequence| GenerateRequest {
        prompt: sequence.prompt.clone(),
        max_new_tokens: work.max_tokens,
        sampling: sampling(work.sampling),
        stream: sequence.stream,
        stop_tokens: work.stop_tokens.iter().copied().collect::<BTreeSet<u32>>(),
    };
    work.sequences.iter().map(request).collect()
}

/// First, last and gaps of the moments at which a sequence's tokens came.
pub(super) fn times(stamps: &[f64]) -> SequenceTimes {
    SequenceTimes {
        first: stamps.first().copied().unwrap_or(0.0),
        last: stamps.last().copied(),
        gaps: stamps.windows(2).map(|pair| pair[1] - pair[0]).collect(),
    }
}
