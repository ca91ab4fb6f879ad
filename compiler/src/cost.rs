//! The cost model: predicted microseconds of a step on a GPU, from constants measured on one.
//!
//! Owns what the constants mean and the formulas; their values come from a profile, and the planner only compares what they
//! give. Bytes, counts and programs come in, time goes out: nothing here knows a graph.

use serde::{Deserialize, Serialize};

use crate::arch::GpuModel;
use crate::profile::Profile;
use crate::program::{Ring, TILE_BYTES, WORD_BYTES};

mod phases;
mod ring;

pub use phases::Prediction;

/// Measured constants of a GPU, as a [`Profile`] holds them. Times in microseconds, rates in GB/s.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Clock of an SM while a kernel runs, in MHz: what turns a timeline's clocks into times.
    pub clock_mhz: f64,
    /// Weights on their way from memory into the ring.
    pub stream: StreamConstants,
    /// Matrix products of pages that are there.
    pub linear: LinearConstants,
    /// Words from CTA to CTA.
    pub exchange: ExchangeConstants,
    /// Attention.
    pub attention: AttentionConstants,
    /// What the search compares plans by.
    pub search: SearchConstants,
    /// What a step does once for each of its columns: its embedding and its angles before the layers, and again choosing its
    /// token after them.
    pub column: f64,
}

/// See [`Machine::stream`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConstants {
    /// The whole GPU's rate at its best.
    pub gbps: f64,
    /// The same by the pages of a ring: a row for each of [`StreamConstants::PAGE_BYTES`], in it one for each of
    /// [`StreamConstants::IN_FLIGHT`].
    pub rings: [[f64; 5]; 3],
    /// How much longer the slowest CTA takes for its pages than the average one.
    pub slowest: f64,
    /// How much longer pages take in the layers, where words come in between, than alone.
    pub disturbed: f64,
}

impl StreamConstants {
    /// Bytes of the pages that are measured.
    pub const PAGE_BYTES: [usize; 3] = [4 << 10, 8 << 10, 16 << 10];
    /// Pages in flight, at most, that are measured.
    pub const IN_FLIGHT: [usize; 5] = [1, 2, 3, 4, 6];
}

/// See [`Machine::linear`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearConstants {
    /// A phase's fixed part: its addresses, the first page, the end.
    pub fixed: f64,
    /// A pass: the sum over the warps, the epilogue, the words.
    pub pass: f64,
    /// A page beside its bytes: the barrier, the addresses, the release.
    pub page: f64,
    /// What an SM's warps read of pages from shared memory.
    pub shared_gbps: f64,
    /// Products of a 16 x 16 weight tile with up to eight columns that an SM's tensor cores do, millions a second.
    pub mma_mhz: f64,
}

/// See [`Machine::exchange`]. From the moment a CTA has published until all of its threads have what they wait for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExchangeConstants {
    /// From all CTAs of the grid.
    pub grid: Waits,
    /// From a group of [`ExchangeConstants::GROUP`] CTAs.
    pub group: Waits,
    /// What a thread takes to add up a word of partial sums, beyond having it.
    pub sum: f64,
    /// What a reduce-scatter and its all-gather take beside the two waits: sums become words again.
    pub scatter: f64,
    /// A barrier over the grid, its fences included.
    pub barrier: f64,
}

/// Waits for exchanges of [`ExchangeConstants::WORDS`] words. What is asked of the memory and not there yet stands in the
/// way of the words, so beside the stream they take longer the more pages are in flight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Waits {
    /// When no weights stream.
    pub idle: [f64; 5],
    /// Beside the stream, with so many bytes of it in flight: [`ExchangeConstants::IN_FLIGHT`].
    pub beside: [[f64; 5]; 3],
}

/// See [`Machine::attention`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConstants {
    /// A task's fixed part: norms, RoPE, merging the warps' results.
    pub task: f64,
    /// A stripe of keys and values of a task (`program::STRIPE`) whose bytes are there.
    pub stripe: f64,
    /// Finding that a task is another member's.
    pub block: f64,
}

/// See [`Machine::search`]: a layer is the longer of its stream and its chain, and a share of the shorter. Coarser than a
/// [`Prediction`], and better at telling plans apart: it was fitted to what plans took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchConstants {
    /// Exchange words one SM reads from L2 while all others do the same.
    pub l2_gbps_per_sm: f64,
    /// A hand-off from CTA to CTA under a full weight stream, publish and wait included.
    pub hop: f64,
    /// One turn of asking L2 for a thread's batch of words.
    pub poll: f64,
    /// What a flag beside the data takes more than one in it: fences on both sides, and a trip to L2.
    pub flag: f64,
    /// A linear's fixed part: first page, cross-warp sum, epilogue.
    pub linear: f64,
    /// A pass of a linear beyond the first.
    pub pass: f64,
    /// An attention task's fixed part: norms, RoPE, merges.
    pub attention: f64,
    /// A stripe of keys and values of a task (`program::STRIPE`).
    pub kv_batch: f64,
    /// Its scores and sums, per query head.
    pub kv_head: f64,
    /// A page of weights from memory when little else is asked for.
    pub page_latency: f64,
    /// What the consumers take to use up a page, beside its bytes: the barrier, the addresses, the release.
    pub page: f64,
    /// An exchange under a full stream, on average over those of a layer (8B): what a ring does not hold of it, the stream
    /// stands still.
    pub wait: f64,
    /// The share of the shorter of weight stream and dependency chain that does not hide behind the longer.
    pub friction: f64,
}

/// Whose words an exchange brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fan {
    /// CTAs whose words each reader takes.
    pub producers: usize,
    /// CTAs of the grid.
    pub ctas: usize,
}

impl ExchangeConstants {
    /// Words a CTA reads, of the exchanges that are measured.
    pub const WORDS: [usize; 5] = [128, 384, 1408, 2816, 5632];
    /// CTAs of the group that is measured.
    pub const GROUP: usize = 16;
    /// Bytes in flight of each CTA, of the exchanges that are measured: one page, two, and six.
    pub const IN_FLIGHT: [usize; 3] = [16 << 10, 32 << 10, 96 << 10];

    /// An exchange of `words` words for each CTA when no weights stream.
    pub fn idle(&self, words: usize, fan: Fan) -> f64 {
        Self::between(&self.group.idle, &self.grid.idle, words, fan)
    }

    /// The same beside the stream, with so many bytes in flight of each CTA.
    pub fn busy(&self, words: usize, fan: Fan, in_flight: usize) -> f64 {
        let pairs = self.group.beside.iter().zip(&self.grid.beside);
        let times: Vec<f64> = pairs
            .map(|(group, grid)| Self::between(group, grid, words, fan))
            .collect();
        let busy = along(&Self::IN_FLIGHT, &times, in_flight);
        busy.max(self.idle(words, fan))
    }

    /// Between a group and the grid by the logarithm of the producers, between two sizes by the words; the smallest size
    /// is the least.
    fn between(group: &[f64; 5], grid: &[f64; 5], words: usize, fan: Fan) -> f64 {
        let octaves = |from: usize, to: usize| (to as f64 / from as f64).log2();
        let all = octaves(Self::GROUP, fan.ctas.max(Self::GROUP + 1));
        let share = (octaves(Self::GROUP, fan.producers.max(1)) / all).clamp(0.0, 1.0);
        let words = words.max(Self::WORDS[0]);
        let [few, many] = [group, grid].map(|times| along(&Self::WORDS, times, words));
        few + share * (many - few)
    }
}

/// The time at `x` on the line through the two that were measured around it, or nearest to it.
fn along(measured: &[usize], times: &[f64], x: usize) -> f64 {
    let right = measured
        .partition_point(|&at| at < x)
        .clamp(1, measured.len() - 1);
    let (from, to) = (measured[right - 1] as f64, measured[right] as f64);
    let (first, second) = (times[right - 1], times[right]);
    first + (x as f64 - from) / (to - from) * (second - first)
}

impl Machine {
    /// The constants for a GPU: its own where a profile gave them, else the H100's with the GPU's bandwidth.
    pub fn of(gpu: &GpuModel) -> Machine {
        gpu.machine.unwrap_or_else(|| {
            let mut machine = Profile::h100().machine;
            let scale = gpu.hbm_gbps / machine.stream.gbps;
            machine.stream.gbps = gpu.hbm_gbps;
            machine.stream.rings = machine.stream.rings.map(|row| row.map(|rate| rate * scale));
            machine
        })
    }

    /// The name of a constant that no time can be made of, if there is one.
    pub(crate) fn first_unusable(&self) -> Option<&'static str> {
        let Machine {
            clock_mhz,
            stream,
            linear,
            exchange,
            attention,
            search,
            column,
        } = self;
        let ExchangeConstants {
            grid,
            group,
            sum,
            scatter,
            barrier,
        } = exchange;
        let all: [(&str, &[f64]); 20] = [
            ("clock_mhz", &[*clock_mhz]),
            ("gbps", &[stream.gbps]),
            ("rings", &stream.rings.concat()),
            ("fixed", &[linear.fixed]),
            ("pass", &[linear.pass]),
            ("page", &[linear.page]),
            ("shared_gbps", &[linear.shared_gbps]),
            ("mma_mhz", &[linear.mma_mhz]),
            ("idle", &[grid.idle, group.idle].concat()),
            ("beside", &[grid.beside, group.beside].concat().concat()),
            ("barrier", &[*barrier]),
            ("task", &[attention.task]),
            ("stripe", &[attention.stripe]),
            ("block", &[attention.block]),
            ("slowest", &[stream.slowest]),
            ("disturbed", &[stream.disturbed]),
            ("sum", &[*sum]),
            ("scatter", &[*scatter]),
            ("column", &[*column]),
            ("search", &search.all()),
        ];
        let unusable = |value: &f64| !(value.is_finite() && *value > 0.0);
        all.into_iter()
            .find(|(_, values)| values.iter().any(unusable))
            .map(|(name, _)| name)
    }

    /// Bytes the whole GPU streams in a microsecond.
    pub fn stream_rate(&self) -> f64 {
        self.stream.gbps * GBPS
    }

    /// Using up pages that are there, of so many weight tiles in all. A CTA reads each tile once and multiplies it with
    /// eight columns at a time.
    pub fn pages(&self, pages: usize, tiles: usize, columns: usize) -> f64 {
        let l = &self.linear;
        let read = (tiles * TILE_BYTES) as f64 / (l.shared_gbps * GBPS);
        let multiply = (tiles * columns.div_ceil(8)) as f64 / l.mma_mhz;
        pages as f64 * l.page + read.max(multiply)
    }

    /// The rate at which some of a GPU's CTAs, this `share` of them, stream all together, each with so many pages in flight;
    /// in bytes a microsecond. Fewer CTAs have as much less in flight, which is what the rate depends on.
    pub fn ring_rate(&self, page_bytes: usize, in_flight: usize, share: f64) -> f64 {
        // The first page in flight starts from nothing.
        let counts = [&[0], &StreamConstants::IN_FLIGHT[..]].concat();
        let last = counts[counts.len() - 1];
        let in_flight = in_flight.min(last) as f64 * share;
        let rates = self.stream.rings.map(|row| {
            let row = [&[0.0], &row[..]].concat();
            let (whole, part) = (in_flight.floor() as usize, in_flight.fract());
            let (less, more) = (along(&counts, &row, whole), along(&counts, &row, whole + 1));
            less + part * (more - less)
        });
        let smallest = StreamConstants::PAGE_BYTES[0];
        let rate = match page_bytes < smallest {
            true => rates[0] * page_bytes as f64 / smallest as f64,
            false => along(&StreamConstants::PAGE_BYTES, &rates, page_bytes),
        };
        rate.min(self.stream.gbps) * GBPS
    }
}

/// A GB/s in bytes a microsecond.
const GBPS: f64 = 1000.0;

impl SearchConstants {
    fn all(&self) -> [f64; 13] {
        let SearchConstants {
            l2_gbps_per_sm,
            hop,
            poll,
            flag,
            linear,
            pass,
            attention,
            kv_batch,
            kv_head,
            page_latency,
            page,
            wait,
            friction,
        } = *self;
        [
            l2_gbps_per_sm,
            hop,
            poll,
            flag,
            linear,
            pass,
            attention,
            kv_batch,
            kv_head,
            page_latency,
            page,
            wait,
            friction,
        ]
    }

    /// An exchange in which every CTA reads `words` words, `threads` of its threads taking part.
    pub fn exchange(&self, words: usize, threads: usize) -> f64 {
        let turns = words
            .div_ceil(threads.max(1) * WORDS_IN_FLIGHT)
            .saturating_sub(1);
        let bytes = (words * WORD_BYTES) as f64;
        self.hop + bytes / (self.l2_gbps_per_sm * GBPS) + turns as f64 * self.poll
    }

    /// An exchange of rows in which every CTA copies so many bytes.
    pub fn exchange_of_rows(&self, bytes: usize) -> f64 {
        self.hop + self.flag + bytes as f64 / (self.l2_gbps_per_sm * GBPS)
    }

    /// The rate at which `ctas` CTAs stream with so many bytes of each in flight, on a GPU that streams `whole` bytes a
    /// microsecond.
    pub fn ring_rate(&self, whole: f64, in_flight: usize, ctas: usize) -> f64 {
        let of_cta = in_flight as f64 / self.page_latency;
        whole.min(of_cta * ctas as f64)
    }

    /// How long the stream of a layer stands still because the ring is full, in a layer of so many exchanges on so many CTAs.
    pub fn stalls(&self, whole: f64, ring: &Ring, exchanges: usize, ctas: usize) -> f64 {
        let ring_time = (ring.pages * ring.page_bytes) as f64 / (whole / ctas as f64);
        exchanges as f64 * (self.wait - ring_time).max(0.0)
    }

    /// Stream and chain of the same layer, which overlap but for the friction between them.
    pub fn overlap(&self, stream: f64, chain: f64) -> f64 {
        stream.max(chain) + self.friction * stream.min(chain)
    }
}

/// Words a thread asks L2 for at once (`device/exchange.cuh`, `kWordsInFlight`).
pub const WORDS_IN_FLIGHT: usize = 16;

/// How much longer than its chain a layer's stream is where the stream alone counts.
const STREAM_BOUND: f64 = 2.0;

/// Predicted time of one step, by part. Microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepCost {
    /// Weight and KV stream of one layer, alone.
    pub layer_stream: f64,
    /// Dependency chain of one layer, alone.
    pub layer_chain: f64,
    /// One layer.
    pub layer: f64,
    /// LM head and choice of the token; zero in prefill steps.
    pub head: f64,
    /// The whole step.
    pub total: f64,
}

impl StepCost {
    /// Whether the memory is the limit by far, so that a wait of the chain hides behind the stream and nothing is gained by
    /// holding requests back.
    pub fn stream_bound(&self) -> bool {
        self.layer_stream > STREAM_BOUND * self.layer_chain
    }
}

#[cfg(test)]
mod tests;
