//! The kernels that measure a GPU: the source of `mirage-calibrate`'s cubin.
//!
//! Owns which things are measured and what their kernels are called; the kernels are in `device/calibrate/`, over the same
//! headers as the megakernel. Launching them, and what follows from their times, is `mirage-calibrate`'s.

use std::fmt::Write as _;

use crate::arch::GpuModel;
use crate::cost::{ExchangeConstants, StreamConstants};
use crate::emit::headers_for;
use crate::nvrtc::Source;

/// Bytes of the pages that stream beside an exchange.
pub const EXCHANGE_PAGE: usize = 16 << 10;
/// The kernel of the barrier.
pub const BARRIER: &str = "calibrate_barrier";
/// Clocks that a CTA tells.
pub const CLOCKS: usize = 2;
/// What lies behind the ring in shared memory (`device/calibrate/common.cuh`, `CalibrationShared`).
const BEHIND_RING: usize = 1024 + 2048 + 1024 + 20 * 1024 + 26 * 1024;

/// A linear that is measured: all of its pages are there when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Passes over the columns.
    pub passes: usize,
    /// Pages of a pass.
    pub pages: usize,
    /// Columns of the step.
    pub columns: usize,
}

impl LinearShape {
    const fn new(page_bytes: usize, passes: usize, pages: usize, columns: usize) -> LinearShape {
        LinearShape {
            page_bytes,
            passes,
            pages,
            columns,
        }
    }

    /// Few pages and many, from which a page's time follows.
    pub const LARGE: [LinearShape; 2] =
        [Self::new(16 << 10, 1, 1, 8), Self::new(16 << 10, 1, 3, 8)];
    /// The same bytes in smaller pages: what a page takes beside its bytes.
    pub const SMALL: [LinearShape; 2] = [Self::new(8 << 10, 1, 2, 8), Self::new(8 << 10, 1, 6, 8)];
    /// Twice the products with the same bytes.
    pub const WIDE: [LinearShape; 2] =
        [Self::new(16 << 10, 1, 1, 16), Self::new(16 << 10, 1, 3, 16)];
    /// Two pages in two passes.
    pub const TWO_PASSES: LinearShape = Self::new(16 << 10, 2, 1, 8);

    fn all() -> impl Iterator<Item = LinearShape> {
        let pairs = [Self::LARGE, Self::SMALL, Self::WIDE];
        pairs.into_iter().flatten().chain([Self::TWO_PASSES])
    }

    /// The name of its kernel.
    pub fn entry(&self) -> String {
        let LinearShape {
            page_bytes,
            passes,
            pages,
            columns,
        } = self;
        format!("calibrate_linear_{page_bytes}_{passes}x{pages}_{columns}")
    }
}

/// The kernel that streams pages of so many bytes, so many in flight.
pub fn stream_entry(page_bytes: usize, in_flight: usize) -> String {
    format!("calibrate_stream_{page_bytes}_{in_flight}")
}

/// The kernel of exchanges in which each CTA reads so many words, beside a stream of so many bytes in flight.
pub fn exchange_entry(words: usize, in_flight: usize) -> String {
    format!("calibrate_exchange_{words}_{in_flight}")
}

/// CTAs that measure on a GPU of so many SMs: whole groups.
pub fn ctas(sms: usize) -> usize {
    sms / ExchangeConstants::GROUP * ExchangeConstants::GROUP
}

/// Bytes of the ring: 128 KB, as in most programs, where a block has room for them.
fn ring_bytes(smem_per_block: usize) -> usize {
    let room = smem_per_block.saturating_sub(BEHIND_RING);
    let page = 16 << 10;
    (room / page * page).min(128 << 10)
}

/// Dynamic shared memory of every kernel.
pub fn shared_bytes(gpu: &GpuModel) -> usize {
    ring_bytes(gpu.smem_per_block_optin as usize) + BEHIND_RING
}

/// The source of all kernels for a GPU.
pub fn source(gpu: &GpuModel) -> Source {
    let members = ExchangeConstants::GROUP;
    let all = ctas(gpu.sms as usize);
    let mut text = format!(
        "// Measures what the parts of a GPU cost, written by mirage. Do not edit.\n\
         namespace mirage {{\nconstexpr int kRingBytes = {}, kSharedBytes = {}, kClocks = {CLOCKS};\n}}\n\
         #include \"calibrate/stream.cuh\"\n#include \"calibrate/exchange.cuh\"\n#include \"calibrate/linear.cuh\"\n\n\
         namespace mirage {{\nstruct Mesh {{\n  static constexpr int kGroups = {}, kMembers = {members}, \
         kWorkers = {all}, kCtas = {all};\n}};\n}}  // namespace mirage\n",
        ring_bytes(gpu.smem_per_block_optin as usize),
        shared_bytes(gpu),
        all / members
    );
    let mut kernel = |entry: &str, body: &str| {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nextern \"C\" __global__ void __launch_bounds__(mirage::kThreads, 1)\n    \
             {entry}(const __grid_constant__ mirage::Calibration p) {{\n  mirage::measure_{body}(p);\n}}\n"
        );
    };
    for page_bytes in StreamConstants::PAGE_BYTES {
        for in_flight in StreamConstants::IN_FLIGHT {
            let body = format!("stream<mirage::CalibrationRing<{page_bytes}, {in_flight}>>");
            kernel(&stream_entry(page_bytes, in_flight), &body);
        }
    }
    for words in ExchangeConstants::WORDS {
        for in_flight in ExchangeConstants::IN_FLIGHT {
            let pages = in_flight / EXCHANGE_PAGE;
            let ring = format!("mirage::CalibrationRing<{EXCHANGE_PAGE}, {pages}>");
            let body = format!("exchange<mirage::Mesh, {ring}, {words}>");
            kernel(&exchange_entry(words, in_flight), &body);
        }
    }
    kernel(BARRIER, "barrier<mirage::Mesh>");
    for shape in LinearShape::all() {
        let LinearShape {
            page_bytes,
            passes,
            pages,
            columns,
        } = shape;
        let ring = format!("mirage::CalibrationRing<{page_bytes}, 2>");
        let body = format!("linear<mirage::Mesh, {ring}, {passes}, {pages}, {columns}>");
        kernel(&shape.entry(), &body);
    }
    let mut headers = headers_for(gpu.arch);
    headers.extend(HEADERS.map(|(name, text)| (name.to_owned(), text.to_owned())));
    Source {
        name: "calibrate.cu".to_owned(),
        text,
        headers,
    }
}

const HEADERS: [(&str, &str); 4] = [
    (
        "calibrate/common.cuh",
        include_str!("../device/calibrate/common.cuh"),
    ),
    (
        "calibrate/stream.cuh",
        include_str!("../device/calibrate/stream.cuh"),
    ),
    (
        "calibrate/exchange.cuh",
        include_str!("../device/calibrate/exchange.cuh"),
    ),
    (
        "calibrate/linear.cuh",
        include_str!("../device/calibrate/linear.cuh"),
    ),
];
