//! What can go wrong with the baseline.

use mirage_compiler::nvrtc::NvrtcError;
use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::gpu::GpuError;
use crate::sampler::SamplingError;

/// An error of the per-op baseline.
#[derive(Debug, Error)]
pub enum BaselineError {
    /// The GPU or its memory.
    #[error(transparent)]
    Gpu(#[from] GpuError),

    /// The kernels could not be compiled.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),

    /// The weights could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// Sampling parameters out of range.
    #[error("prompt {prompt}: {error}")]
    Sampling {
        /// Index of the prompt.
        prompt: usize,
        /// Which parameter.
        error: SamplingError,
    },

    /// No cubin can be made for this GPU.
    #[error(
        "the baseline has no code for {gpu} ({arch}); use a GPU of compute capability 8.0, 8.6, 8.9, 9.0, 10.0 or 12.0"
    )]
    UnknownGpu {
        /// Its name.
        gpu: String,
        /// Its architecture.
        arch: String,
    },

    /// cuBLASLt is missing.
    #[error(
        "cuBLASLt, which multiplies the baseline's matrices, was not found\n  {}\n\
         install it: .venv/bin/pip install 'nvidia-cublas==13.0.*', or set MIRAGE_CUBLASLT to libcublasLt.so.13 or its folder",
        .looked.join("\n  ")
    )]
    NoBlas {
        /// One line for each place looked at.
        looked: Vec<String>,
    },

    /// A cuBLASLt call failed.
    #[error("{call} failed for a product of {rows} rows by [{outputs}, {inputs}]: {status}")]
    Blas {
        /// The function.
        call: &'static str,
        /// Its status.
        status: String,
        /// Rows multiplied at once.
        rows: usize,
        /// Rows of the matrix.
        outputs: usize,
        /// Columns of the matrix.
        inputs: usize,
    },

    /// An operator of a shape the kernels are not made for.
    #[error(
        "the per-op baseline cannot run `{value}`: {rule}; run this model without the baseline (--skip-baseline)"
    )]
    Unsupported {
        /// Name of the operator's result in the graph.
        value: String,
        /// What would be needed.
        rule: String,
    },

    /// A request that cannot be served.
    #[error("{0}")]
    Request(String),
}
