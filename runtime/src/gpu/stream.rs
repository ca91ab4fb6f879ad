//! Order and time on the GPU: streams, events, and recorded graphs of launches.

use cudarc::driver::sys::{self, CUresult};

use super::{Gpu, GpuError, check};

/// A queue of work; what is put on it runs in order. Independent of the driver's null stream.
pub struct Stream {
    gpu: Gpu,
    stream: sys::CUstream,
}

// SAFETY: stream handles may be used from any thread in which their context is current.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new, empty stream.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        gpu.bind()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current and `stream` is a valid place.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&mut stream, flags)
        })?;
        Ok(Self {
            gpu: gpu.clone(),
            stream,
        })
    }

    /// The GPU it belongs to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Waits until everything put on it has ended.
    ///
    /// # Errors
    /// The fault of a kernel, or a failing driver call.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: the stream is alive.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(self.stream)
        })
    }

    /// Records what `work` puts on this stream, without running it, as a graph that can be replayed.
    ///
    /// # Errors
    /// Any error of `work`, which must not wait for the stream, or a failing driver call.
    pub fn capture<E: From<GpuError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<CapturedGraph, E> {
        self.gpu.bind()?;
        // The first launch of a kernel loads it, which the stricter modes refuse; what `work` may not do is stated above.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        check("cuStreamBeginCapture", unsafe {
            sys::cuStreamBeginCapture_v2(self.stream, mode)
        })?;
        let worked = work();
        // Ended in every case, or the stream would be of no use afterwards.
        let mut graph = std::ptr::null_mut();
        self.gpu.bind()?;
        // SAFETY: the stream is alive and `graph` is a valid place.
        let captured = check("cuStreamEndCapture", unsafe {
            sys::cuStreamEndCapture(self.stream, &mut graph)
        });
        let made = worked.and_then(|()| {
            captured?;
            let mut exec = std::ptr::null_mut();
            // SAFETY: the graph was captured without an error.
            check("cuGraphInstantiateWithFlags", unsafe {
                sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0)
            })?;
            Ok(CapturedGraph {
                gpu: self.gpu.clone(),
                exec,
            })
        });
        if !graph.is_null() {
            // SAFETY: the instance does not refer to the template any more.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made
    }

    /// Makes the context current, if `other` is the same GPU.
    pub(super) fn bind_with(&self, other: &Gpu) -> Result<(), GpuError> {
        if !self.gpu.is_same(other) {
            return Err(GpuError::WrongGpu { what: "the stream" });
        }
        self.gpu.bind()
    }

    /// The driver's handle.
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: created once, destroyed once; queued work still runs to its end.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}

/// A mark in a stream, with the time at which the GPU passed it.
pub struct Event {
    gpu: Gpu,
    event: sys::CUevent,
}

// SAFETY: event handles may be used from any thread in which their context is current.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event, not recorded yet.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        gpu.bind()?;
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: a context is current and `event` is a valid place.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut event, flags)
        })?;
        Ok(Self {
            gpu: gpu.clone(),
            event,
        })
    }

    /// Sets the mark after everything that is on `stream` now.
    ///
    /// # Errors
    /// A failing driver call.
    pub fn record(&self, stream: &Stream) -> Result<(), GpuError> {
        stream.bind_with(&self.gpu)?;
        // SAFETY: event and stream are alive.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.event, stream.stream)
        })
    }

    /// Waits until the GPU has passed the mark.
    ///
    /// # Errors
    /// The fault of a kernel, or a failing driver call.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: the event is alive.
        check("cuEventSynchronize", unsafe {
            sys::cuEventSynchronize(self.event)
        })
    }

    /// Whether the GPU has passed the mark.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    pub fn is_passed(&self) -> Result<bool, GpuError> {
        self.gpu.bind()?;
        // SAFETY: the event is alive.
        ended("cuEventQuery", unsafe { sys::cuEventQuery(self.event) })
    }

    /// Milliseconds of GPU time from `earlier` to this mark, to about half a microsecond. Waits for this mark.
    ///
    /// # Errors
    /// Events that were not recorded, or a failing driver call.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32, GpuError> {
        self.synchronize()?;
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;
        let mut milliseconds = 0.0;
        // The bindings for CUDA 13 know only the symbol of CUDA 12.8; the older one is in every driver.
        // SAFETY: the driver library is loaded, and the symbol has had this signature since CUDA 2.0.
        let status = unsafe {
            match sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0") {
                Ok(elapsed) => elapsed(&mut milliseconds, earlier.event, self.event),
                Err(_) => CUresult::CUDA_ERROR_NOT_FOUND,
            }
        };
        check("cuEventElapsedTime", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: created once, destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

/// A recorded sequence of launches with their parameters, replayed with one call.
pub struct CapturedGraph {
    gpu: Gpu,
    exec: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread, one at a time, which `&mut self` in `launch` ensures.
unsafe impl Send for CapturedGraph {}

impl CapturedGraph {
    /// Puts the whole sequence on `stream`.
    ///
    /// # Errors
    /// A failing driver call. Faults of its kernels surface at a later call that waits for them.
    ///
    /// # Safety
    /// Everything the recorded launches point to must be alive and stay so until the replay has ended.
    pub unsafe fn launch(&mut self, stream: &Stream) -> Result<(), GpuError> {
        stream.bind_with(&self.gpu)?;
        // SAFETY: the instance and the stream are alive; the rest is the caller's promise.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(self.exec, stream.stream)
        })
    }
}

impl Drop for CapturedGraph {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: created once, destroyed once.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}

/// Reads the status of a query: done, not done yet, or failed.
fn ended(call: &'static str, status: CUresult) -> Result<bool, GpuError> {
    if status == CUresult::CUDA_ERROR_NOT_READY {
        return Ok(false);
    }
    check(call, status).map(|()| true)
}
