//! The weights' way from the checkpoint's files to their places on the GPU.
//!
//! Owns the pipeline. Each piece of the weights is read from the mapped files into page-locked memory by many threads
//! (converted, where it is no bf16), copied from there to a staging buffer on the device, and put into the streams by
//! `mirage_repack` (`compiler/device/repack.cuh`). There are a few lanes, each with its memory on both sides and its
//! stream, and pieces take them in turns: while one is read, others are copied and repacked. So nothing is held twice but
//! what is in the lanes. Which rows a piece has and where its tiles go is [`pieces`]' business.
//!
//! What orders what, and there is nothing else that needs to be: the host writes to a lane's memory once the lane's last
//! copy has ended ([`StagingBuffer`]), and a lane's copies and kernels follow each other in its stream. Lanes write
//! distinct places.

use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use half::bf16;
use mirage_compiler::program::{CONSUMER_WARPS, Program, RowOrder, TILE};

use super::MegakernelError;
use crate::gpu::{DeviceBuffer, Function, Gpu, GpuError, LaunchConfig, StagingBuffer, Stream};
use crate::pack::Packer;
use crate::pack::pieces::{Piece, pieces};

/// Blocks of the repacking kernel that share a run: a piece of few long rows would leave SMs idle without.
const BLOCKS_PER_RUN: u32 = 4;

/// Page-locked memory that weights go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staging {
    /// Buffers, at least one; with one, nothing overlaps.
    pub buffers: usize,
    /// Bytes of a buffer, more where 16 rows of a weight take more; less where all weights take less. The GPU has a buffer
    /// of the same size for each.
    pub bytes: usize,
}

impl Default for Staging {
    /// Small enough to stay in a server CPU's last cache on the way, large enough that starting a copy is nothing beside it.
    fn default() -> Self {
        Self {
            buffers: 4,
            bytes: 16 << 20,
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
    /// Of that: loading the kernel, allocating and zeroing all memory.
    pub prepare: Duration,
    /// Of that: reading from the checkpoint into staging memory.
    pub read: Duration,
    /// Of that: waiting for copies and kernels, with nothing to read into.
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

/// A buffer on either side and the stream between them.
struct Lane {
    host: StagingBuffer<bf16>,
    device: DeviceBuffer<bf16>,
    stream: Stream,
    /// Bytes of the model that the last copy brings.
    under_way: u64,
}

impl Drop for Lane {
    /// An upload that fails leaves copies and kernels behind, which use memory of others.
    fn drop(&mut self) {
        // What fails here has failed before, and is reported there.
        let _ = self.stream.synchronize();
    }
}

/// Weights on their way.
pub(super) struct Upload<'a> {
    packer: &'a Packer<'a>,
    repack: &'a Function,
    weights: &'a mut DeviceBuffer<u8>,
    embedding: &'a mut DeviceBuffer<bf16>,
    progress: &'a mut dyn FnMut(u64, u64),
    pieces: Vec<Piece>,
    lanes: Vec<Lane>,
    /// The lane whose turn it is.
    turn: usize,
    /// Bytes of the model that are on the device.
    arrived: u64,
    report: LoadReport,
}

impl<'a> Upload<'a> {
    /// Allocates the lanes. `weights` and `embedding` are the arrays to fill, as long as the program says.
    pub(super) fn new(
        gpu: &Gpu,
        packer: &'a Packer<'a>,
        repack: &'a Function,
        staging: Staging,
        weights: &'a mut DeviceBuffer<u8>,
        embedding: &'a mut DeviceBuffer<bf16>,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, GpuError> {
        let program = packer.program();
        let pieces = pieces(program, staging.bytes / size_of::<bf16>());
        let largest = pieces.iter().map(Piece::staged_elements).max();
        // A row of the embedding table must fit as well.
        let elements = largest.unwrap_or(0).max(program.hidden);
        let lane = |_| {
            Ok(Lane {
                host: StagingBuffer::zeroed(gpu, elements)?,
                device: DeviceBuffer::zeroed(gpu, elements)?,
                stream: Stream::new(gpu)?,
                under_way: 0,
            })
        };
        let lanes = (0..staging.buffers.max(1))
            .map(lane)
            .collect::<Result<Vec<_>, GpuError>>()?;
        let page_locked = lanes.iter().all(|lane| lane.host.is_page_locked());
        Ok(Self {
            packer,
            repack,
            weights,
            embedding,
            progress,
            pieces,
            lanes,
            turn: 0,
            arrived: 0,
            report: LoadReport {
                page_locked,
                ..LoadReport::default()
            },
        })
    }

    /// Sends everything and waits until it is in its place.
    pub(super) fn run(mut self) -> Result<LoadReport, MegakernelError> {
        let with_head = head_is_table(self.packer.program());
        if !with_head {
            self.send_table()?;
        }
        for piece in std::mem::take(&mut self.pieces) {
            self.send_piece(&piece, with_head && piece.linear.is_none())?;
        }
        for _ in 0..self.lanes.len() {
            self.wait_for_turn()?;
            let begin = Instant::now();
            self.lanes[self.turn].stream.synchronize()?;
            self.report.wait += begin.elapsed();
            self.turn = (self.turn + 1) % self.lanes.len();
        }
        Ok(self.report)
    }

    /// Waits until the lane whose turn it is can be filled again.
    fn wait_for_turn(&mut self) -> Result<(), GpuError> {
        let begin = Instant::now();
        let lane = &mut self.lanes[self.turn];
        lane.host.wait()?;
        self.report.wait += begin.elapsed();
        let brought = std::mem::take(&mut lane.under_way);
        if brought > 0 {
            self.arrived += brought;
            let total = self.weights.bytes() + self.embedding.bytes();
            (self.progress)(self.arrived, total as u64);
        }
        Ok(())
    }

    /// Sends the embedding table, which lies on the device as it does in the checkpoint.
    fn send_table(&mut self) -> Result<(), MegakernelError> {
        let (vocab, hidden) = (self.packer.program().vocab, self.packer.program().hidden);
        let rows_at_once = self.lanes[0].device.len() / hidden.max(1);
        for first in (0..vocab).step_by(rows_at_once.max(1)) {
            self.wait_for_turn()?;
            let lane = &mut self.lanes[self.turn];
            let elements = rows_at_once.min(vocab - first) * hidden;
            let begin = Instant::now();
            let staged = &mut lane.host.wait()?[..elements];
            self.packer.pack_embedding(first, staged)?;
            self.report.read += begin.elapsed();
            lane.host
                .send(&lane.stream, elements, self.embedding, first * hidden)?;
            lane.under_way = bytes(elements);
            self.report.sent += bytes(elements);
            self.turn = (self.turn + 1) % self.lanes.len();
        }
        Ok(())
    }

    /// Sends a piece of the streams. `as_table`: its rows are those of the embedding table, which takes them on the way.
    fn send_piece(&mut self, piece: &Piece, as_table: bool) -> Result<(), MegakernelError> {
        self.wait_for_turn()?;
        let program = self.packer.program();
        let lane = &mut self.lanes[self.turn];
        let (elements, staged_elements) = (piece.elements, piece.staged_elements());
        let begin = Instant::now();
        let staged = &mut lane.host.wait()?[..staged_elements];
        let (rows, runs) = staged.split_at_mut(elements);
        self.packer
            .read_rows(piece.linear, piece.layer, piece.rows, rows)?;
        runs.copy_from_slice(bytemuck::cast_slice(&piece.runs));
        self.report.read += begin.elapsed();
        lane.host
            .send(&lane.stream, staged_elements, &mut lane.device, 0)?;
        lane.under_way = bytes(elements);
        self.report.sent += bytes(staged_elements);

        let rows = lane.device.device_pointer();
        let params = RepackParams {
            rows,
            // Behind whole tiles, so as aligned as the buffer.
            runs: rows + bytes(elements),
            weights: self.weights.device_pointer(),
            columns: program.linear(piece.linear).columns as u64,
        };
        let config = LaunchConfig {
            grid: [piece.runs.len() as u32, BLOCKS_PER_RUN, 1],
            block: [CONSUMER_WARPS as u32 * 32, 1, 1],
            dynamic_shared_bytes: 0,
        };
        // SAFETY: `RepackParams` is the twin of the kernel's parameter. The piece's rows and runs are in the lane's buffer,
        // and its runs lie within the streams, whose length `weights` has; the lane's stream is waited for before either
        // is freed.
        unsafe { self.repack.launch(&lane.stream, config, &params) }?;
        if as_table {
            let first = piece.rows.begin * TILE * program.hidden;
            // Without the rows of padding.
            let of_table = elements.min(self.embedding.len().saturating_sub(first));
            self.embedding
                .enqueue_copy_of(&lane.stream, first, &lane.device, of_table)?;
            lane.under_way += bytes(of_table);
        }
        self.turn = (self.turn + 1) % self.lanes.len();
        Ok(())
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
