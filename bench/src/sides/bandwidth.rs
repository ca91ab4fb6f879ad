//! The memory bandwidth of a GPU, measured: what rooflines are drawn against.
//!
//! The best of several reads of an array far larger than the L2 cache, by a kernel of its own. A ceiling must not be too
//! low: a share of the roofline is never above 100 %.

use std::time::Duration;

use anyhow::Result;
use mirage_compiler::cubin_cache;
use mirage_compiler::nvrtc::{Options, Source};
use mirage_runtime::gpu::{DeviceBuffer, Event, Gpu, LaunchConfig, Module, Stream};

const SOURCE: &str = include_str!("bandwidth.cu");
/// Largest array to read, in bytes.
const LARGEST: usize = 2 << 30;
/// Reads; the first ones are slower while clocks rise.
const READS: usize = 20;
const THREADS: u32 = 512;
/// Blocks of one SM: all of its threads.
const BLOCKS_PER_SM: u32 = 4;

/// `Params` of `bandwidth.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    data: u64,
    vectors: u64,
    sink: u64,
}

/// Reads bandwidth in GB/s.
///
/// # Errors
/// NVRTC is missing, too little memory, or a failing call.
pub fn measure(gpu: &Gpu) -> Result<f64> {
    let source = Source {
        name: "bandwidth.cu".to_owned(),
        text: SOURCE.to_owned(),
        headers: Vec::new(),
    };
    let fetched = cubin_cache::fetch(&source, gpu.properties().model()?.arch, &Options::default())?;
    let function = Module::load(gpu, &fetched.compiled.cubin)?.function("stream_read")?;
    let (free, _) = gpu.memory()?;
    // Whole vectors, and half of the free memory at most.
    let bytes = LARGEST.min(free / 2) / 16 * 16;
    let data = DeviceBuffer::<u8>::zeroed(gpu, bytes)?;
    let sink = DeviceBuffer::<u32>::zeroed(gpu, 1)?;
    let params = Params {
        data: data.device_pointer(),
        vectors: bytes as u64 / 16,
        sink: sink.device_pointer(),
    };
    let blocks = BLOCKS_PER_SM * u32::try_from(gpu.sm_count())?;
    let stream = Stream::new(gpu)?;
    let mut best = Duration::MAX;
    for _ in 0..READS {
        let (begin, end) = (Event::new(gpu)?, Event::new(gpu)?);
        begin.record(&stream)?;
        // SAFETY: `Params` has the layout of the kernel's parameter; the buffers have the sizes given, and live until the
        // event after the kernel has passed.
        unsafe { function.launch(&stream, LaunchConfig::linear(blocks, THREADS), &params)? };
        end.record(&stream)?;
        let milliseconds = f64::from(end.milliseconds_since(&begin)?);
        best = best.min(Duration::from_secs_f64(milliseconds / 1e3));
    }
    Ok(bytes as f64 / best.as_secs_f64() / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirage_compiler::arch::Arch;
    use mirage_compiler::nvrtc::Nvrtc;

    #[test]
    fn the_kernel_compiles_for_every_architecture() {
        // Where NVRTC is missing there is nothing to test; continuous integration has it.
        let Ok(nvrtc) = Nvrtc::find() else { return };
        for arch in Arch::ALL {
            let source = Source {
                name: "bandwidth.cu".to_owned(),
                text: SOURCE.to_owned(),
                headers: Vec::new(),
            };
            let compiled = nvrtc.compile(&source, arch, &Options::default());
            assert!(compiled.is_ok(), "{arch}: {:?}", compiled.err());
        }
    }
}
