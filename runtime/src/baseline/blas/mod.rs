//! Matrix products through cuBLASLt and cuBLAS, each with the algorithm that was fastest here.
//!
//! Owns the libraries' handles, their workspace, and one [`Matmul`] for every shape and number of rows. bf16 in, f32
//! accumulation, bf16 or f32 out. It must not know operators.
//!
//! How the algorithm is chosen: cuBLASLt names up to [`CANDIDATES`] of them, and cuBLAS, where it is there, has a choice of
//! its own, which counts if it computes the same; each multiplies all of the model's matrices
//! of that shape, one after the other as in a decode step, so that they come from memory and not from the L2 cache; the
//! launches are replayed from a CUDA graph, so that the host's pace does not count; the fastest of [`ROUNDS`] rounds
//! decides.

mod gemm;
mod library;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt::Debug;

use bytemuck::Pod;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys as driver;
use gemm::Gemm;
use half::bf16;

use super::BaselineError;
use super::program::{MatmulShape, Operands};
use crate::gpu::{DeviceBuffer, Event, Gpu, GpuError, Stream, check};

/// Algorithms that are tried for each shape.
const CANDIDATES: usize = 16;
/// Timed replays of each.
const ROUNDS: usize = 4;
/// Bytes that an algorithm may use for partial results; NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `cublasOperation_t` belongs to cuBLAS, whose bindings are not otherwise needed.
const CUBLAS_OP_T: i32 = 1;

/// How much two algorithms' results may differ, in units of their root mean square: far above what the order of additions
/// and rounding to bf16 make, far below what another product would.
const TOLERANCE: f32 = 0.05;

/// The libraries on one GPU, and what it has learnt about the shapes so far.
pub(super) struct Blas {
    gpu: Gpu,
    handle: sys::cublasLtHandle_t,
    gemm: Option<Gemm>,
    workspace: DeviceBuffer<u8>,
    known: BTreeMap<(MatmulShape, usize), Matmul>,
}

/// A prepared product.
struct Matmul {
    layout: Layout,
    algorithm: Algorithm,
    /// Of one launch, as timed.
    microseconds: f64,
}

/// Who does a product, and how.
#[derive(Clone, Copy)]
enum Algorithm {
    /// cuBLASLt, by this algorithm.
    Lt(sys::cublasLtMatmulAlgo_t),
    /// cuBLAS, by its own choice.
    Cublas,
}

// SAFETY: the libraries' handles and descriptions may be used from any thread, by one at a time, as `Blas` not being `Sync`
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
        let handle = result::create_handle()
            .map_err(|error| failed("cublasLtCreate", &error.0, start, 0))?;
        let workspace = DeviceBuffer::zeroed(gpu, WORKSPACE).inspect_err(|_| {
            // SAFETY: just created and not used again.
            let _ = unsafe { result::destroy_handle(handle) };
        })?;
        Ok(Self {
            gpu: gpu.clone(),
            handle,
            gemm: Gemm::new(),
            workspace,
            known: BTreeMap::new(),
        })
    }

    /// Chooses the algorithm for `rows` rows of `shape`, if it is not known yet. `operands` are all the model's products
    /// of that shape; their results are overwritten.
    /// Work on `stream` is waited for.
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
        let mut candidates = self.candidates(&layout)?;
        if self.gemm.is_some()
            && candidates.first().is_some_and(|&first| {
                // SAFETY: the caller's promise.
                unsafe { self.same(stream, &layout, [first, Algorithm::Cublas], operands) }
            })
        {
            candidates.push(Algorithm::Cublas);
        }
        let mut best: Option<(f64, Algorithm)> = None;
        let mut refusal = None;
        for algorithm in candidates {
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
            let none = sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
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
            let none = sys::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED;
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

    fn candidates(&self, layout: &Layout) -> Result<Vec<Algorithm>, BaselineError> {
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
            .map(|found| Algorithm::Lt(found.algo))
            .collect())
    }

    /// Whether two algorithms make the same of random numbers, as far as floating point goes. One that fails does not.
    ///
    /// # Safety
    /// As [`Self::prepare`].
    unsafe fn same(
        &self,
        stream: &Stream,
        layout: &Layout,
        algorithms: [Algorithm; 2],
        operands: &[Operands],
    ) -> bool {
        let Some(&first) = operands.first() else {
            return false;
        };
        let inputs = layout.rows * layout.shape.inputs;
        let outputs = layout.rows * layout.shape.outputs;
        let run = || -> Result<bool, BaselineError> {
            let mut kept = vec![bf16::ZERO; inputs];
            // SAFETY: the operands have these sizes; what the input held is put back below.
            unsafe { read(stream, first.input, &mut kept) }?;
            let numbers: Vec<bf16> = (0..inputs as u64).map(noise).collect();
            // SAFETY: as above.
            unsafe { write(stream, first.input, &numbers) }?;
            let results = algorithms.map(|algorithm| -> Result<Vec<f32>, BaselineError> {
                // SAFETY: the caller's promise.
                unsafe { self.launch(stream, layout, &algorithm, first) }?;
                if layout.shape.full_precision {
                    let mut out = vec![0f32; outputs];
                    // SAFETY: the result has this size.
                    unsafe { read(stream, first.out, &mut out) }?;
                    Ok(out)
                } else {
                    let mut out = vec![bf16::ZERO; outputs];
                    // SAFETY: the result has this size.
                    unsafe { read(stream, first.out, &mut out) }?;
                    Ok(out.into_iter().map(f32::from).collect())
                }
            });
            // SAFETY: as above.
            unsafe { write(stream, first.input, &kept) }?;
            let [a, b] = results;
            Ok(alike(&a?, &b?))
        };
        run().unwrap_or(false)
    }

    /// Microseconds of one product, the mean over all `operands`, in the fastest round.
    ///
    /// # Safety
    /// As [`Self::prepare`].
    unsafe fn time(
        &self,
        stream: &Stream,
        layout: &Layout,
        algorithm: &Algorithm,
        operands: &[Operands],
    ) -> Result<f64, BaselineError> {
        // Once by itself: a candidate that does not run shows it here, and its kernel is loaded.
        if let Some(first) = operands.first() {
            // SAFETY: the caller's promise.
            unsafe { self.launch(stream, layout, algorithm, *first) }?;
            stream.synchronize()?;
        }
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

    /// # Safety
    /// As [`Self::multiply`], with a context current.
    unsafe fn launch(
        &self,
        stream: &Stream,
        layout: &Layout,
        algorithm: &Algorithm,
        operands: Operands,
    ) -> Result<(), BaselineError> {
        let algorithm = match (algorithm, &self.gemm) {
            (Algorithm::Lt(algorithm), _) => algorithm,
            (Algorithm::Cublas, Some(gemm)) => {
                // SAFETY: the caller's promise.
                let done = unsafe {
                    gemm.launch(stream, &self.workspace, layout.shape, layout.rows, operands)
                };
                return done
                    .map_err(|error| failed("cublasGemmEx", &error.0, layout.shape, layout.rows));
            }
            (Algorithm::Cublas, None) => {
                let none = sys::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED;
                return Err(failed("cublasGemmEx", &none, layout.shape, layout.rows));
            }
        };
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
            self.gemm = None;
            // SAFETY: created once, destroyed once.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// Numbers between -1 and 1 that look random.
fn noise(index: u64) -> bf16 {
    // The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    let mut x = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    bf16::from_f32((x >> 40) as f32 / (1 << 23) as f32 - 1.0)
}

/// Whether two results are the same up to [`TOLERANCE`].
fn alike(a: &[f32], b: &[f32]) -> bool {
    let mean_square = a.iter().map(|a| a * a).sum::<f32>() / a.len().max(1) as f32;
    let largest = TOLERANCE * mean_square.sqrt();
    // Written so that a number which is none is no likeness.
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= largest)
}

/// # Safety
/// `address` must be one of device memory that holds as much; a context must be current.
unsafe fn read<T: Pod>(stream: &Stream, address: u64, to: &mut [T]) -> Result<(), GpuError> {
    let bytes = size_of_val(to);
    // SAFETY: the caller's promise; waited for below.
    check("cuMemcpyDtoHAsync", unsafe {
        driver::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), address, bytes, stream.raw())
    })?;
    stream.synchronize()
}

/// # Safety
/// `address` must be one of device memory that holds as much; a context must be current.
unsafe fn write<T: Pod>(stream: &Stream, address: u64, from: &[T]) -> Result<(), GpuError> {
    let bytes = size_of_val(from);
    // SAFETY: the caller's promise; waited for below.
    check("cuMemcpyHtoDAsync", unsafe {
        driver::cuMemcpyHtoDAsync_v2(address, from.as_ptr().cast(), bytes, stream.raw())
    })?;
    stream.synchronize()
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
        result.map_err(|error| failed(call, &error.0, self.shape, self.rows))
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
    status: &dyn Debug,
    shape: MatmulShape,
    rows: usize,
) -> BaselineError {
    let status = format!("{status:?}");
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

    #[test]
    fn another_product_is_not_alike() {
        let a: Vec<f32> = (0..4096).map(|i| noise(i).to_f32()).collect();
        let rounded: Vec<f32> = a.iter().map(|a| a * (1.0 + 1.0 / 256.0)).collect();
        assert!(alike(&a, &a) && alike(&a, &rounded));
        let shifted: Vec<f32> = a.iter().copied().cycle().skip(1).take(4096).collect();
        assert!(!alike(&a, &shifted) && !alike(&a, &a[1..]));
        let mut broken = a.clone();
        broken[7] = f32::NAN;
        assert!(!alike(&a, &broken) && !alike(&broken, &a));
        assert!(a.iter().all(|a| (-1.0..=1.0).contains(a)));
        let mean = a.iter().sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.05, "{mean}");
    }

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
