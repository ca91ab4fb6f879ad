//! The cost model: predicted microseconds of a step on a GPU, from constants measured on one.
//!
//! Owns the constants and the formulas; the planner only compares what they give. Bytes and counts come in, time goes
//! out: nothing here knows a graph.

use serde::{Deserialize, Serialize};

use crate::arch::GpuModel;
use crate::program::Ring;

/// Measured constants of a GPU. Times in microseconds, rates in bytes per microsecond (1 GB/s = 1000).
///
/// Measured on one H100 SXM (132 SMs, 1.98 GHz, 2026-11-24) and scaled to other GPUs by bandwidth alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Streaming read of the whole GPU.
    pub stream: f64,
    /// Exchange words one SM reads from L2 while all others do the same.
    pub l2_per_sm: f64,
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

impl Machine {
    /// The constants for a GPU.
    pub fn of(gpu: &GpuModel) -> Machine {
        Machine {
            stream: gpu.hbm_gbps * 1000.0,
            l2_per_sm: 42_000.0,
            hop: 1.1,
            poll: 0.6,
            flag: 2.0,
            linear: 0.35,
            pass: 0.25,
            attention: 0.7,
            kv_batch: 0.5,
            kv_head: 0.1,
            page_latency: 0.7,
            page: 0.25,
            wait: 4.7,
            // 10.3 us of stream and 8.95 of chain made 13.6 together.
            friction: 0.37,
        }
    }

    /// An exchange in which every CTA reads `words` words, `threads` of its threads taking part.
    pub fn exchange(&self, words: usize, threads: usize) -> f64 {
        let turns = words
            .div_ceil(threads.max(1) * WORDS_IN_FLIGHT)
            .saturating_sub(1);
        self.hop + words as f64 * 16.0 / self.l2_per_sm + turns as f64 * self.poll
    }

    /// An exchange of rows in which every CTA copies so many bytes.
    pub fn exchange_of_rows(&self, bytes: usize) -> f64 {
        self.hop + self.flag + bytes as f64 / self.l2_per_sm
    }

    /// The rate at which `ctas` CTAs stream with so many bytes of each in flight.
    pub fn ring_rate(&self, in_flight: usize, ctas: usize) -> f64 {
        let of_cta = in_flight as f64 / self.page_latency;
        self.stream.min(of_cta * ctas as f64)
    }

    /// How long the stream of a layer stands still because the ring is full, in a layer of so many exchanges on so many CTAs.
    pub fn stalls(&self, ring: &Ring, exchanges: usize, ctas: usize) -> f64 {
        let ring_time = (ring.pages * ring.page_bytes) as f64 / (self.stream / ctas as f64);
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
