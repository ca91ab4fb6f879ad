//! Packs a checkpoint's tensors into the arrays that a program's executors read.
//!
//! Owns the walk from tensors to arrays: the weight stream of every CTA, the embedding table, the norms and the table of
//! rotary angles. Which tile comes when, which row of the checkpoint it holds and how a tile lies in its 512 bytes is the
//! program's business (`mirage_compiler::program`); nothing here knows an executor or a GPU.
//!
//! Two ways lead into the streams. [`Packer::pack_stream`] fills the stream of one CTA, tile by tile, for the CPU:
//! [`HostWeights::pack`] makes all arrays at once. For a GPU, which puts tiles in their places itself, [`Packer::read_rows`]
//! reads packed rows as they are, piece by piece, and [`pieces`] says which piece becomes which tiles of whose streams;
//! nothing is held twice. Both take the order of rows from `Linear::source_row` and the order of tiles from
//! `Program::blocks`.

pub mod pieces;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use mirage_compiler::fuse::{Rope, WeightId};
use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Block, Linear, Program, TILE, TILE_BYTES};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Tensor};

/// Why weights cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A tensor is missing, misshapen or unreadable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The caller's buffer does not fit what is packed into it.
    #[error("{what} takes {expected} elements, but the buffer given has {found}")]
    Buffer {
        /// What was to be packed.
        what: &'static str,
        /// Elements it takes (bytes, for a stream).
        expected: usize,
        /// Elements of the buffer.
        found: usize,
    },
    /// A program that was not made by the compiler.
    #[error("the program is malformed ({reason}); compile the graph again")]
    Program {
        /// What is wrong with it.
        reason: String,
    },
}

/// Bytes of a tile's row in the checkpoint's order.
const ROW_BYTES: usize = TILE * 2;
/// Pairs of elements in a row of a tile; a pair is neighbours in the packed tile too.
const ROW_PAIRS: usize = TILE / 2;
/// Rows of the embedding table that a thread packs in one go: enough that handing out the work costs nothing beside them.
const TABLE_ROWS: usize = 64;

/// A checkpoint's tensors as a program names them, found and of the right shape.
#[derive(Debug)]
pub struct Packer<'a> {
    program: &'a Program,
    /// By [`WeightId`]: one tensor, or one of every layer.
    tensors: Vec<Vec<Tensor<'a>>>,
    /// Where the pair of columns `2 p, 2 p + 1` of a tile's row lies in its 512 bytes.
    pair_at: [[usize; ROW_PAIRS]; TILE],
}

impl<'a> Packer<'a> {
    /// Finds the tensors of a program and checks their shapes.
    ///
    /// # Errors
    /// [`PackError::Checkpoint`] for a tensor that is missing or of another shape.
    pub fn new(program: &'a Program, checkpoint: &'a Checkpoint) -> Result<Packer<'a>, PackError> {
        let mut tensors = Vec::with_capacity(program.weights.len());
        for weight in &program.weights {
            let per_layer = weight.name.contains(LAYER);
            let copies = if per_layer { program.layers } else { 1 };
            let found = (0..copies)
                .map(|layer| {
                    let tensor =
                        checkpoint.tensor(&weight.name.replace(LAYER, &layer.to_string()))?;
                    tensor.expect_shape(&weight.shape)?;
                    Ok(tensor)
                })
                .collect::<Result<_, CheckpointError>>()?;
            tensors.push(found);
        }
        let mut pair_at = [[0; ROW_PAIRS]; TILE];
        for at in (0..TILE * TILE).step_by(2) {
            let (row, column) = Linear::fragment(at);
            pair_at[row][column / 2] = at * 2;
        }
        Ok(Packer {
            program,
            tensors,
            pair_at,
        })
    }

    /// The program whose tensors these are.
    pub fn program(&self) -> &'a Program {
        self.program
    }

    /// Packs the weight stream of a CTA: its tiles in the order of [`Program::for_each_tile`], padding rows zero. `out` has
    /// [`Program::stream_bytes`] bytes; what it held is overwritten. Runs on the calling thread.
    ///
    /// # Errors
    /// [`PackError::Buffer`] for a buffer of another length.
    pub fn pack_stream(&self, cta: usize, out: &mut [u8]) -> Result<(), PackError> {
        expect_length(
            "the weight stream of a CTA",
            self.program.stream_bytes(cta),
            out.len(),
        )?;
        for block in self.program.blocks(cta) {
            self.pack_block(&block, &mut out[block.at..][..block.bytes()])?;
        }
        Ok(())
    }

    /// Packs the tiles of one block.
    fn pack_block(&self, block: &Block, out: &mut [u8]) -> Result<(), PackError> {
        let linear = self.program.linear(block.linear);
        // The block's rows, each cut to its columns: they are read once for every column tile.
        let sources = rows_of(block.rows)
            .map(|row| self.row_bytes(linear, block.layer, row, block.k))
            .collect::<Result<Vec<_>, _>>()?;
        let columns = out.chunks_exact_mut(block.column_bytes());
        for (k_tile, tiles) in columns.enumerate() {
            let rows_of_tiles = sources.chunks_exact(TILE);
            for (tile, rows) in tiles.chunks_exact_mut(TILE_BYTES).zip(rows_of_tiles) {
                self.pack_tile(rows, k_tile, tile);
            }
        }
        Ok(())
    }

    /// Fills one tile from column tile `k_tile` of 16 rows.
    fn pack_tile(&self, rows: &[Option<Cow<'_, [u8]>>], k_tile: usize, tile: &mut [u8]) {
        for (row, places) in rows.iter().zip(&self.pair_at) {
            let bytes = match row {
                Some(row) => &row[k_tile * ROW_BYTES..][..ROW_BYTES],
                None => &[0; ROW_BYTES],
            };
            for (pair, at) in bytes.chunks_exact(4).zip(places) {
                tile[*at..*at + 4].copy_from_slice(pair);
            }
        }
    }

    /// The elements of packed row `row` in the columns of the slice, as little-endian bf16; `None` for padding.
    fn row_bytes(
        &self,
        linear: &Linear,
        layer: usize,
        row: usize,
        k: Share,
    ) -> Result<Option<Cow<'a, [u8]>>, PackError> {
        let Some(element) = linear.source_row(row) else {
            return Ok(None);
        };
        let tensor = self.tensor(element.weight, layer)?;
        let (start, count) = (k.begin * TILE, k.count * TILE);
        if tensor.dtype() == Dtype::Bf16 {
            let first = (element.row * tensor.columns() + start) * 2;
            if let Some(bytes) = tensor.bytes().get(first..first + count * 2) {
                return Ok(Some(Cow::Borrowed(bytes)));
            }
        }
        let mut values = vec![bf16::ZERO; count];
        tensor.read_bf16(element.row, start, &mut values)?;
        Ok(Some(Cow::Owned(
            values
                .into_iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        )))
    }

    /// Reads the packed rows of some row tiles of a linear (`None` for the head) in all their columns, `[rows, columns]`, rows
    /// of padding zero. Runs on the calling thread.
    ///
    /// # Errors
    /// [`PackError::Buffer`] for a buffer of another length.
    pub fn read_rows(
        &self,
        linear: Option<usize>,
        layer: usize,
        tiles: Share,
        out: &mut [bf16],
    ) -> Result<(), PackError> {
        let linear = self.program.linear(linear);
        let columns = linear.columns;
        expect_length("rows of a weight", tiles.count * TILE * columns, out.len())?;
        for (out, row) in out.chunks_exact_mut(columns.max(1)).zip(rows_of(tiles)) {
            match linear.source_row(row) {
                Some(element) => {
                    let tensor = self.tensor(element.weight, layer)?;
                    tensor.read_bf16(element.row, 0, out)?;
                }
                None => out.fill(bf16::ZERO),
            }
        }
        Ok(())
    }

    fn tensor(&self, weight: WeightId, layer: usize) -> Result<&Tensor<'a>, PackError> {
        let of_layers = self.tensors.get(weight.0 as usize);
        of_layers
            .and_then(|tensors| tensors.get(if tensors.len() == 1 { 0 } else { layer }))
            .ok_or_else(|| PackError::Program {
                reason: format!("there is no weight {} of layer {layer}", weight.0),
            })
    }

    /// Packs rows of the embedding table from `first` on, `[rows, hidden]`; `out` holds whole rows. Runs on the calling
    /// thread.
    ///
    /// # Errors
    /// [`PackError::Buffer`] for a buffer that is no multiple of a row or goes beyond the table.
    pub fn pack_embedding(&self, first: usize, out: &mut [bf16]) -> Result<(), PackError> {
        let (vocab, hidden) = (self.program.vocab, self.program.hidden);
        let rows = out.len() / hidden.max(1);
        if first + rows > vocab || rows * hidden != out.len() {
            return Err(PackError::Buffer {
                what: "the rest of the embedding table",
                expected: vocab.saturating_sub(first) * hidden,
                found: out.len(),
            });
        }
        let tensor = self.tensor(self.program.embedding, 0)?;
        for (row, out) in (first..).zip(out.chunks_exact_mut(hidden.max(1))) {
            tensor.read_bf16(row, 0, out)?;
        }
        Ok(())
    }

    /// Packs the norms' gammas, laid out as [`mirage_compiler::program::Norms`] says; `out` has `norms.len` elements. Gaps
    /// between gammas are zero.
    ///
    /// # Errors
    /// [`PackError::Buffer`] for a buffer of another length.
    pub fn pack_norms(&self, out: &mut [bf16]) -> Result<(), PackError> {
        let norms = &self.program.norms;
        expect_length("the array of norms", norms.len, out.len())?;
        out.fill(bf16::ZERO);
        let of_layers = (0..self.program.layers).flat_map(|layer| {
            let place =
                move |&(weight, at): &(_, usize)| (weight, layer, layer * norms.layer_stride + at);
            norms.layer.iter().map(place)
        });
        let last = norms.last.map(|weight| {
            let at = self.program.layers * norms.layer_stride;
            (weight, 0, at)
        });
        for (weight, layer, at) in of_layers.chain(last) {
            let tensor = self.tensor(weight, layer)?;
            let Some(out) = out.get_mut(at..at + tensor.columns()) else {
                return Err(PackError::Program {
                    reason: format!(
                        "the norm {} lies outside of the array of norms",
                        tensor.name()
                    ),
                });
            };
            tensor.read_bf16(0, 0, out)?;
        }
        Ok(())
    }
}

/// The packed rows of row tiles.
fn rows_of(tiles: Share) -> Range<usize> {
    let tiles = tiles.indices();
    tiles.start * TILE..tiles.end * TILE
}

/// What stands for the layer's index in a weight's name.
const LAYER: &str = "{layer}";

fn expect_length(what: &'static str, expected: usize, found: usize) -> Result<(), PackError> {
    if expected == found {
        return Ok(());
    }
    Err(PackError::Buffer {
        what,
        expected,
        found,
    })
}

/// The rotary angles of every position of a program, `[max_seq, head_dim / 2]` of {cos, sin}.
pub fn rope_table(program: &Program) -> Vec<[f32; 2]> {
    let attention = &program.attention;
    rope_angles(&attention.rope, attention.head_dim, program.max_seq)
}

/// The rotary angles of so many positions, `[positions, head_dim / 2]` of {cos, sin}. Pair `i` turns by `position * f(i)`
/// with `f` of [`Rope::inverse_frequencies`] (theta^(-2i / head_dim), Llama-3's scaling applied). The product, sine and
/// cosine are taken in f64 and rounded to f32, so that angles are exact at any context.
pub(crate) fn rope_angles(rope: &Rope, head_dim: usize, positions: usize) -> Vec<[f32; 2]> {
    let frequencies = rope.inverse_frequencies(head_dim);
    let turn = |position: usize, frequency: f32| {
        let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
        [cos as f32, sin as f32]
    };
    let frequencies = &frequencies;
    (0..positions)
        .into_par_iter()
        .flat_map_iter(|position| frequencies.iter().map(move |&f| turn(position, f)))
        .collect()
}

/// All arrays of a program in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostWeights {
    /// The weight streams of all CTAs, one after the other: tiles of 256 little-endian bf16.
    pub streams: Vec<u8>,
    /// Where each CTA's stream begins in `streams`, in bytes, and where the last one ends.
    pub stream_offsets: Vec<u64>,
    /// The embedding table, `[vocab, hidden]`.
    pub embedding: Vec<bf16>,
    /// The norms' gammas.
    pub norms: Vec<bf16>,
    /// {cos, sin} of `[max_seq, head_dim / 2]`.
    pub rope: Vec<[f32; 2]>,
}

impl HostWeights {
    /// Packs everything, CTAs in parallel.
    ///
    /// # Errors
    /// Those of [`Packer::new`].
    pub fn pack(program: &Program, checkpoint: &Checkpoint) -> Result<HostWeights, PackError> {
        let packer = Packer::new(program, checkpoint)?;
        let stream_offsets = program.stream_offsets();
        let mut streams = vec![0; stream_offsets.last().map_or(0, |&end| end as usize)];
        let mut slices = Vec::with_capacity(program.mesh.ctas);
        let mut rest = &mut streams[..];
        for cta in 0..program.mesh.ctas {
            let (slice, behind) = rest.split_at_mut(program.stream_bytes(cta));
            slices.push(slice);
            rest = behind;
        }
        slices
            .into_par_iter()
            .enumerate()
            .try_for_each(|(cta, slice)| packer.pack_stream(cta, slice))?;
        let mut embedding = vec![bf16::ZERO; program.vocab * program.hidden];
        embedding
            .par_chunks_mut((TABLE_ROWS * program.hidden).max(1))
            .enumerate()
            .try_for_each(|(part, rows)| packer.pack_embedding(part * TABLE_ROWS, rows))?;
        let mut norms = vec![bf16::ZERO; program.norms.len];
        packer.pack_norms(&mut norms)?;
        Ok(HostWeights {
            streams,
            stream_offsets,
            embedding,
            norms,
            rope: rope_table(program),
        })
    }
}
