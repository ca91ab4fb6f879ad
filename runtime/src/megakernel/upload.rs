//! The weights' way from the checkpoint's files to their places on the GPU.
//!
//! Owns the pipeline. Threads take the parts of the weights in turns, and each has a lane: page-locked memory, a buffer of
//! the same size on the device, and a stream. A thread reads a part from the files into its memory (converted, where it is
//! no bf16), has it copied to the device, and has `mirage_repack` (`compiler/device/repack.cuh`) put it into the streams.
//! Threads wait for their own copies only, never for each other: while some read, others' parts are copied and repacked.
//! So nothing is held twice but what is in the lanes. Which rows a piece has and where its tiles go is [`Pieces`]' business.
//!
//! What orders what, and there is nothing else that needs to be: the host writes to a lane's memory once the lane's last
//! copy has ended ([`StagingBuffer`]), and a lane's copies and kernels follow each other in its stream. Lanes write
//! distinct places.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use half::bf16;
use mirage_compiler::program::{CONSUMER_WARPS, Program, RowOrder, TILE};

use super::MegakernelError;
use crate::gpu::{DeviceBuffer, Function, Gpu, GpuError, LaunchConfig, StagingBuffer, Stream};
use crate::pack::pieces::{Piece, Pieces, Run};
use crate::pack::{PackError, Packer};

/// Blocks of the repacking kernel that share a run: a piece of few long rows would leave SMs idle without.
const BLOCKS_PER_RUN: u32 = 4;

/// Page-locked memory that weights go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staging {
    /// Buffers, at least one, and as many threads that read; with one, nothing overlaps.
    pub buffers: usize,
    /// Bytes of a buffer, more where 16 rows of a weight take more; less where all weights take less. The GPU has a buffer
    /// of the same size for each.
    pub bytes: usize,
}

impl Default for Staging {
    /// A thread for each core, up to as many as fill any bus; buffers small enough to stay in a server CPU's caches on the
    /// way, large enough that starting a copy is nothing beside it.
    fn default() -> Self {
        Self {
            buffers: rayon::current_num_threads().clamp(4, 16),
            bytes: 4 << 20,
        }
    }
}

/// What loading took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Bytes sent to the GPU: every weight once, as bf16, and the tables of the pieces.
    pub sent: u64,
    /// Whether all of them went through page-locked memory.
    pub page_locked: bool,
    /// The whole of it, until the model is ready.
    pub total: Duration,
    /// Of that: loading the kernel, allocating and zeroing the model's memory.
    pub prepare: Duration,
    /// Of that: reading from the checkpoint into staging memory, in the mean over threads.
    pub read: Duration,
    /// Of that: waiting for copies and kernels, with nothing to read into, in the mean over threads.
    pub wait: Duration,
}

/// The twin of `RepackParams` in `compiler/device/repack.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct RepackParams {
    rows: u64,
    runs: u64,
    weights: u64,
    columns: u64,
}

/// What a lane carries at once.
enum Part {
    /// Rows of the embedding table, which lies on the device as it does in the checkpoint.
    Table(Range<usize>),
    /// A piece of the streams.
    Streams(Piece),
}

impl Part {
    /// Elements that it takes in a lane.
    fn elements(&self, program: &Program) -> usize {
        match self {
            Part::Table(rows) => rows.len() * program.hidden,
            Part::Streams(piece) => piece.staged_elements(),
        }
    }
}

/// A buffer on either side and the stream between them.
struct Lane {
    host: StagingBuffer<bf16>,
    device: DeviceBuffer<bf16>,
    stream: Stream,
    /// Bytes of the model that the last part brings.
    under_way: u64,
}

impl Drop for Lane {
    /// An upload that fails leaves copies and kernels behind, which use memory of others.
    fn drop(&mut self) {
        // What fails here has failed before, and is reported there.
        let _ = self.stream.synchronize();
    }
}

/// Weights to be sent.
pub(super) struct Upload<'a> {
    gpu: &'a Gpu,
    packer: &'a Packer<'a>,
    repack: &'a Function,
    /// Device address of the streams.
    weights: u64,
    /// Locked while a copy to it is enqueued.
    embedding: Mutex<&'a mut DeviceBuffer<bf16>>,
    /// Bytes of both.
    total: u64,
    /// Whether the head's rows are those of the embedding table, which takes them on the way.
    with_head: bool,
    pieces: Pieces<'a>,
    parts: Vec<Part>,
    /// The first part that no thread has taken.
    next: AtomicUsize,
    lanes: usize,
    /// Elements of a lane: of the largest part.
    elements: usize,
}

impl<'a> Upload<'a> {
    /// Cuts the weights into parts. `weights` and `embedding` are the arrays to fill, as long as the program says.
    pub(super) fn new(
        gpu: &'a Gpu,
        packer: &'a Packer<'a>,
        repack: &'a Function,
        staging: Staging,
        weights: &'a mut DeviceBuffer<u8>,
        embedding: &'a mut DeviceBuffer<bf16>,
    ) -> Self {
        let program = packer.program();
        let with_head = head_is_table(program);
        let limit = staging.bytes / size_of::<bf16>();
        let mut parts: Vec<Part> = Vec::new();
        if !with_head {
            let rows_at_once = (limit / program.hidden.max(1)).max(1);
            let begins = (0..program.vocab).step_by(rows_at_once);
            let rows = begins.map(|begin| begin..program.vocab.min(begin + rows_at_once));
            parts.extend(rows.map(Part::Table));
        }
        let pieces = Pieces::new(program);
        parts.extend(pieces.cut(limit).into_iter().map(Part::Streams));
        let elements = parts.iter().map(|part| part.elements(program)).max();
        Self {
            gpu,
            packer,
            repack,
            weights: weights.device_pointer(),
            total: (weights.bytes() + embedding.bytes()) as u64,
            embedding: Mutex::new(embedding),
            with_head,
            pieces,
            next: AtomicUsize::new(0),
            lanes: staging.buffers.min(parts.len()).max(1),
            elements: elements.unwrap_or(0),
            parts,
        }
    }

    /// Sends everything and waits until it is in its place.
    pub(super) fn run(
        self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<LoadReport, MegakernelError> {
        let (arrivals, arriving) = channel();
        let reports = thread::scope(|scope| {
            let upload = &self;
            let threads: Vec<_> = vec![arrivals; self.lanes]
                .into_iter()
                .map(|arrivals| scope.spawn(move || upload.send_parts(&arrivals)))
                .collect();
            let mut arrived = 0;
            // Until every thread has ended.
            for bytes in arriving {
                arrived += bytes;
                progress(arrived, self.total);
            }
            let ended = threads.into_iter().map(|thread| match thread.join() {
                Ok(report) => report,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ended.collect::<Result<Vec<_>, _>>()
        })?;
        let mean = |of: fn(&LoadReport) -> Duration| -> Duration {
            reports.iter().map(of).sum::<Duration>() / self.lanes as u32
        };
        Ok(LoadReport {
            sent: reports.iter().map(|report| report.sent).sum(),
            page_locked: reports.iter().all(|report| report.page_locked),
            read: mean(|report| report.read),
            wait: mean(|report| report.wait),
            ..LoadReport::default()
        })
    }

    /// What each thread does: sends part after part through a lane of its own, until there are no more or one cannot be
    /// sent. `arrivals` hears of the bytes of the model that are on the device.
    fn send_parts(&self, arrivals: &Sender<u64>) -> Result<LoadReport, MegakernelError> {
        let sent = Lane::new(self.gpu, self.elements).map_err(MegakernelError::from);
        let sent = sent.and_then(|lane| self.send_through(lane, arrivals));
        if sent.is_err() {
            // The others need not go on.
            self.next.store(self.parts.len(), Ordering::Relaxed);
        }
        sent
    }

    fn send_through(
        &self,
        mut lane: Lane,
        arrivals: &Sender<u64>,
    ) -> Result<LoadReport, MegakernelError> {
        let mut report = LoadReport {
            page_locked: lane.host.is_page_locked(),
            ..LoadReport::default()
        };
        let arrived = |under_way: &mut u64| {
            // Whoever listens does so until all threads have ended.
            let _ = arrivals.send(std::mem::take(under_way));
        };
        while let Some(part) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let elements = part.elements(self.packer.program());
            let begin = Instant::now();
            let mut staged = lane.host.wait()?;
            report.wait += begin.elapsed();
            arrived(&mut lane.under_way);
            let begin = Instant::now();
            self.read(part, &mut staged[..elements])?;
            report.read += begin.elapsed();
            staged.send(&lane.stream, elements, &mut lane.device, 0)?;
            report.sent += bytes(elements);
            lane.under_way = self.place(part, &lane)?;
        }
        let begin = Instant::now();
        lane.stream.synchronize()?;
        report.wait += begin.elapsed();
        arrived(&mut lane.under_way);
        Ok(report)
    }

    /// Reads a part from the checkpoint as it goes to the device: rows, and behind those of a piece its runs.
    fn read(&self, part: &Part, staged: &mut [bf16]) -> Result<(), PackError> {
        match part {
            Part::Table(rows) => self.packer.pack_embedding(rows.start, staged),
            Part::Streams(piece) => {
                let (rows, behind) = staged.split_at_mut(piece.elements);
                let runs: Vec<Run> = self.pieces.runs(piece).collect();
                behind.copy_from_slice(bytemuck::cast_slice(&runs));
                self.packer
                    .read_rows(piece.linear, piece.layer, piece.rows, rows)
            }
        }
    }

    /// Enqueues what brings a part from the lane's buffer on the device to its places, and says how many bytes of the model
    /// that fills.
    fn place(&self, part: &Part, lane: &Lane) -> Result<u64, GpuError> {
        let hidden = self.packer.program().hidden;
        match part {
            Part::Table(rows) => self.place_table(lane, rows.start * hidden, rows.len() * hidden),
            Part::Streams(piece) => {
                self.place_piece(lane, piece)?;
                let of_table = if self.with_head && piece.linear.is_none() {
                    self.place_table(lane, piece.rows.begin * TILE * hidden, piece.elements)?
                } else {
                    0
                };
                Ok(bytes(piece.elements) + of_table)
            }
        }
    }

    /// The embedding table's elements from `first` on; rows of padding lie beyond its end.
    fn place_table(&self, lane: &Lane, first: usize, elements: usize) -> Result<u64, GpuError> {
        // A thread that panicked while it held the lock has enqueued a copy or not.
        let mut embedding = self
            .embedding
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let elements = elements.min(embedding.len().saturating_sub(first));
        embedding.enqueue_copy_of(&lane.stream, first, &lane.device, elements)?;
        Ok(bytes(elements))
    }

    fn place_piece(&self, lane: &Lane, piece: &Piece) -> Result<(), GpuError> {
        let rows = lane.device.device_pointer();
        let params = RepackParams {
            rows,
            // Behind whole tiles, so as aligned as the buffer.
            runs: rows + bytes(piece.elements),
            weights: self.weights,
            columns: self.packer.program().linear(piece.linear).columns as u64,
        };
        let config = LaunchConfig {
            grid: [piece.runs as u32, BLOCKS_PER_RUN, 1],
            block: [CONSUMER_WARPS as u32 * 32, 1, 1],
            dynamic_shared_bytes: 0,
        };
        // SAFETY: `RepackParams` is the twin of the kernel's parameter. The piece's rows and runs are in the lane's buffer,
        // and its runs lie within the streams, whose array is borrowed for as long as this upload; the lane's stream is
        // waited for before either is freed.
        unsafe { self.repack.launch(&lane.stream, config, &params) }
    }
}

impl Lane {
    fn new(gpu: &Gpu, elements: usize) -> Result<Self, GpuError> {
        Ok(Self {
            host: StagingBuffer::zeroed(gpu, elements)?,
            device: DeviceBuffer::zeroed(gpu, elements)?,
            stream: Stream::new(gpu)?,
            under_way: 0,
        })
    }
}

/// Whether row after row of the head's packed weight is the embedding table: of tied models, whose table is then sent once.
fn head_is_table(program: &Program) -> bool {
    let head = &program.head;
    head.order == RowOrder::Stacked
        && head.parts == [(program.embedding, program.vocab)]
        && head.columns == program.hidden
}

fn bytes(elements: usize) -> u64 {
    (elements * size_of::<bf16>()) as u64
}

#[cfg(test)]
mod tests {
    use mirage_testing::{Sizes, planned, qwen3, target};

    use super::*;

    #[test]
    fn parameters_have_the_size_of_their_twin() {
        assert_eq!(size_of::<RepackParams>(), 32);
    }

    #[test]
    fn tied_models_send_their_table_once() {
        let check = |tied| {
            let model = qwen3(Sizes {
                layers: 1,
                hidden: 64,
                ffn: 64,
                heads: 2,
                kv_heads: 1,
                vocab: 40,
                tied,
            });
            assert_eq!(head_is_table(&planned(&model, &target(2, 1, 16))), tied);
        };
        check(true);
        check(false);
    }
}
