//! Matrix products through cuBLASLt, each with the algorithm that was fastest here.
//!
//! Owns the cuBLASLt handle, its workspace, and one [`Matmul`] for every shape and number of rows. bf16 in, f32
//! accumulation, bf16 or f32 out. It must not know operators.
//!
//! How the algorithm is chosen: cuBLASLt names up to [`CANDIDATES`] of them; each multiplies all of the model's matrices
//! of that shape, one after the other as in a decode step; the launches are replayed from a CUDA graph, so that the host's
//! pace does not count; before each round other matrices are read, so that the model's come from memory and not from the
//! L2 cache; the fastest of [`ROUNDS`] rounds decides.

mod library;

use std::collections::BTreeMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::BaselineError;
use super::program::{MatmulShape, Operands};
use crate::gpu::{DeviceBuffer, Event, Gpu, Stream};

/// Algorithms that are tried for each shape.
const CANDIDATES: usize = 16;
/// Timed replays of each.
const ROUNDS: usize = 20;
/// Bytes that an algorithm may use for partial results; NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `cublasOperation_t` belongs to cuBLAS, whose bindings are not otherwise needed.
const CUBLAS_OP_T: i32 = 1;

/// cuBLASLt on one GPU, and what it has learnt about the shapes so far.
pub(super) struct Blas {
    gpu: Gpu,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer<u8>,
    /// Zeros, twice what the L2 cache holds.
    cold: DeviceBuffer<u8>,
    known: BTreeMap<(MatmulShape, usize), Matmul>,
}

/// A prepared product.
struct Matmul {
    layout: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Of one launch, as timed.
    microseconds: f64,
}

// SAFETY: cuBLASLt's handle and descriptions may be used from any thread, by one at a time, as `Blas` not being `Sync`
// ensures.
unsafe impl Send for Blas {}

impl Blas {
    /// Loads the library and starts it on `gpu`.
    ///
    /// # Errors
    /// [`BaselineError::NoBlas`], or those of cuBLASLt and the GPU.
    pub(super) fn new(gpu: &Gpu) -> Result<Self, BaselineError> {
        library::load()?;
        gpu.bind()?;
        let start = MatmulShape {
            outputs: 0,
            inputs: 0,
            full_precision: false,
        };
        let handle =
            result::create_handle().map_err(|error| failed("cublasLtCreate", &error, start, 0))?;
        let cold = 2 * gpu.properties().l2_bytes;
        let buffers = DeviceBuffer::zeroed(gpu, WORKSPACE)
            .and_then(|workspace| Ok((workspace, DeviceBuffer::zeroed(gpu, cold)?)));
        let (workspace, cold) = buffers.inspect_err(|_| {
            // SAFETY: just created and not used again.
            let _ = unsafe { result::destroy_handle(handle) };
        })?;
        Ok(Self {
            gpu: gpu.clone(),
            handle,
            workspace,
            cold,
            known: BTreeMap::new(),
        })
    }

    /// Chooses the algorithm for `rows` rows of `shape`, if it is not known yet. `operands` are all the model's products
    /// of that shape; their results are overwritten.
    ///
    /// # Errors
    /// No algorithm for the shape, or a failing call.
    ///
    /// # Safety
    /// The operands must be addresses of live memory of the sizes that `shape` and `rows` give.
    pub(super) unsafe fn prepare(
        &mut self,
        stream: &Stream,
        shape: MatmulShape,
        rows: usize,
        operands: &[Operands],
    ) -> Result<(), BaselineError> {
        if self.known.contains_key(&(shape, rows)) {
            return Ok(());
        }
        self.gpu.bind()?;
        let layout = Layout::new(shape, rows)?;
        let mut best: Option<(f64, sys::cublasLtMatmulAlgo_t)> = None;
        let mut refusal = None;
        for algorithm in self.candidates(&layout)? {
            // SAFETY: the caller's promise.
            match unsafe { self.time(stream, &layout, &algorithm, operands) } {
                Ok(microseconds) => {
                    if best.is_none_or(|(fastest, _)| microseconds < fastest) {
                        best = Some((microseconds, algorithm));
                    }
                }
                // A candidate may turn out not to run; a broken GPU would fail all of them.
                Err(error) => refusal = Some(error),
            }
        }
        let Some((microseconds, algorithm)) = best else {
            let none = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
            return Err(refusal
                .unwrap_or_else(|| failed("cublasLtMatmulAlgoGetHeuristic", &none, shape, rows)));
        };
        self.known.insert(
            (shape, rows),
            Matmul {
                layout,
                algorithm,
                microseconds,
            },
        );
        Ok(())
    }

    /// Puts a product on `stream`.
    ///
    /// # Errors
    /// A shape that was not prepared, or a failing call.
    ///
    /// # Safety
    /// As [`Self::prepare`], until the product is done; and on one stream at a time, because of the workspace.
    pub(super) unsafe fn multiply(
        &self,
        stream: &Stream,
        shape: MatmulShape,
        rows: usize,
        operands: Operands,
    ) -> Result<(), BaselineError> {
        let Some(matmul) = self.known.get(&(shape, rows)) else {
            let none = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED);
            return Err(failed("cublasLtMatmul", &none, shape, rows));
        };
        self.gpu.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.launch(stream, &matmul.layout, &matmul.algorithm, operands) }
    }

    /// Microseconds of one product as timed by [`Self::prepare`].
    pub(super) fn microseconds(&self, shape: MatmulShape, rows: usize) -> Option<f64> {
        self.known
            .get(&(shape, rows))
            .map(|matmul| matmul.microseconds)
    }

    fn candidates(&self, layout: &Layout) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, BaselineError> {
        let preference = Preference::new(layout)?;
        // SAFETY: plain data that the call overwrites up to `count`.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
            unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: all handles are alive, and the array has the stated length.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                layout.product,
                layout.matrix,
                layout.input,
                layout.out,
                layout.out,
                preference.0,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut count,
            )
        };
        layout.check("cublasLtMatmulAlgoGetHeuristic", status.result())?;
        let count = usize::try_from(count).unwrap_or(0).min(CANDIDATES);
        let usable = |found: &&sys::cublasLtMatmulHeuristicResult_t| {
            found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && found.workspaceSize <= WORKSPACE
        };
        Ok(results[..count]
            .iter()
            .filter(usable)
            .map(|found| found.algo)
            .collect())
    }

    /// Microseconds of one product, the mean over all `operands`, in the fastest round.
    ///
    /// # Safety
    /// As [`Self::prepare`].
    unsafe fn time(
        &self,
        stream: &Stream,
        layout: &Layout,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        operands: &[Operands],
    ) -> Result<f64, BaselineError> {
        // Once by itself: a candidate that does not run shows it here, and its kernel is loaded.
        if let Some(first) = operands.first() {
            // SAFETY: the caller's promise.
            unsafe { self.launch(stream, layout, algorithm, *first) }?;
            stream.synchronize()?;
        }
        let mut empty_cache = stream.capture::<BaselineError>(|| {
            for each in self.others(layout.shape, operands) {
                // SAFETY: the matrices lie in `cold`, the rest is the caller's promise.
                unsafe { self.launch(stream, layout, algorithm, each) }?;
            }
            Ok(())
        })?;
        let mut graph = stream.capture::<BaselineError>(|| {
            for each in operands {
                // SAFETY: the caller's promise.
                unsafe { self.launch(stream, layout, algorithm, *each) }?;
            }
            Ok(())
        })?;
        let (start, end) = (Event::new(&self.gpu)?, Event::new(&self.gpu)?);
        let mut fastest = f64::INFINITY;
        for round in 0..=ROUNDS {
            // SAFETY: as below.
            unsafe { empty_cache.launch(stream) }?;
            start.record(stream)?;
            // SAFETY: the caller's promise; waited for below.
            unsafe { graph.launch(stream) }?;
            end.record(stream)?;
            let milliseconds = f64::from(end.milliseconds_since(&start)?);
            // The first round loads the kernel.
            if round > 0 {
                fastest = fastest.min(milliseconds);
            }
        }
        Ok(1e3 * fastest / operands.len().max(1) as f64)
    }

    /// Products of the same shape with matrices that the model does not have: reading them pushes the model's out of the
    /// L2 cache. None where one matrix is larger than twice that, and pushes itself out.
    fn others(&self, shape: MatmulShape, operands: &[Operands]) -> Vec<Operands> {
        // Two bytes an element; aligned as an algorithm may expect of a matrix.
        let bytes = (2 * shape.outputs * shape.inputs)
            .max(1)
            .next_multiple_of(256);
        let matrices =
            (0..self.cold.len() / bytes).map(|i| self.cold.device_pointer() + (i * bytes) as u64);
        matrices
            .zip(operands.iter().cycle())
            .map(|(matrix, each)| Operands { matrix, ..*each })
            .collect()
    }

    /// # Safety
    /// As [`Self::multiply`], with a context current.
    unsafe fn launch(
        &self,
        stream: &Stream,
        layout: &Layout,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        operands: Operands,
    ) -> Result<(), BaselineError> {
        let (alpha, beta) = (1f32, 0f32);
        let address = |address: u64| address as *mut c_void;
        // SAFETY: the handles are alive, alpha and beta are read before the call returns (they are in the host's memory,
        // the default pointer mode), and the addresses are the caller's promise. C is D and not read, since beta is 0.
        let done = unsafe {
            result::matmul(
                self.handle,
                layout.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                address(operands.matrix),
                layout.matrix,
                address(operands.input),
                layout.input,
                address(operands.out),
                layout.out,
                address(operands.out),
                layout.out,
                algorithm,
                address(self.workspace.device_pointer()),
                WORKSPACE,
                stream.raw().cast(),
            )
        };
        layout.check("cublasLtMatmul", done)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: created once, destroyed once.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// cuBLASLt's description of a product.
///
/// cuBLASLt counts columns first. Read so, a row-major `out[rows, outputs]` is `[outputs, rows]`, which is
/// `matrixᵀᵀ · inputᵀ`: the matrix is `[inputs, outputs]` and transposed, the input `[inputs, rows]` and not.
struct Layout {
    shape: MatmulShape,
    rows: usize,
    product: sys::cublasLtMatmulDesc_t,
    matrix: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Layout {
    fn new(shape: MatmulShape, rows: usize) -> Result<Self, BaselineError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let null = std::ptr::null_mut;
        // Filled one by one, so that what was made is destroyed if a later one fails.
        let mut made = Self {
            shape,
            rows,
            product: null(),
            matrix: null().cast(),
            input: null().cast(),
            out: null().cast(),
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        made.product = made.check(
            "cublasLtMatmulDescCreate",
            result::create_matmul_desc(compute, CUDA_R_32F),
        )?;
        let transposed = CUBLAS_OP_T;
        // SAFETY: the description is alive and the attribute is a 32-bit integer.
        let set = unsafe {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            result::set_matmul_desc_attribute(
                made.product,
                attribute,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        };
        made.check("cublasLtMatmulDescSetAttribute", set)?;
        let layout = |kind, columns: usize, of: usize| {
            // A dimension's limit keeps these in range.
            result::create_matrix_layout(kind, columns as u64, of as u64, columns as i64)
        };
        let result_type = if shape.full_precision {
            CUDA_R_32F
        } else {
            CUDA_R_16BF
        };
        let call = "cublasLtMatrixLayoutCreate";
        made.matrix = made.check(call, layout(CUDA_R_16BF, shape.inputs, shape.outputs))?;
        made.input = made.check(call, layout(CUDA_R_16BF, shape.inputs, rows))?;
        made.out = made.check(call, layout(result_type, shape.outputs, rows))?;
        Ok(made)
    }

    fn check<T>(
        &self,
        call: &'static str,
        result: Result<T, CublasError>,
    ) -> Result<T, BaselineError> {
        result.map_err(|error| failed(call, &error, self.shape, self.rows))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        for layout in [self.matrix, self.input, self.out] {
            if !layout.is_null() {
                // SAFETY: created once, destroyed once.
                let _ = unsafe { result::destroy_matrix_layout(layout) };
            }
        }
        if !self.product.is_null() {
            // SAFETY: created once, destroyed once.
            let _ = unsafe { result::destroy_matmul_desc(self.product) };
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(layout: &Layout) -> Result<Self, BaselineError> {
        let made = Self(layout.check(
            "cublasLtMatmulPreferenceCreate",
            result::create_matmul_pref(),
        )?);
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE;
        // SAFETY: the preference is alive and the attribute is a 64-bit integer.
        let set = unsafe {
            result::set_matmul_pref_attribute(
                made.0,
                attribute,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
        };
        layout.check("cublasLtMatmulPreferenceSetAttribute", set)?;
        Ok(made)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn failed(
    call: &'static str,
    error: &CublasError,
    shape: MatmulShape,
    rows: usize,
) -> BaselineError {
    let status = format!("{:?}", error.0);
    BaselineError::Blas {
        call,
        status,
        rows,
        outputs: shape.outputs,
        inputs: shape.inputs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without the library, the error says where it was looked for; with it, there is none.
    #[test]
    fn a_missing_library_is_named_with_its_places() {
        match library::load() {
            Ok(()) => {}
            Err(BaselineError::NoBlas { looked }) => assert!(!looked.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }
}
