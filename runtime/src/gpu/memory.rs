//! Device memory, and host memory that the device reads and writes in place.
//!
//! Owns allocation and copies. It must not decide what is stored where.

use std::marker::PhantomData;
use std::mem::size_of;
use std::sync::atomic::AtomicU32;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};

use super::{Gpu, GpuError, Stream, check};

/// `length` elements of device memory. Freed when dropped, which waits for work that may use it.
pub struct DeviceBuffer<T: Pod> {
    gpu: Gpu,
    pointer: sys::CUdeviceptr,
    length: usize,
    element: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Allocates `length` elements of zero bytes.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or a failing driver call.
    pub fn zeroed(gpu: &Gpu, length: usize) -> Result<Self, GpuError> {
        let buffer = Self::uninitialised(gpu, length)?;
        if length > 0 {
            // SAFETY: the allocation has at least this many bytes.
            check("cuMemsetD8", unsafe {
                sys::cuMemsetD8_v2(buffer.pointer, 0, buffer.bytes())
            })?;
            settle()?;
        }
        Ok(buffer)
    }

    /// Allocates a copy of `data`.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or a failing driver call.
    pub fn from_slice(gpu: &Gpu, data: &[T]) -> Result<Self, GpuError> {
        let buffer = Self::uninitialised(gpu, data.len())?;
        if !data.is_empty() {
            // SAFETY: source and destination have this many bytes.
            check("cuMemcpyHtoD", unsafe {
                sys::cuMemcpyHtoD_v2(buffer.pointer, data.as_ptr().cast(), buffer.bytes())
            })?;
            settle()?;
        }
        Ok(buffer)
    }

    /// Allocates without writing. Private: the caller fills it before handing it out.
    fn uninitialised(gpu: &Gpu, length: usize) -> Result<Self, GpuError> {
        gpu.bind()?;
        let mut pointer: sys::CUdeviceptr = 0;
        if length > 0 {
            let asked = byte_count::<T>(length);
            // SAFETY: a context is current and `pointer` is a valid place.
            let status = unsafe { sys::cuMemAlloc_v2(&mut pointer, asked) };
            allocated(gpu, "cuMemAlloc", "device", asked, status)?;
        }
        Ok(Self {
            gpu: gpu.clone(),
            pointer,
            length,
            element: PhantomData,
        })
    }

    /// Copies `data` to the elements from `start` on, in the order of `stream`, and waits.
    ///
    /// # Errors
    /// [`GpuError::Range`], or a failing driver call.
    pub fn copy_from(&mut self, stream: &Stream, start: usize, data: &[T]) -> Result<(), GpuError> {
        if data.is_empty() {
            return self.check_range(start, 0);
        }
        // SAFETY: `data` is borrowed until the wait is over.
        unsafe { self.enqueue_copy_from(stream, start, data) }?;
        stream.synchronize()
    }

    /// Copies `data` to the elements from `start` on, in the order of `stream`; does not wait.
    ///
    /// # Errors
    /// [`GpuError::Range`], or a failing driver call.
    ///
    /// # Safety
    /// `data` must stay as it is until the copy has ended.
    pub unsafe fn enqueue_copy_from(
        &mut self,
        stream: &Stream,
        start: usize,
        data: &[T],
    ) -> Result<(), GpuError> {
        self.check_range(start, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        stream.bind_with(&self.gpu)?;
        // SAFETY: both ranges have this many bytes; that the source stays is the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.at(start),
                data.as_ptr().cast(),
                size_of_val(data),
                stream.raw(),
            )
        })
    }

    /// Copies the first `length` elements of `other` to those from `start` on, in the order of `stream`; does not wait.
    ///
    /// # Errors
    /// [`GpuError::Range`], or a failing driver call.
    pub fn enqueue_copy_of(
        &mut self,
        stream: &Stream,
        start: usize,
        other: &Self,
        length: usize,
    ) -> Result<(), GpuError> {
        self.check_range(start, length)?;
        other.check_range(0, length)?;
        if length == 0 {
            return Ok(());
        }
        stream.bind_with(&self.gpu)?;
        stream.bind_with(&other.gpu)?;
        // SAFETY: both ranges have this many bytes; freeing either buffer waits for the copy.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(
                self.at(start),
                other.pointer,
                byte_count::<T>(length),
                stream.raw(),
            )
        })
    }

    /// Copies the elements from `start` on to `data`, in the order of `stream`, and waits.
    ///
    /// # Errors
    /// [`GpuError::Range`], a fault of a kernel launched on `stream` before, or a failing driver call.
    pub fn copy_to(&self, stream: &Stream, start: usize, data: &mut [T]) -> Result<(), GpuError> {
        self.check_range(start, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        stream.bind_with(&self.gpu)?;
        // SAFETY: both ranges have this many bytes, and `data` is borrowed until the wait below is over.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                data.as_mut_ptr().cast(),
                self.at(start),
                size_of_val(data),
                stream.raw(),
            )
        })?;
        stream.synchronize()
    }

    /// All elements, in the order of `stream`; waits.
    ///
    /// # Errors
    /// As [`Self::copy_to`].
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>, GpuError> {
        let mut data = vec![T::zeroed(); self.length];
        self.copy_to(stream, 0, &mut data)?;
        Ok(data)
    }

    /// Sets every byte to zero, in the order of `stream`; does not wait.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn clear(&mut self, stream: &Stream) -> Result<(), GpuError> {
        if self.length == 0 {
            return Ok(());
        }
        stream.bind_with(&self.gpu)?;
        // SAFETY: the allocation has this many bytes.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(self.pointer, 0, self.bytes(), stream.raw())
        })
    }

    /// The device address of the first element, 0 for an empty buffer. Valid while the buffer lives.
    pub fn device_pointer(&self) -> u64 {
        self.pointer
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.length * size_of::<T>()
    }

    fn at(&self, index: usize) -> sys::CUdeviceptr {
        self.pointer + (index * size_of::<T>()) as u64
    }

    fn check_range(&self, start: usize, length: usize) -> Result<(), GpuError> {
        in_range(start, length, self.length)
    }
}

impl<T: Pod> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.pointer != 0 && self.gpu.bind().is_ok() {
            // SAFETY: allocated in `uninitialised` and freed once. A fault of an earlier kernel may surface here; it
            // was or will be reported by a call that can return it.
            let _ = unsafe { sys::cuMemFree_v2(self.pointer) };
        }
    }
}

/// Page-locked host memory mapped into the device's address space: words that both sides read and write in place.
///
/// The device's accesses are ones that Rust does not see, so the words are atomics. To hand over data, write it first
/// and then its flag with release order (`st.release.sys` on the device); read the flag with acquire order first and
/// then the data.
pub struct MappedBuffer {
    gpu: Gpu,
    host: *mut AtomicU32,
    device: sys::CUdeviceptr,
    length: usize,
}

// SAFETY: plain memory without thread affinity.
unsafe impl Send for MappedBuffer {}
// SAFETY: the words are atomics.
unsafe impl Sync for MappedBuffer {}

impl MappedBuffer {
    /// Allocates `length` words of zero.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or a failing driver call.
    pub fn zeroed(gpu: &Gpu, length: usize) -> Result<Self, GpuError> {
        gpu.bind()?;
        // An empty allocation is an error to the driver; one word costs nothing.
        let asked = byte_count::<AtomicU32>(length.max(1));
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is current and `host` is a valid place.
        let status = unsafe { sys::cuMemHostAlloc(&mut host, asked, flags) };
        allocated(gpu, "cuMemHostAlloc", "pinned host", asked, status)?;
        let mut buffer = Self {
            gpu: gpu.clone(),
            host: host.cast(),
            device: 0,
            length,
        };
        // SAFETY: the allocation has `asked` bytes, is aligned to a page, and is not shared yet.
        unsafe { std::ptr::write_bytes(host.cast::<u8>(), 0, asked) };
        // SAFETY: `host` was allocated with DEVICEMAP.
        check("cuMemHostGetDevicePointer", unsafe {
            sys::cuMemHostGetDevicePointer_v2(&mut buffer.device, host, 0)
        })?;
        Ok(buffer)
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: `length` words were allocated and zeroed, and live as long as the buffer.
        unsafe { std::slice::from_raw_parts(self.host, self.length) }
    }

    /// The device address of the first word. Valid while the buffer lives.
    pub fn device_pointer(&self) -> u64 {
        self.device
    }
}

impl Drop for MappedBuffer {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `cuMemHostAlloc` and freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.host.cast()) };
        }
    }
}

/// Bytes of `length` elements; an absurd product saturates and is then refused by the driver as out of memory.
pub(super) fn byte_count<T>(length: usize) -> usize {
    length.saturating_mul(size_of::<T>())
}

/// Waits for what was put on the driver's null stream. Its copies and fills may return early, and our own streams do
/// not wait for it.
fn settle() -> Result<(), GpuError> {
    // SAFETY: a context is current and the null stream always exists.
    check("cuStreamSynchronize", unsafe {
        sys::cuStreamSynchronize(std::ptr::null_mut())
    })
}

/// Reads the status of an allocation, with the numbers where memory ran out.
fn allocated(
    gpu: &Gpu,
    call: &'static str,
    kind: &'static str,
    asked: usize,
    status: CUresult,
) -> Result<(), GpuError> {
    if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        let (free, total) = gpu.memory()?;
        return Err(GpuError::OutOfMemory {
            kind,
            asked,
            free,
            total,
        });
    }
    check(call, status)
}

fn in_range(start: usize, length: usize, all: usize) -> Result<(), GpuError> {
    match start.checked_add(length) {
        Some(end) if end <= all => Ok(()),
        end => Err(GpuError::Range {
            start,
            end: end.unwrap_or(usize::MAX),
            length: all,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_without_overflow() {
        assert!(in_range(0, 8, 8).is_ok());
        assert!(in_range(8, 0, 8).is_ok());
        assert_eq!(
            in_range(1, 8, 8),
            Err(GpuError::Range {
                start: 1,
                end: 9,
                length: 8
            })
        );
        assert!(in_range(usize::MAX, 2, 8).is_err());
    }

    #[test]
    fn absurd_sizes_saturate() {
        assert_eq!(byte_count::<u64>(3), 24);
        assert_eq!(byte_count::<u64>(usize::MAX / 2), usize::MAX);
    }
}
