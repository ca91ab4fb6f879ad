//! What can go wrong between the runtime and the CUDA driver, in words that end with the mend.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};
use thiserror::Error;

/// An error of the GPU layer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GpuError {
    /// The driver library could not be loaded.
    #[error(
        "no CUDA driver on this machine: the library libcuda.so.1 (nvcuda.dll on Windows) was not found; \
         install the NVIDIA driver, or use the CPU executor"
    )]
    NoDriverLibrary,

    /// The driver library is there but did not start.
    #[error(
        "the CUDA driver did not start: {name} ({text}); check with nvidia-smi that the driver is loaded and matches \
         its kernel module, or use the CPU executor"
    )]
    DriverNotStarted {
        /// CUDA's name of the status.
        name: String,
        /// CUDA's description of it.
        text: String,
    },

    /// The driver is older than this layer needs.
    #[error(
        "the CUDA driver offers CUDA {}.{}, and at least {}.{} is needed; update the NVIDIA driver",
        .found / 1000, .found % 1000 / 10, .needed / 1000, .needed % 1000 / 10
    )]
    DriverTooOld {
        /// Version found, `1000 * major + 10 * minor`.
        found: i32,
        /// Version needed, in the same form.
        needed: i32,
    },

    /// A driver but no GPU.
    #[error(
        "the CUDA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU executor"
    )]
    NoDevice,

    /// The index is too high.
    #[error(
        "there is no GPU {ordinal}: {count} visible, numbered from 0; choose a lower number or widen CUDA_VISIBLE_DEVICES"
    )]
    NoSuchDevice {
        /// Index asked for.
        ordinal: usize,
        /// Visible GPUs.
        count: usize,
    },

    /// Device or pinned host memory ran out.
    #[error(
        "out of {kind} memory: {asked} bytes asked for, {free} of {total} bytes of the GPU free; \
         use a smaller batch, context or model, or end other programs on the GPU"
    )]
    OutOfMemory {
        /// `device` or `pinned host`.
        kind: &'static str,
        /// Bytes asked for.
        asked: usize,
        /// Bytes of device memory free.
        free: usize,
        /// Bytes of device memory in all.
        total: usize,
    },

    /// The driver does not accept the compiled code.
    #[error(
        "the GPU {gpu} ({arch}) does not accept this code: {name} ({text}); compile it for {arch}, and with a compiler no \
         newer than the driver (CUDA {}.{})", .driver / 1000, .driver % 1000 / 10
    )]
    Image {
        /// The GPU's name.
        gpu: String,
        /// The architecture it wants.
        arch: String,
        /// CUDA's name of the status.
        name: String,
        /// CUDA's description of it.
        text: String,
        /// The driver's version, `1000 * major + 10 * minor`.
        driver: i32,
    },

    /// The module has no function of that name.
    #[error(
        "the module has no kernel named {name:?}; the cubin and its manifest are not from the same compilation"
    )]
    NoFunction {
        /// Name asked for.
        name: String,
    },

    /// A kernel asks for more shared memory than a block can have.
    #[error(
        "kernel {function} needs {asked} bytes of dynamic shared memory, and at most {limit} are possible on this GPU; \
         compile for this GPU"
    )]
    SharedMemory {
        /// The kernel.
        function: String,
        /// Bytes asked for.
        asked: usize,
        /// Bytes that remain beside the kernel's static shared memory.
        limit: usize,
    },

    /// A cooperative grid does not fit on the GPU at once.
    #[error(
        "kernel {function} needs {asked} blocks at the same time, and {limit} fit on this GPU; compile for this GPU, \
         or end other programs that reserve its multiprocessors"
    )]
    TooManyBlocks {
        /// The kernel.
        function: String,
        /// Blocks asked for.
        asked: usize,
        /// Blocks that fit at once.
        limit: usize,
    },

    /// The GPU cannot launch cooperatively.
    #[error(
        "the GPU {gpu} cannot launch cooperative grids; a GPU of compute capability 6.0 or newer is needed"
    )]
    NoCooperativeLaunch {
        /// The GPU's name.
        gpu: String,
    },

    /// A range does not lie in its buffer.
    #[error("elements {start}..{end} lie outside a buffer of {length} elements")]
    Range {
        /// First element.
        start: usize,
        /// One past the last.
        end: usize,
        /// Elements of the buffer.
        length: usize,
    },

    /// Objects of two GPUs were mixed.
    #[error("{what} belongs to another GPU; use objects of one GPU in a call")]
    WrongGpu {
        /// Which argument.
        what: &'static str,
    },

    /// Any other failing driver call. Kernels report their faults here too, at the next call that waits for them.
    #[error("{call} failed: {name} ({text})")]
    Call {
        /// The driver function.
        call: &'static str,
        /// CUDA's name of the status, `CUDA_ERROR_ILLEGAL_ADDRESS`.
        name: String,
        /// CUDA's description of it.
        text: String,
    },
}

impl GpuError {
    /// Reads a failure of `cuInit`, where a missing device has its own status.
    pub(super) fn at_start(self) -> Self {
        match self {
            Self::Call { name, .. } if name == "CUDA_ERROR_NO_DEVICE" => Self::NoDevice,
            Self::Call { name, text, .. } => Self::DriverNotStarted { name, text },
            other => other,
        }
    }
}

/// Turns a driver status into an error that names the call.
pub(crate) fn check(call: &'static str, status: CUresult) -> Result<(), GpuError> {
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, text) = describe(status);
    Err(GpuError::Call { call, name, text })
}

/// CUDA's name and description of a status.
pub(super) fn describe(status: CUresult) -> (String, String) {
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the library is loaded, since it returned `status`; both places are valid and receive static strings or null.
    unsafe {
        let _ = sys::cuGetErrorName(status, &mut name);
        let _ = sys::cuGetErrorString(status, &mut text);
    }
    let read = |p: *const std::ffi::c_char, otherwise: &str| {
        if p.is_null() {
            otherwise.to_owned()
        } else {
            // SAFETY: a non-null answer is a static string that ends with a zero byte.
            unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
        }
    };
    (
        read(name, &format!("status {}", status as u32)),
        read(text, "no description"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_the_numbers_and_the_mend() {
        let check = |error: GpuError, expect: &[&str]| {
            let text = error.to_string();
            for part in expect {
                assert!(text.contains(part), "{text:?} lacks {part:?}");
            }
        };
        check(
            GpuError::DriverTooOld {
                found: 11_040,
                needed: 12_000,
            },
            &["CUDA 11.4", "at least 12.0", "update"],
        );
        check(
            GpuError::NoSuchDevice {
                ordinal: 3,
                count: 2,
            },
            &["GPU 3", "2 visible", "CUDA_VISIBLE_DEVICES"],
        );
        check(
            GpuError::OutOfMemory {
                kind: "device",
                asked: 100,
                free: 7,
                total: 9,
            },
            &["100 bytes asked", "7 of 9 bytes", "smaller"],
        );
        check(
            GpuError::Range {
                start: 3,
                end: 9,
                length: 8,
            },
            &["3..9", "8 elements"],
        );
    }

    #[test]
    fn a_missing_device_at_start_is_not_a_broken_driver() {
        let call = |name: &str| GpuError::Call {
            call: "cuInit",
            name: name.into(),
            text: String::new(),
        };
        assert_eq!(call("CUDA_ERROR_NO_DEVICE").at_start(), GpuError::NoDevice);
        assert!(matches!(
            call("CUDA_ERROR_STUB_LIBRARY").at_start(),
            GpuError::DriverNotStarted { .. }
        ));
    }
}
