//! How fast weights load, beside what the bus to the GPU can do.
//!
//! The files are in the page cache: a load that is not counted comes first. Every load opens the checkpoint anew, so that
//! the kernel maps its pages again, as it does for a fresh process.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use mirage_compiler::artifact::Artifact;
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::gpu::{DeviceBuffer, Event, Gpu, StagingBuffer, Stream};
use mirage_runtime::megakernel::{Megakernel, Staging};

/// Bytes of the copies that the bus is measured with.
const COPY: usize = 256 << 20;
/// Loads that are counted.
const LOADS: usize = 5;

/// Prints the bus's rate, and the loads' times and rates.
pub(crate) fn load(
    gpu: &Gpu,
    artifact: &Artifact,
    model: &Path,
    staging: Staging,
) -> Result<(), Box<dyn Error>> {
    let bus = bus_rate(gpu)?;
    println!(
        "{}: {bus:.1} GB/s from page-locked memory, best of 10 copies of {} MB",
        gpu.name(),
        COPY >> 20
    );
    let mut reports = Vec::new();
    for counted in [false].into_iter().chain([true; LOADS]) {
        let checkpoint = Checkpoint::open(model)?;
        let (program, cubin) = (artifact.manifest.program.clone(), &artifact.cubin);
        let loaded =
            Megakernel::load_through(gpu, program, cubin, &checkpoint, staging, &mut |_, _| {})?;
        if counted {
            reports.push(loaded.load_report());
        }
    }
    let sent = reports[0].sent as f64 / 1e9;
    let page_locked = reports.iter().all(|report| report.page_locked);
    println!(
        "{sent:.2} GB sent through {} buffers of {:.0} MB{}",
        staging.buffers,
        staging.bytes as f64 / f64::from(1 << 20),
        if page_locked {
            ""
        } else {
            ", not all of them page-locked"
        }
    );
    let line = |what: &str, mut times: Vec<Duration>| -> Duration {
        times.sort();
        let [least, median, most] = [0, LOADS / 2, LOADS - 1].map(|at| times[at]);
        println!("{what:<8} {median:.3?} ({least:.3?}, {most:.3?})");
        median
    };
    println!("median of {LOADS} loads (least, most):");
    let total = line("load", reports.iter().map(|r| r.total).collect());
    line("prepare", reports.iter().map(|r| r.prepare).collect());
    line("read", reports.iter().map(|r| r.read).collect());
    line("wait", reports.iter().map(|r| r.wait).collect());
    let rate = sent / total.as_secs_f64();
    println!(
        "{rate:.1} GB/s, {:.0} % of the bus's rate",
        rate / bus * 100.0
    );
    Ok(())
}

/// GB/s of the fastest of ten copies to the device.
fn bus_rate(gpu: &Gpu) -> Result<f64, Box<dyn Error>> {
    let mut host = StagingBuffer::<u8>::zeroed(gpu, COPY)?;
    if !host.is_page_locked() {
        return Err(format!(
            "{} MB cannot be page-locked, so the bus's rate cannot be measured; raise the limit (ulimit -l)",
            COPY >> 20
        )
        .into());
    }
    let mut device = DeviceBuffer::<u8>::zeroed(gpu, COPY)?;
    let stream = Stream::new(gpu)?;
    let (begin, end) = (Event::new(gpu)?, Event::new(gpu)?);
    let mut best = f32::INFINITY;
    for _ in 0..10 {
        begin.record(&stream)?;
        host.wait()?.send(&stream, COPY, &mut device, 0)?;
        end.record(&stream)?;
        best = best.min(end.milliseconds_since(&begin)?);
    }
    Ok(COPY as f64 / f64::from(best) / 1e6)
}
