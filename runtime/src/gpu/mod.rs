//! The GPU as the runtime sees it: one device, its modules, memory, streams and events.
//!
//! Owns every call into the CUDA driver. Turns each status into a [`GpuError`] that names the call, and ties the life of
//! every handle to the context it lives in, so that nothing can be used after the GPU it belongs to is closed.
//! It must not know a kernel, a model or a plan: what is launched and with which parameters is the caller's business.
//!
//! What is safe and what is not: allocation, copies that wait, streams, events and queries are safe. A launch is `unsafe`,
//! because the kernel follows raw device pointers that no Rust type can vouch for; so are copies that return before the
//! host memory they read or write is free again, unless the memory knows of them ([`StagingBuffer`]).
//!
//! The driver library is loaded when the first [`Gpu`] is opened. Only symbols of CUDA 12.0 are used, so any driver from
//! [`MINIMUM_DRIVER`] on works; whether it also accepts a cubin depends on the compiler that made it
//! ([`GpuError::Image`]).

mod error;
mod memory;
mod module;
mod staging;
mod stream;

use std::ffi::{CStr, c_int};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use mirage_compiler::arch::{DeviceFacts, GpuModel, UnsupportedDevice};

pub use error::GpuError;
pub use memory::{DeviceBuffer, MappedBuffer};
pub use module::{Function, FunctionAttributes, LaunchConfig, Module};
pub use staging::{Idle, StagingBuffer};
pub use stream::{CapturedGraph, Event, Stream};

pub(crate) use error::check;

/// The oldest driver interface this layer works with, as `1000 * major + 10 * minor`.
pub const MINIMUM_DRIVER: i32 = 12_000;

/// An open GPU. Clones share one context, which is closed with the last clone and the last object made from it.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Context>,
}

struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    properties: Properties,
}

// SAFETY: a CUDA context may be made current on, and its handles used from, any host thread; `Gpu::bind` does so
// before every call.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Context {}

/// What does not change while the device is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Index among the visible devices.
    pub ordinal: usize,
    /// Marketing name, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Domain, bus, device and function, `0000:05:00.0`: what other tools know it by, whatever the order of devices.
    pub pci_bus_id: String,
    /// Streaming multiprocessors.
    pub sm_count: usize,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Largest shared memory of one block, static and dynamic together, with opt-in, in bytes.
    pub shared_bytes_per_block: usize,
    /// Bytes of device memory.
    pub total_memory: usize,
    /// Whether grids may be launched cooperatively.
    pub cooperative_launch: bool,
    /// Newest CUDA interface the driver offers, as `1000 * major + 10 * minor`.
    pub driver_version: i32,
}

impl Properties {
    /// The architecture as the compiler names it: `sm_90` for capability 9.0.
    pub fn arch(&self) -> String {
        let (major, minor) = self.compute_capability;
        format!("sm_{major}{minor}")
    }

    /// The device as the planner sees it.
    ///
    /// # Errors
    /// A compute capability that no kernel of ours is compiled for.
    pub fn model(&self) -> Result<GpuModel, UnsupportedDevice> {
        // Sizes of one GPU fit 32 bits.
        GpuModel::of_device(&DeviceFacts {
            name: &self.name,
            compute_capability: self.compute_capability,
            sms: u32::try_from(self.sm_count).unwrap_or(u32::MAX),
            smem_per_block_optin: u32::try_from(self.shared_bytes_per_block).unwrap_or(u32::MAX),
            l2_bytes: self.l2_bytes as u64,
        })
    }
}

impl Gpu {
    /// How many GPUs can be opened.
    ///
    /// # Errors
    /// No driver library, a driver that does not start or is older than [`MINIMUM_DRIVER`].
    pub fn count() -> Result<usize, GpuError> {
        start_driver()?;
        let mut count: c_int = 0;
        // SAFETY: the driver is initialised and `count` is a valid place for the answer.
        check("cuDeviceGetCount", unsafe {
            sys::cuDeviceGetCount(&mut count)
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens the GPU with the given index among the visible ones (`CUDA_VISIBLE_DEVICES` counts).
    ///
    /// # Errors
    /// No driver library, driver too old, no GPU, no GPU with this index, or a failing driver call.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        let count = Self::count()?;
        if count == 0 {
            return Err(GpuError::NoDevice);
        }
        let index = match c_int::try_from(ordinal) {
            Ok(index) if ordinal < count => index,
            _ => return Err(GpuError::NoSuchDevice { ordinal, count }),
        };
        let mut device: sys::CUdevice = 0;
        // SAFETY: `index` is below the device count.
        check("cuDeviceGet", unsafe {
            sys::cuDeviceGet(&mut device, index)
        })?;
        let properties = read_properties(ordinal, device)?;
        let mut context: sys::CUcontext = std::ptr::null_mut();
        // SAFETY: `device` was just obtained; the context is released when `Context` is dropped.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, device)
        })?;
        Ok(Self {
            inner: Arc::new(Context {
                device,
                context,
                properties,
            }),
        })
    }

    /// What does not change while the device is open.
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Marketing name.
    pub fn name(&self) -> &str {
        &self.inner.properties.name
    }

    /// Streaming multiprocessors.
    pub fn sm_count(&self) -> usize {
        self.inner.properties.sm_count
    }

    /// The architecture as the compiler names it, `sm_90`.
    pub fn arch(&self) -> String {
        self.inner.properties.arch()
    }

    /// Free and total device memory in bytes, as the driver counts them now.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is current and both places are valid.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok((free, total))
    }

    /// Waits for all work on this GPU.
    ///
    /// # Errors
    /// The first error of any kernel launched before, or a failing driver call.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.bind()?;
        // SAFETY: a context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Makes the context current on the calling thread, as every driver call needs it.
    pub(crate) fn bind(&self) -> Result<(), GpuError> {
        // SAFETY: the context is retained for as long as `inner` lives.
        check("cuCtxSetCurrent", unsafe {
            sys::cuCtxSetCurrent(self.inner.context)
        })
    }

    /// Whether two values stand for the same open context.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.inner.context == other.inner.context
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(&self.inner.properties).finish()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: balances the retain in `Gpu::open`. An error cannot be reported from here and leaves nothing to undo.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Loads the driver library and initialises it; cheap after the first time.
fn start_driver() -> Result<(), GpuError> {
    // cudarc panics on the first call where the library is missing, so ask before.
    // SAFETY: only opens and closes the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::NoDriverLibrary);
    }
    // SAFETY: the library is present; every driver since 2007 exports both symbols.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(GpuError::at_start)?;
    let found = driver_version()?;
    if found < MINIMUM_DRIVER {
        return Err(GpuError::DriverTooOld {
            found,
            needed: MINIMUM_DRIVER,
        });
    }
    Ok(())
}

fn driver_version() -> Result<i32, GpuError> {
    let mut version: c_int = 0;
    // SAFETY: called after the library was found; `version` is a valid place.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    Ok(version)
}

fn read_properties(ordinal: usize, device: sys::CUdevice) -> Result<Properties, GpuError> {
    let mut name = [0u8; 256];
    // SAFETY: the buffer has the stated length and the driver ends the name with a zero byte.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device)
    })?;
    let name = CStr::from_bytes_until_nul(&name)
        .map_or_else(|_| "unnamed".into(), |n| n.to_string_lossy().into_owned());
    let mut bus_id = [0u8; 32];
    // SAFETY: the buffer has the stated length and the driver ends the text with a zero byte.
    check("cuDeviceGetPCIBusId", unsafe {
        sys::cuDeviceGetPCIBusId(bus_id.as_mut_ptr().cast(), bus_id.len() as c_int, device)
    })?;
    let pci_bus_id = CStr::from_bytes_until_nul(&bus_id)
        .map_or_else(|_| String::new(), |id| id.to_string_lossy().into_owned());
    let mut total_memory = 0;
    // SAFETY: `device` is a valid device.
    check("cuDeviceTotalMem", unsafe {
        sys::cuDeviceTotalMem_v2(&mut total_memory, device)
    })?;
    let attribute = |attribute| -> Result<u32, GpuError> {
        let mut value: c_int = 0;
        // SAFETY: `device` is a valid device, and all attributes asked for are older than the minimum driver.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, attribute, device)
        })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    Ok(Properties {
        ordinal,
        name,
        pci_bus_id,
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        shared_bytes_per_block: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )? as usize,
        total_memory,
        cooperative_launch: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        driver_version: driver_version()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(capability: (u32, u32)) -> Properties {
        Properties {
            ordinal: 0,
            name: String::new(),
            pci_bus_id: String::new(),
            sm_count: 1,
            compute_capability: capability,
            l2_bytes: 0,
            shared_bytes_per_block: 0,
            total_memory: 0,
            cooperative_launch: true,
            driver_version: MINIMUM_DRIVER,
        }
    }

    #[test]
    fn architectures_are_named_as_the_compiler_names_them() {
        let check = |capability, arch: &str| assert_eq!(properties(capability).arch(), arch);
        check((8, 9), "sm_89");
        check((9, 0), "sm_90");
        check((12, 0), "sm_120");
    }

    /// Holds on every machine: with no driver the library is missed, with one the absurd index is refused.
    #[test]
    fn opening_a_gpu_that_is_not_there_is_one_clear_error() {
        let error = Gpu::open(usize::MAX).expect_err("no machine has that many GPUs");
        // SAFETY: only opens and closes the library.
        if unsafe { sys::is_culib_present() } {
            assert!(!matches!(error, GpuError::NoDriverLibrary), "{error}");
        } else {
            assert!(matches!(error, GpuError::NoDriverLibrary), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("libcuda") && text.contains("install"),
                "{text}"
            );
        }
    }
}
