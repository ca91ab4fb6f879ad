//! The chain of kernels that the persistent one is compared with: the same phases, one launch for each hand-over between
//! CTAs, a step as a CUDA graph.
//!
//! Owns the chain's kernels, its graphs and what lies in device memory between kernels. What a generation is given and
//! what comes of it is `run.rs`'s, as for the persistent kernel.

use bytemuck::{Pod, Zeroable};
use mirage_compiler::emit::PhasedSource;
use mirage_compiler::plan::Target;
use mirage_compiler::program::{Program, THREADS};

use super::launch::Params;
use crate::gpu::{
    CapturedGraph, DeviceBuffer, Function, Gpu, GpuError, LaunchConfig, Module, Stream,
};

/// Columns that the device keeps a place for.
const COLUMNS: usize = Target::MAX_COLUMNS;

/// Twin of `PhasedState` in `compiler/device/phased.cuh`, with that of `Columns` in `context.cuh` at its head.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct State {
    pub(super) slot: [i32; COLUMNS],
    pub(super) position: [u32; COLUMNS],
    pub(super) token: [u32; COLUMNS],
    pub(super) first: [u32; COLUMNS],
    pub(super) logits: [u64; COLUMNS],
    pub(super) note: u32,
    pub(super) used: u32,
    pub(super) epoch: u32,
    pub(super) prefill_step: u32,
    pub(super) parity: u32,
    pub(super) padding: u32,
    pub(super) winners: [[u32; 2]; COLUMNS],
}

/// Twin of `PhasedParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct PhasedParams {
    params: Params,
    state: u64,
    saved: u64,
    layer: u64,
}

/// The kernels of a program, as steps.
pub(super) struct Chain {
    begin: Function,
    prefill: Vec<Function>,
    end_prefill: Function,
    prefill_head: Function,
    decode: Vec<Function>,
    head: Function,
    choose: Function,
    end_decode: Function,
    state: DeviceBuffer<State>,
    saved: DeviceBuffer<f32>,
    recorded: Option<Recorded>,
}

/// Steps with their parameters.
struct Recorded {
    params: Params,
    prefill: CapturedGraph,
    /// The one that makes the first tokens.
    last_prefill: CapturedGraph,
    decode: CapturedGraph,
}

impl Chain {
    /// Loads the kernels.
    pub(super) fn load(
        gpu: &Gpu,
        program: &Program,
        source: &PhasedSource,
        cubin: &[u8],
    ) -> Result<Chain, GpuError> {
        let module = Module::load(gpu, cubin)?;
        let function = |name: &str| -> Result<Function, GpuError> {
            let function = module.function(name)?;
            function.set_dynamic_shared_bytes(program.shared.bytes)?;
            Ok(function)
        };
        let all = |names: &[String]| -> Result<Vec<Function>, GpuError> {
            names.iter().map(|name| function(name)).collect()
        };
        Ok(Chain {
            begin: function(PhasedSource::BEGIN)?,
            prefill: all(&source.prefill)?,
            end_prefill: function(PhasedSource::END_PREFILL)?,
            prefill_head: function(PhasedSource::PREFILL_HEAD)?,
            decode: all(&source.decode)?,
            head: function(PhasedSource::HEAD)?,
            choose: function(PhasedSource::CHOOSE)?,
            end_decode: function(PhasedSource::END_DECODE)?,
            state: DeviceBuffer::zeroed(gpu, 1)?,
            saved: DeviceBuffer::zeroed(gpu, program.mesh.ctas * source.saved_floats)?,
            recorded: None,
        })
    }

    /// Kernels of a decode step.
    pub(super) fn launches(&self, program: &Program) -> usize {
        self.decode.len() * program.layers + 3
    }

    /// Takes in a generation: records its steps, unless the last one's do, and puts its state on the device.
    pub(super) fn prepare(
        &mut self,
        stream: &Stream,
        program: &Program,
        params: &Params,
        state: State,
    ) -> Result<(), GpuError> {
        self.state.copy_from(stream, 0, &[state])?;
        // The kernels read of these what the state does not have.
        let params = Params {
            epoch: 0,
            prefill_steps: 0,
            ..*params
        };
        if self.recorded.as_ref().is_none_or(|r| r.params != params) {
            self.recorded = None;
            let record = |layer: &[Function], rest: &[(&Function, usize)]| {
                stream.capture(|| {
                    for index in 0..program.layers {
                        for kernel in layer {
                            self.launch(
                                stream,
                                program,
                                &params,
                                kernel,
                                index,
                                program.mesh.ctas,
                            )?;
                        }
                    }
                    for &(kernel, ctas) in rest {
                        self.launch(stream, program, &params, kernel, 0, ctas)?;
                    }
                    Ok::<(), GpuError>(())
                })
            };
            let ctas = program.mesh.ctas;
            let with_head = |layer: &[Function], head: &Function| {
                let rest = [(head, ctas), (&self.choose, ctas), (&self.end_decode, 1)];
                record(layer, &rest)
            };
            let recorded = Recorded {
                params,
                prefill: record(&self.prefill, &[(&self.end_prefill, 1)])?,
                last_prefill: with_head(&self.prefill, &self.prefill_head)?,
                decode: with_head(&self.decode, &self.head)?,
            };
            self.recorded = Some(recorded);
        }
        self.launch(stream, program, &params, &self.begin, 0, program.mesh.ctas)
    }

    fn launch(
        &self,
        stream: &Stream,
        program: &Program,
        params: &Params,
        kernel: &Function,
        layer: usize,
        ctas: usize,
    ) -> Result<(), GpuError> {
        let params = PhasedParams {
            params: *params,
            state: self.state.device_pointer(),
            saved: self.saved.device_pointer(),
            layer: layer as u64,
        };
        let config = LaunchConfig {
            grid: [ctas as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            dynamic_shared_bytes: program.shared.bytes as u32,
        };
        // SAFETY: `PhasedParams` is the twin of the kernels' parameter; what it points to lives in the `Megakernel`,
        // which waits for the stream before it changes or frees any. Every kernel waits for the one before it.
        unsafe { kernel.launch_overlapping(stream, config, &params) }
    }

    /// Puts a prefill step on the stream; the last one makes tokens. Does nothing before the first [`Self::prepare`].
    pub(super) fn prefill_step(&mut self, stream: &Stream, last: bool) -> Result<(), GpuError> {
        match &mut self.recorded {
            // SAFETY: as in `launch`.
            Some(recorded) if last => unsafe { recorded.last_prefill.launch(stream) },
            // SAFETY: as in `launch`.
            Some(recorded) => unsafe { recorded.prefill.launch(stream) },
            None => Ok(()),
        }
    }

    /// Puts a decode step on the stream. Does nothing before the first [`Self::prepare`].
    pub(super) fn decode_step(&mut self, stream: &Stream) -> Result<(), GpuError> {
        match &mut self.recorded {
            // SAFETY: as in `launch`.
            Some(recorded) => unsafe { recorded.decode.launch(stream) },
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_device() {
        assert_eq!(size_of::<State>(), 64 * (4 * 4 + 8 + 8) + 24);
        assert_eq!(size_of::<PhasedParams>(), 160 + 24);
    }
}
