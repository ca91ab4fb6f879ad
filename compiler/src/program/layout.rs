//! Placement in memory: the regions of shared memory with the ring, and the exchange area in global memory.
//!
//! Sizes follow from the phases; the formulas of what a phase keeps in scratch stand beside the device code that uses it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    Attention, CONSUMER_WARPS, ExchangeLayout, Linear, Phase, Ring, Rows, Step, VALUES_PER_WORD,
    WORD_BYTES,
};
use crate::mesh::Mesh;
use crate::plan::{StreamForm, Target, Transport};

/// A region of a CTA's shared memory, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Name, an identifier of the generated code.
    pub name: String,
    /// First byte.
    pub at: usize,
    /// Bytes.
    pub bytes: usize,
}

/// A CTA's shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedLayout {
    /// Regions, in order.
    pub regions: Vec<Region>,
    /// All bytes.
    pub bytes: usize,
}

impl fmt::Display for SharedLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "shared memory: {} B", self.bytes)?;
        for region in &self.regions {
            writeln!(f, "  {:>7} {:>7} {}", region.at, region.bytes, region.name)?;
        }
        Ok(())
    }
}

const ALIGN: usize = 128;

/// Bytes of a column between the head and the next step: the best logit of each warp and of all, how far it is, the draws,
/// masses and counts of each warp (`device/candidates.cuh`, `Choices`).
pub const CHOICE_BYTES: usize = 40 + 36 * CONSUMER_WARPS;
/// Bytes of the warps' queues of draws: a logit, a token and a column of 64 (`device/draws.cuh`, `DrawQueue`).
pub const QUEUE_BYTES: usize = 768 * CONSUMER_WARPS;
/// Bytes of what a column samples with and has drawn (`device/context.cuh`, `Draws`).
pub const DRAW_BYTES: usize = 32 + 4 * CONSUMER_WARPS;

/// Elements of a row of bf16 in shared memory (`device/context.cuh`, `padded`).
fn padded(width: usize) -> usize {
    width + 8
}

/// Bytes of everything in shared memory but the rings' pages.
pub(super) struct Parts {
    /// What lies at the same place in all steps.
    common: Vec<(&'static str, usize)>,
    activation: usize,
    stream: Option<usize>,
    /// The activation of wide prefill steps.
    wide: Option<usize>,
}

/// `steps`: prefill and decode. `stream_units`: words of a column of the residual stream.
pub(super) fn parts(
    linears: &[Linear],
    head: &Linear,
    attention: &Attention,
    steps: [&Step; 2],
    wide: Option<&Step>,
    stream_units: usize,
) -> Parts {
    let columns = steps.iter().map(|step| step.columns).max().unwrap_or(1);
    let most = wide.map_or(columns, |wide| wide.columns.max(columns));
    let decode = steps[1].columns;
    let width = linears
        .iter()
        .chain([head])
        .map(Linear::width)
        .chain([attention.width()])
        .max()
        .unwrap_or(0);
    // What decode steps gather for attention lies behind the operand into which replicated columns' heads go at once
    // (`device/attention.cuh`).
    let replicated = steps[1].layer.iter().filter_map(|phase| match phase {
        Phase::Attention { next, .. } if steps[1].replicate_below > 0 => {
            let gathered = (attention.heads_per_task + 2) * attention.head_dim;
            Some(decode * padded(linears[*next].width()) + gathered)
        }
        _ => None,
    });
    let activation = replicated
        .chain([columns * padded(width)])
        .max()
        .unwrap_or(0)
        * 2;
    // Products of rows are added up a block of columns at a time (`device/rows.cuh`).
    let at_once = most.min(Target::ROW_COLUMNS);
    let products = |linear: &Linear| {
        linear.tiling.warp_k() * at_once * (linear.tiling.pass_tiles * 16 + 4) * 4
    };
    // Attention of rows takes its angles from global memory.
    let of_words = steps.iter().filter(|s| s.transport == Transport::Words);
    let turned = of_words.map(|step| step.columns).max().unwrap_or(0);
    let warp_results = CONSUMER_WARPS * attention.heads_per_task * (attention.head_dim + 4) * 4;
    let choices = decode * CHOICE_BYTES + QUEUE_BYTES + 4;
    // The sampler's histograms and thresholds take the activation's place (`device/radix.cuh`).
    let sampling = decode * (2 * 256 * 4 + 4 + 4 + 8);
    let scratch = linears
        .iter()
        .map(products)
        .chain([warp_results, choices])
        .max()
        .unwrap_or(0);
    // Units of a thread, by all threads (`device/residual.cuh`, `Replicated`).
    let stream = |step: &&Step| {
        let of_column = CONSUMER_WARPS.div_ceil(step.columns) * 32;
        let units = step.columns.div_ceil(CONSUMER_WARPS) * stream_units.div_ceil(of_column);
        units * VALUES_PER_WORD * 4 * CONSUMER_WARPS * 32
    };
    let replicated = steps
        .iter()
        .filter(|step| step.stream == StreamForm::Replicated);
    let stream = replicated.map(stream).max();
    let storage = 16 * MAX_PAGES + 16;
    let mut common = vec![
        ("RingStorage", storage),
        ("Columns", Target::MAX_COLUMNS * 24 + 16),
        ("Draws", Target::MAX_COLUMNS * DRAW_BYTES),
        ("SumSquares", most * (CONSUMER_WARPS + 1) * 4),
        ("Rope", turned * attention.head_dim / 2 * 8),
        ("Scratch", scratch),
    ];
    common.extend(wide.map(|_| ("WideRingStorage", storage)));
    Parts {
        common,
        activation: sampling.max(activation),
        stream,
        wide: wide.map(|wide| wide.columns * padded(width) * 2),
    }
}

/// Pages beyond these no longer help (H100: a ring of 8 pages of 16 KB is as fast as one of 12).
const MAX_PAGES: usize = 32;
/// Bytes of the ring beyond which more does not help.
const ENOUGH_RING: usize = 128 * 1024;

/// Bytes that a CTA has asked for and that are not yet there, at most. Measured on the H100 with pages of 16 KB.
///
/// Where the chain counts, every wait of an exchange stands behind the requests: one page takes 515 us, two 550, one page
/// in the head too 545 (0.6B at batch 1).
const CHAIN_BOUND_IN_FLIGHT: usize = 16 * 1024;
/// In the head nothing waits but for the stream: two pages 515 us, three 525, one 545.
const HEAD_IN_FLIGHT: usize = 32 * 1024;
/// Where only the stream counts, in layers and head: all that hides the memory's latency after the ring has been full (8B:
/// 2 pages 5996 us, 3 5717, 4 5652, 6 5551, 7 5595).
const STREAM_BOUND_IN_FLIGHT: usize = 96 * 1024;

/// Shared memory and its ring.
pub(super) type Placed = (SharedLayout, Ring);

/// Lays the regions out, and for wide prefill steps once more: their activation takes what else is the ring's, but begins at
/// the same place, as does all that stands before it.
pub(super) fn shared_memory(
    parts: &Parts,
    page_bytes: usize,
    limit: usize,
    stream_bound: bool,
) -> Option<(Placed, Option<Placed>)> {
    let with = |more: &[(&'static str, usize)]| {
        let regions = [&parts.common[..], more].concat();
        place(regions, page_bytes, limit, stream_bound)
    };
    let mut all = vec![("Activation", parts.activation)];
    all.extend(parts.stream.map(|bytes| ("Stream", bytes)));
    let mut main = with(&all)?;
    let wide = match parts.wide {
        Some(bytes) => Some(with(&[("Activation", bytes)])?),
        None => None,
    };
    if let Some((wide, _)) = &wide {
        main.0.bytes = main.0.bytes.max(wide.bytes);
    }
    Some((main, wide))
}

/// Gives what the regions leave, up to what helps, to the ring. `None` where less than three pages fit.
fn place(
    mut parts: Vec<(&'static str, usize)>,
    page_bytes: usize,
    limit: usize,
    stream_bound: bool,
) -> Option<Placed> {
    let align = |bytes: usize| bytes.next_multiple_of(ALIGN);
    let used: usize = parts.iter().map(|(_, bytes)| align(*bytes)).sum();
    let pages = limit.checked_sub(used)?.min(ENOUGH_RING) / page_bytes;
    if pages < 3 {
        return None;
    }
    let pages = pages.min(MAX_PAGES);
    let (in_layers, in_head) = if stream_bound {
        (STREAM_BOUND_IN_FLIGHT, STREAM_BOUND_IN_FLIGHT)
    } else {
        (CHAIN_BOUND_IN_FLIGHT, HEAD_IN_FLIGHT)
    };
    let in_flight = |bytes: usize| (bytes / page_bytes).clamp(1, pages - 1);
    parts.push(("Pages", pages * page_bytes));
    let mut at = 0;
    let regions = parts
        .into_iter()
        .map(|(name, bytes)| {
            let region = Region {
                name: name.to_owned(),
                at,
                bytes,
            };
            at += align(bytes);
            region
        })
        .collect();
    Some((
        SharedLayout { regions, bytes: at },
        Ring {
            pages,
            page_bytes,
            in_flight: in_flight(in_layers),
            head_in_flight: in_flight(in_head),
        },
    ))
}

/// Gives out words of the exchange area; every buffer begins on a cache line.
pub(super) struct Words {
    next: usize,
}

impl Words {
    pub(super) fn new() -> Words {
        Words { next: 0 }
    }

    pub(super) fn take(&mut self, words: usize) -> usize {
        let at = self.next;
        self.next += words.next_multiple_of(ALIGN / WORD_BYTES);
        at
    }

    /// A buffer for so many elements of rows, then so many 32-bit numbers; and flags.
    pub(super) fn rows(&mut self, elements: usize, numbers: usize, mesh: &Mesh) -> Rows {
        let at = self.take((elements * 2 + numbers * 4).div_ceil(WORD_BYTES));
        let flags_at = self.take((mesh.ctas * 4).div_ceil(WORD_BYTES));
        Rows { at, flags_at }
    }

    /// The buffers that every program has, and the whole size.
    pub(super) fn finish(
        mut self,
        mesh: &Mesh,
        stream_words: usize,
        decode_columns: usize,
    ) -> ExchangeLayout {
        let stream_at = self.take(stream_words);
        // Of two steps, in turns (`device/generate.cuh`), and of two kinds (`device/candidates.cuh`).
        let candidates_at = self.take(2 * 2 * decode_columns * mesh.ctas);
        let sums_at = self.take(2 * decode_columns * mesh.ctas);
        let samples_at = self.take(decode_columns * mesh.ctas);
        let barrier_at = self.take(mesh.ctas);
        // 64-bit counts: two kinds, four levels of 256 bins (`device/radix.cuh`, `Histograms`).
        let histograms_at = self.take(2 * 4 * decode_columns * 256 / 2);
        ExchangeLayout {
            stream_at,
            candidates_at,
            sums_at,
            samples_at,
            barrier_at,
            histograms_at,
            words: self.next,
        }
    }
}
