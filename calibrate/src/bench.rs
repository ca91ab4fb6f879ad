//! The calibration's kernels on a GPU: compiled, launched, timed.
//!
//! Owns the device memory they work on. What is measured with which of them is `fit.rs`'s.

use anyhow::{Context, Result, bail};
use mirage_compiler::arch::GpuModel;
use mirage_compiler::calibration::{self, CLOCKS};
use mirage_compiler::cost::{ExchangeConstants, StreamConstants};
use mirage_compiler::cubin_cache;
use mirage_compiler::nvrtc::Options;
use mirage_compiler::program::{THREADS, WORD_BYTES};
use mirage_runtime::gpu::{DeviceBuffer, Event, Gpu, LaunchConfig, Module, Stream};

/// Bytes that a CTA streams, where there is room: all of them together are far more than the L2 holds.
const BYTES_OF_CTA: usize = 16 << 20;
/// Launches of which the median is taken.
const LAUNCHES: usize = 3;

/// `mirage::Calibration`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    stream: u64,
    bytes_per_cta: u64,
    exchange: u64,
    clocks: u64,
    epoch: u32,
    rounds: u32,
    producers: u32,
    pages: u32,
}

/// How a kernel is run.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    /// Repetitions inside the kernel.
    pub(crate) rounds: u32,
    /// CTAs whose words an exchange reads.
    pub(crate) producers: usize,
    /// Pages that a CTA uses up between two exchanges.
    pub(crate) pages: u32,
    /// CTAs, which wait for each other unless they only stream.
    pub(crate) ctas: usize,
}

/// A launch.
pub(crate) struct Launch {
    /// From its beginning to its end.
    pub(crate) milliseconds: f64,
    /// What each CTA told.
    pub(crate) clocks: Vec<[u64; CLOCKS]>,
}

/// A GPU with the kernels on it.
pub(crate) struct Bench {
    gpu: Gpu,
    stream: Stream,
    module: Module,
    shared_bytes: usize,
    bytes_per_cta: usize,
    weights: DeviceBuffer<u8>,
    exchange: DeviceBuffer<u8>,
    /// Every epoch used so far is at most this one.
    epoch: u32,
    /// CTAs of the exchanges: whole groups.
    pub(crate) ctas: usize,
    /// SMs.
    pub(crate) sms: usize,
}

impl Bench {
    /// Compiles the kernels, or takes them from the cubin cache.
    pub(crate) fn new(gpu: &Gpu) -> Result<Bench> {
        let model: GpuModel = gpu.properties().model()?;
        let sms = gpu.sm_count();
        let ctas = calibration::ctas(sms);
        if ctas == 0 {
            bail!(
                "{} has {sms} SMs; groups of {} are measured",
                gpu.name(),
                ExchangeConstants::GROUP
            );
        }
        let source = calibration::source(&model);
        let fetched = cubin_cache::fetch(&source, model.arch, &Options::default())?;
        let module = Module::load(gpu, &fetched.compiled.cubin)?;
        let (free, _) = gpu.memory()?;
        // Whole pages of every size.
        let page = StreamConstants::PAGE_BYTES
            .iter()
            .max()
            .copied()
            .unwrap_or(1);
        let bytes_per_cta = BYTES_OF_CTA.min(free / 2 / sms) / page * page;
        if bytes_per_cta == 0 {
            bail!("{} has no memory free; end what runs on it", gpu.name());
        }
        let most = ExchangeConstants::WORDS.iter().max().copied().unwrap_or(0);
        // Two areas, in each an equal share of the words for each CTA of the smallest group.
        let words = 2 * 2 * most * ctas;
        Ok(Bench {
            stream: Stream::new(gpu)?,
            module,
            shared_bytes: calibration::shared_bytes(&model),
            bytes_per_cta,
            weights: DeviceBuffer::zeroed(gpu, bytes_per_cta * sms)?,
            exchange: DeviceBuffer::zeroed(gpu, words * WORD_BYTES)?,
            epoch: 0,
            ctas,
            sms,
            gpu: gpu.clone(),
        })
    }

    /// All bytes that are streamed in a round.
    pub(crate) fn streamed(&self) -> usize {
        self.bytes_per_cta * self.sms
    }

    /// Launches a kernel some times and gives the launch of the median time.
    pub(crate) fn run(&mut self, entry: &str, work: Work) -> Result<Launch> {
        // The first one is not counted: the clocks rise, and what it reads comes from memory.
        let mut launches = (0..=LAUNCHES)
            .map(|_| self.launch(entry, work))
            .collect::<Result<Vec<_>>>()
            .with_context(|| entry.to_owned())?;
        launches.remove(0);
        launches.sort_by(|a, b| a.milliseconds.total_cmp(&b.milliseconds));
        Ok(launches.swap_remove(LAUNCHES / 2))
    }

    fn launch(&mut self, entry: &str, work: Work) -> Result<Launch> {
        let function = self.module.function(entry)?;
        function.set_dynamic_shared_bytes(self.shared_bytes)?;
        let clocks = DeviceBuffer::<u64>::zeroed(&self.gpu, work.ctas * CLOCKS)?;
        let params = Params {
            stream: self.weights.device_pointer(),
            bytes_per_cta: self.bytes_per_cta as u64,
            exchange: self.exchange.device_pointer(),
            clocks: clocks.device_pointer(),
            epoch: self.epoch,
            rounds: work.rounds,
            producers: u32::try_from(work.producers)?,
            pages: work.pages,
        };
        self.epoch += work.rounds + 1;
        let config = LaunchConfig {
            grid: [u32::try_from(work.ctas)?, 1, 1],
            block: [u32::try_from(THREADS)?, 1, 1],
            dynamic_shared_bytes: u32::try_from(self.shared_bytes)?,
        };
        let (begin, end) = (Event::new(&self.gpu)?, Event::new(&self.gpu)?);
        begin.record(&self.stream)?;
        // SAFETY: `Params` has the layout of the kernels' parameter; the buffers have the sizes that the kernels expect, and
        // live until the event after the kernel has passed.
        unsafe { function.launch_cooperative(&self.stream, config, &params)? };
        end.record(&self.stream)?;
        end.synchronize()?;
        let told = clocks.to_vec(&self.stream)?;
        Ok(Launch {
            milliseconds: f64::from(end.milliseconds_since(&begin)?),
            clocks: told.chunks_exact(CLOCKS).map(|c| [c[0], c[1]]).collect(),
        })
    }
}

impl Launch {
    /// How much longer the slowest CTA took than they did on average.
    pub(crate) fn slowest(&self) -> f64 {
        let most = self.clocks.iter().map(|clocks| clocks[0]).max();
        most.unwrap_or(0) as f64 / self.clocks_of_round(0, 1).max(1.0)
    }

    /// A clock of the CTAs on average, for each round.
    pub(crate) fn clocks_of_round(&self, which: usize, rounds: u32) -> f64 {
        let sum: u64 = self.clocks.iter().map(|clocks| clocks[which]).sum();
        sum as f64 / self.clocks.len().max(1) as f64 / f64::from(rounds)
    }
}
