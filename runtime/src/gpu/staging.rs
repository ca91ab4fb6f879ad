//! Host memory on the way to the device: filled here, copied while the host goes on.
//!
//! Owns page-locking and the rule that makes such copies safe: nobody writes to the memory, and nobody frees it, before
//! the copy from it has ended.

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};

use super::memory::byte_count;
use super::{DeviceBuffer, Event, Gpu, GpuError, Stream};

/// `length` elements of host memory, from which one copy at a time runs to the device without the host waiting.
///
/// The memory is page-locked, so that the device fetches it at the full rate of its bus. Where the system does not allow
/// that (`ulimit -l`, a container's limits), it is ordinary memory: the driver then copies it once more on the way, which
/// is slower and otherwise the same.
pub struct StagingBuffer<T: Pod> {
    memory: Memory<T>,
    copied: Event,
    gpu: Gpu,
}

enum Memory<T> {
    /// From `cuMemHostAlloc`; the pointer, and the number of elements.
    Locked(*mut T, usize),
    Pageable(Vec<T>),
}

// SAFETY: plain memory without thread affinity, owned by the buffer.
unsafe impl<T: Pod + Send> Send for StagingBuffer<T> {}
// SAFETY: a shared reference gives no access to the memory.
unsafe impl<T: Pod + Sync> Sync for StagingBuffer<T> {}

impl<T: Pod> StagingBuffer<T> {
    /// Allocates `length` elements of zero bytes, page-locked if that is allowed.
    ///
    /// # Errors
    /// A failing driver call other than page-locking.
    pub fn zeroed(gpu: &Gpu, length: usize) -> Result<Self, GpuError> {
        let copied = Event::new(gpu)?;
        let memory = Memory::locked(length);
        Ok(Self {
            memory: memory.unwrap_or_else(|| Memory::Pageable(vec![T::zeroed(); length])),
            copied,
            gpu: gpu.clone(),
        })
    }

    /// Whether the memory is page-locked.
    pub fn is_page_locked(&self) -> bool {
        matches!(self.memory, Memory::Locked(..))
    }

    /// The memory, once the last copy from it has ended; waits for that.
    ///
    /// # Errors
    /// A fault of what ran on the copy's stream before it, or a failing driver call.
    pub fn wait(&mut self) -> Result<&mut [T], GpuError> {
        // An event that was never recorded counts as passed.
        self.copied.synchronize()?;
        Ok(match &mut self.memory {
            // SAFETY: so many elements were allocated and zeroed, and no copy reads them now.
            Memory::Locked(pointer, length) => unsafe {
                std::slice::from_raw_parts_mut(*pointer, *length)
            },
            Memory::Pageable(elements) => elements,
        })
    }

    /// Copies the first `length` elements to those of `to` from `start` on, in the order of `stream`; does not wait.
    ///
    /// # Errors
    /// [`GpuError::Range`], or a failing driver call.
    pub fn send(
        &mut self,
        stream: &Stream,
        length: usize,
        to: &mut DeviceBuffer<T>,
        start: usize,
    ) -> Result<(), GpuError> {
        // One mark stands for one copy.
        let from = self.wait()?;
        let length_of_all = from.len();
        let from = from.get(..length).ok_or(GpuError::Range {
            start: 0,
            end: length,
            length: length_of_all,
        })?;
        // SAFETY: the memory is neither written nor freed before the mark set below is passed: `wait` and `drop` see to it.
        let copying = unsafe { to.enqueue_copy_from(stream, start, from) };
        copying
            .and_then(|()| self.copied.record(stream))
            .inspect_err(|_| {
                // Without a mark there is nothing else to wait for. The error itself is on its way to the caller.
                let _ = stream.synchronize();
            })
    }
}

impl<T: Pod> Memory<T> {
    /// Page-locked memory of zero bytes, in the current context; `None` where it is not to be had.
    fn locked(length: usize) -> Option<Self> {
        // An empty allocation is an error to the driver; one element costs nothing.
        let bytes = byte_count::<T>(length.max(1));
        let mut pointer = std::ptr::null_mut();
        // SAFETY: `Event::new` made a context current, and `pointer` is a valid place.
        let status =
            unsafe { sys::cuMemHostAlloc(&mut pointer, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        if status != CUresult::CUDA_SUCCESS {
            return None;
        }
        // SAFETY: the allocation has so many bytes, is aligned to a page, and is not shared yet.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Some(Memory::Locked(pointer.cast(), length))
    }
}

impl<T: Pod> Drop for StagingBuffer<T> {
    fn drop(&mut self) {
        // A failure here was or will be reported by a call that can return it; what failed reads no memory any more.
        let _ = self.copied.synchronize();
        if let Memory::Locked(pointer, _) = self.memory
            && self.gpu.bind().is_ok()
        {
            // SAFETY: allocated by `cuMemHostAlloc` and freed once.
            let _ = unsafe { sys::cuMemFreeHost(pointer.cast()) };
        }
    }
}
