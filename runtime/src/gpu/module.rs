//! Compiled code on the GPU: modules, their kernels, and how kernels are launched.

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUresult};
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection};

use super::{Gpu, GpuError, Stream, check, error::describe};

/// A loaded cubin. Unloaded with the last clone and the last [`Function`] of it.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Loaded>,
}

struct Loaded {
    gpu: Gpu,
    module: sys::CUmodule,
}

// SAFETY: module handles may be used from any thread in which their context is current.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Module {
    /// Loads a cubin (or PTX text ending with a zero byte) onto `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Image`] if it is no code for this GPU and driver, or a failing driver call.
    pub fn load(gpu: &Gpu, cubin: &[u8]) -> Result<Self, GpuError> {
        gpu.bind()?;
        // The driver takes no length: it goes by what an ELF file's headers promise, or by a PTX text's zero byte. So
        // refuse what has neither: it would read past the end.
        let whole = if cubin.starts_with(ELF_MAGIC) {
            is_whole_elf(cubin)
        } else {
            cubin.last() == Some(&0)
        };
        if !whole {
            return Err(Self::refused(
                gpu,
                "not a cubin".into(),
                "neither a whole ELF file nor PTX text".into(),
            ));
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is an ELF file or ends with a zero byte.
        let status = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        match status {
            CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_SOURCE
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_INVALID_PTX => {
                let (name, text) = describe(status);
                return Err(Self::refused(gpu, name, text));
            }
            status => check("cuModuleLoadData", status)?,
        }
        Ok(Self {
            inner: Arc::new(Loaded {
                gpu: gpu.clone(),
                module,
            }),
        })
    }

    fn refused(gpu: &Gpu, name: String, text: String) -> GpuError {
        let p = gpu.properties();
        GpuError::Image {
            gpu: p.name.clone(),
            arch: p.arch(),
            name,
            text,
            driver: p.driver_version,
        }
    }

    /// The kernel of that (unmangled) name.
    ///
    /// # Errors
    /// [`GpuError::NoFunction`], or a failing driver call.
    pub fn function(&self, name: &str) -> Result<Function, GpuError> {
        self.inner.gpu.bind()?;
        let missing = || GpuError::NoFunction {
            name: name.to_owned(),
        };
        let c_name = CString::new(name).map_err(|_| missing())?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name ends with a zero byte.
        let status =
            unsafe { sys::cuModuleGetFunction(&mut function, self.inner.module, c_name.as_ptr()) };
        if status == CUresult::CUDA_ERROR_NOT_FOUND {
            return Err(missing());
        }
        check("cuModuleGetFunction", status)?;
        let read = |attribute| -> Result<usize, GpuError> {
            let mut value: c_int = 0;
            // SAFETY: the function was just obtained.
            check("cuFuncGetAttribute", unsafe {
                sys::cuFuncGetAttribute(&mut value, attribute, function)
            })?;
            Ok(usize::try_from(value).unwrap_or(0))
        };
        let attributes = FunctionAttributes {
            registers: read(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: read(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_shared_bytes: read(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads_per_block: read(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        };
        Ok(Function {
            module: self.clone(),
            function,
            name: name.to_owned(),
            attributes,
        })
    }
}

/// A launch attribute, its value still zero.
fn attribute(id: sys::CUlaunchAttributeID) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id,
        pad: [0; 4],
        // SAFETY: a union of plain integers, for all of which zero is a value.
        value: unsafe { std::mem::zeroed() },
    }
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Whether all the sections are there that the file's headers promise.
fn is_whole_elf(bytes: &[u8]) -> bool {
    ElfFile64::<Endianness>::parse(bytes)
        .is_ok_and(|file| file.sections().all(|section| section.data().is_ok()))
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: loaded once, unloaded once; the driver waits for kernels that still run.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// What the compiler gave a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionAttributes {
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of local memory of a thread; above 0 where registers were spilled or arrays are indexed.
    pub local_bytes: usize,
    /// Bytes of static shared memory of a block.
    pub static_shared_bytes: usize,
    /// Largest block it can be launched with.
    pub max_threads_per_block: usize,
}

/// Shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block in bytes; above 48 KiB first [`Function::set_dynamic_shared_bytes`].
    pub dynamic_shared_bytes: u32,
}

impl LaunchConfig {
    /// A one-dimensional grid without dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            dynamic_shared_bytes: 0,
        }
    }

    fn blocks(&self) -> usize {
        self.grid.iter().map(|&n| n as usize).product()
    }

    fn threads(&self) -> usize {
        self.block.iter().map(|&n| n as usize).product()
    }
}

/// A kernel of a loaded module.
#[derive(Clone)]
pub struct Function {
    module: Module,
    function: sys::CUfunction,
    name: String,
    attributes: FunctionAttributes,
}

// SAFETY: function handles belong to their module and may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Its name in the module.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers, spills and shared memory.
    pub fn attributes(&self) -> FunctionAttributes {
        self.attributes
    }

    /// Allows launches with up to `bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`GpuError::SharedMemory`] if a block cannot have that much, or a failing driver call.
    pub fn set_dynamic_shared_bytes(&self, bytes: usize) -> Result<(), GpuError> {
        let gpu = &self.module.inner.gpu;
        let limit = gpu
            .properties()
            .shared_bytes_per_block
            .saturating_sub(self.attributes.static_shared_bytes);
        let value = match c_int::try_from(bytes) {
            Ok(value) if bytes <= limit => value,
            _ => {
                return Err(GpuError::SharedMemory {
                    function: self.name.clone(),
                    asked: bytes,
                    limit,
                });
            }
        };
        gpu.bind()?;
        // SAFETY: the function lives as long as its module.
        check("cuFuncSetAttribute", unsafe {
            sys::cuFuncSetAttribute(
                self.function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                value,
            )
        })
    }

    /// How many blocks of `threads` threads and `dynamic_shared_bytes` fit on one multiprocessor at once.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn max_blocks_per_sm(
        &self,
        threads: usize,
        dynamic_shared_bytes: usize,
    ) -> Result<usize, GpuError> {
        self.module.inner.gpu.bind()?;
        let mut blocks: c_int = 0;
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        // SAFETY: the function lives as long as its module.
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.function,
                threads,
                dynamic_shared_bytes,
            )
        })?;
        Ok(usize::try_from(blocks).unwrap_or(0))
    }

    /// Puts the kernel on `stream`, with `params` as its single parameter, passed by value.
    ///
    /// # Errors
    /// A failing driver call. Faults of the kernel itself surface at a later call that waits for it.
    ///
    /// # Safety
    /// `P` must have the layout of the kernel's parameter (`#[repr(C)]`), every device address in it must be valid for
    /// what the kernel does with it, and what it points to must live until the kernel has ended.
    pub unsafe fn launch<P: Copy>(
        &self,
        stream: &Stream,
        config: LaunchConfig,
        params: &P,
    ) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, config, params, &mut []) }
    }

    /// As [`Self::launch`], for a kernel whose blocks wait for each other: all of them run at the same time, or the
    /// launch is refused.
    ///
    /// # Errors
    /// [`GpuError::TooManyBlocks`], [`GpuError::NoCooperativeLaunch`], or a failing driver call.
    ///
    /// # Safety
    /// As [`Self::launch`].
    pub unsafe fn launch_cooperative<P: Copy>(
        &self,
        stream: &Stream,
        config: LaunchConfig,
        params: &P,
    ) -> Result<(), GpuError> {
        let gpu = &self.module.inner.gpu;
        if !gpu.properties().cooperative_launch {
            return Err(GpuError::NoCooperativeLaunch {
                gpu: gpu.name().to_owned(),
            });
        }
        let per_sm =
            self.max_blocks_per_sm(config.threads(), config.dynamic_shared_bytes as usize)?;
        let (asked, limit) = (config.blocks(), per_sm * gpu.sm_count());
        if asked > limit {
            return Err(GpuError::TooManyBlocks {
                function: self.name.clone(),
                asked,
                limit,
            });
        }
        let mut cooperative = attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
        cooperative.value.cooperative = 1;
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, config, params, &mut [cooperative]) }
    }

    /// As [`Self::launch`], for a kernel that may start while the one before it on the stream still runs, where the GPU
    /// can do that: it waits with `griddepcontrol.wait` before it touches what others write (programmatic dependent launch).
    ///
    /// # Errors
    /// A failing driver call.
    ///
    /// # Safety
    /// As [`Self::launch`]; and the kernel must wait as described.
    pub unsafe fn launch_overlapping<P: Copy>(
        &self,
        stream: &Stream,
        config: LaunchConfig,
        params: &P,
    ) -> Result<(), GpuError> {
        if self.module.inner.gpu.properties().compute_capability.0 < 9 {
            // SAFETY: the caller's promise.
            return unsafe { self.enqueue(stream, config, params, &mut []) };
        }
        let mut overlapping = attribute(
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        );
        overlapping.value.programmaticStreamSerializationAllowed = 1;
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, config, params, &mut [overlapping]) }
    }

    /// # Safety
    /// As [`Self::launch`].
    unsafe fn enqueue<P: Copy>(
        &self,
        stream: &Stream,
        config: LaunchConfig,
        params: &P,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<(), GpuError> {
        stream.bind_with(&self.module.inner.gpu)?;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let ([gx, gy, gz], [bx, by, bz]) = (config.grid, config.block);
        let config = sys::CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: config.dynamic_shared_bytes,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the driver copies the parameter before it returns; the rest is the caller's promise.
        check("cuLaunchKernelEx", unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_end_early_are_noticed() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(is_whole_elf(&whole));
        for length in [0, 4, 63, 64, 100, whole.len() / 2, whole.len() - 1] {
            assert!(!is_whole_elf(&whole[..length]), "{length} bytes");
        }
        assert!(!is_whole_elf(b"//\n.version 9.0\0"));
    }
}
