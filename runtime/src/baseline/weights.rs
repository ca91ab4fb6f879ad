//! The checkpoint's weights on the GPU: bf16, row-major, one allocation for each tensor.
//!
//! Owns the upload. It must not rearrange anything: the baseline reads weights as PyTorch stores them.

use half::bf16;
use mirage_compiler::typed::TypedGraph;

use super::BaselineError;
use crate::checkpoint::{Checkpoint, Tensor};
use crate::gpu::{DeviceBuffer, Gpu, Stream};

/// Elements that are converted and copied at once: 32 MiB.
const STAGE: usize = 16 << 20;

/// All weights of a model.
pub(super) struct Weights {
    /// By the graph's index of the weight, then by layer; those outside of layers have one.
    tensors: Vec<Vec<DeviceBuffer<bf16>>>,
}

impl Weights {
    /// Copies the weights that `graph` names to the GPU.
    ///
    /// # Errors
    /// A weight that is missing or of another shape, or too little memory.
    pub(super) fn upload(
        gpu: &Gpu,
        stream: &Stream,
        graph: &TypedGraph,
        checkpoint: &Checkpoint,
    ) -> Result<Self, BaselineError> {
        let mut stage = Vec::new();
        let mut tensors = Vec::new();
        for weight in &graph.weights {
            let copies = if weight.per_layer() { graph.layers } else { 1 };
            let upload = |layer| {
                let tensor = checkpoint.tensor(&weight.name_in(layer))?;
                tensor.expect_shape(&weight.shape)?;
                copy(gpu, stream, &tensor, &mut stage)
            };
            tensors.push(
                (0..copies)
                    .map(upload)
                    .collect::<Result<Vec<_>, BaselineError>>()?,
            );
        }
        Ok(Self { tensors })
    }

    /// Address of a weight, in a layer if it is one per layer.
    pub(super) fn address(&self, index: usize, layer: usize) -> u64 {
        let copies = &self.tensors[index];
        copies[layer.min(copies.len() - 1)].device_pointer()
    }
}

fn copy(
    gpu: &Gpu,
    stream: &Stream,
    tensor: &Tensor<'_>,
    stage: &mut Vec<bf16>,
) -> Result<DeviceBuffer<bf16>, BaselineError> {
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let mut buffer = DeviceBuffer::zeroed(gpu, rows * columns)?;
    let at_once = (STAGE / columns.max(1)).max(1);
    for start in (0..rows).step_by(at_once) {
        let count = at_once.min(rows - start);
        stage.resize(count * columns, bf16::ZERO);
        for (row, out) in stage.chunks_exact_mut(columns.max(1)).enumerate() {
            tensor.read_bf16(start + row, 0, out)?;
        }
        buffer.copy_from(stream, start * columns, stage)?;
    }
    Ok(buffer)
}
