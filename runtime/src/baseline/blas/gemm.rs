//! cuBLAS's own choice for a product, one more candidate beside those of cuBLASLt: it has matrix-vector kernels that
//! cuBLASLt does not offer.

use std::ffi::{c_int, c_void};

use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys::{self, cublasComputeType_t, cublasOperation_t, cudaDataType_t};

use super::library;
use crate::baseline::program::{MatmulShape, Operands};
use crate::gpu::{DeviceBuffer, Stream};

/// cuBLAS on one GPU.
pub(super) struct Gemm {
    handle: sys::cublasHandle_t,
}

impl Gemm {
    /// Starts it on the GPU whose context is current. `None` where the library is missing or does not start: it is wished
    /// for, not needed.
    pub(super) fn new() -> Option<Gemm> {
        if !library::has_cublas() {
            return None;
        }
        let handle = result::create_handle().ok()?;
        Some(Gemm { handle })
    }

    /// Puts a product on `stream`. See [`super::Layout`] for how row-major matrices look to BLAS.
    ///
    /// # Safety
    /// The context must be current, and the operands addresses of live memory of the sizes that `shape` and `rows` give
    /// until the product is done; on one stream at a time, because of the workspace.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        workspace: &DeviceBuffer<u8>,
        shape: MatmulShape,
        rows: usize,
        operands: Operands,
    ) -> Result<(), CublasError> {
        let (alpha, beta) = (1f32, 0f32);
        let address = |address: u64| address as *mut c_void;
        // A dimension's limit keeps these in range.
        let [outputs, inputs, rows] = [shape.outputs, shape.inputs, rows].map(|n| n as c_int);
        let result_type = if shape.full_precision {
            cudaDataType_t::CUDA_R_32F
        } else {
            cudaDataType_t::CUDA_R_16BF
        };
        // SAFETY: the handle is alive; alpha and beta are in the host's memory, the default pointer mode, and read before
        // the call returns; the rest is the caller's promise.
        unsafe {
            result::set_stream(self.handle, stream.raw().cast())?;
            // A new stream takes cuBLAS's own workspace, which it could not allocate while a graph is recorded.
            let space = address(workspace.device_pointer());
            sys::cublasSetWorkspace_v2(self.handle, space, workspace.len()).result()?;
            result::gemm_ex(
                self.handle,
                cublasOperation_t::CUBLAS_OP_T,
                cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                (&raw const alpha).cast(),
                address(operands.matrix),
                cudaDataType_t::CUDA_R_16BF,
                inputs,
                address(operands.input),
                cudaDataType_t::CUDA_R_16BF,
                inputs,
                (&raw const beta).cast(),
                address(operands.out),
                result_type,
                outputs,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; `Blas` makes the context current.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
