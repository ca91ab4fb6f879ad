//! Host memory on the way to the device: filled here, copied while the host goes on.
//!
//! Owns page-locking and the rule that makes such copies safe: nobody writes to the memory, and nobody frees it, before
//! the copy from it has ended.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};
use memmap2::MmapMut;

use super::memory::byte_count;
use super::{DeviceBuffer, Event, Gpu, GpuError, Stream};

/// `length` elements of host memory, from which one copy at a time runs to the device without the host waiting.
///
/// The memory is page-locked, so that the device fetches it at the full rate of its bus. Where the system does not allow
/// that (`ulimit -l`, a container's limits), it is ordinary memory: the driver then copies it once more on the way, which
/// is slower and otherwise the same.
pub struct StagingBuffer<T: Pod> {
    memory: Memory<T>,
    length: usize,
    copied: Event,
    gpu: Gpu,
}

enum Memory<T> {
    /// Whole pages, registered with the driver.
    Locked(MmapMut),
    Pageable(Vec<T>),
}

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
            length,
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
    pub fn wait(&mut self) -> Result<Idle<'_, T>, GpuError> {
        // An event that was never recorded counts as passed.
        self.copied.synchronize()?;
        Ok(Idle { buffer: self })
    }

    fn elements(&self) -> &[T] {
        match &self.memory {
            Memory::Locked(pages) => bytemuck::cast_slice(&pages[..byte_count::<T>(self.length)]),
            Memory::Pageable(elements) => elements,
        }
    }
}

/// The memory of a [`StagingBuffer`] that no copy reads: its elements.
pub struct Idle<'a, T: Pod> {
    buffer: &'a mut StagingBuffer<T>,
}

impl<T: Pod> Deref for Idle<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.buffer.elements()
    }
}

impl<T: Pod> DerefMut for Idle<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = byte_count::<T>(self.buffer.length);
        match &mut self.buffer.memory {
            Memory::Locked(pages) => bytemuck::cast_slice_mut(&mut pages[..bytes]),
            Memory::Pageable(elements) => elements,
        }
    }
}

impl<T: Pod> Idle<'_, T> {
    /// Copies the first `length` elements to those of `to` from `start` on, in the order of `stream`; does not wait.
    ///
    /// # Errors
    /// [`GpuError::Range`], or a failing driver call.
    pub fn send(
        self,
        stream: &Stream,
        length: usize,
        to: &mut DeviceBuffer<T>,
        start: usize,
    ) -> Result<(), GpuError> {
        let from = self.get(..length).ok_or(GpuError::Range {
            start: 0,
            end: length,
            length: self.len(),
        })?;
        // SAFETY: the memory is neither written nor freed before the mark set below is passed: `wait` and `drop` see to it,
        // and nobody else has the memory while this borrows the buffer.
        let copying = unsafe { to.enqueue_copy_from(stream, start, from) };
        copying
            .and_then(|()| self.buffer.copied.record(stream))
            .inspect_err(|_| {
                // Without a mark there is nothing else to wait for. The error itself is on its way to the caller.
                let _ = stream.synchronize();
            })
    }
}

impl<T: Pod> Memory<T> {
    /// Page-locked memory of zero bytes, in the current context; `None` where it is not to be had.
    fn locked(length: usize) -> Option<Self> {
        // An empty mapping is an error to the system; one element costs nothing.
        let mut pages = MmapMut::map_anon(byte_count::<T>(length.max(1))).ok()?;
        // Large pages are locked in a fraction of the time; where there are none, small ones do.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        let (pointer, bytes) = (pages.as_mut_ptr().cast(), pages.len());
        // SAFETY: `Event::new` made a context current. The pages are mapped until they are unregistered (`drop`).
        let status =
            unsafe { sys::cuMemHostRegister_v2(pointer, bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        (status == CUresult::CUDA_SUCCESS).then_some(Memory::Locked(pages))
    }
}

impl<T: Pod> Drop for StagingBuffer<T> {
    fn drop(&mut self) {
        // A failure here was or will be reported by a call that can return it; what failed reads no memory any more.
        let _ = self.copied.synchronize();
        if let Memory::Locked(pages) = &mut self.memory
            && self.gpu.bind().is_ok()
        {
            // SAFETY: registered by `Memory::locked`, and unregistered once.
            let _ = unsafe { sys::cuMemHostUnregister(pages.as_mut_ptr().cast()) };
        }
    }
}
