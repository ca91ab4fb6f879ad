//! The weight stream: the order in which a CTA consumes its tiles, which is the order in which they lie in memory.
//!
//! Owns the order and the fragment layout of a tile; the device library follows the same order in `device/linear.cuh`, and
//! the same layout in `device/repack.cuh`. Whoever fills a stream, tile by tile or in pieces from many sides, takes the order
//! from [`Program::blocks`].

use super::{Linear, Program, RowOrder, TILE};
use crate::fuse::WeightId;
use crate::mesh::Share;

/// Bytes of a tile of 16 x 16 bf16 weights.
pub const TILE_BYTES: usize = TILE * TILE * 2;

/// A tile of a linear's packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tile {
    /// Index in [`Program::linears`]; `None` for the head.
    pub linear: Option<usize>,
    /// Layer; zero for the head.
    pub layer: usize,
    /// Row tile of the packed weight.
    pub row: usize,
    /// Column tile.
    pub k: usize,
}

/// Tiles that follow each other in a CTA's stream: those of one pass over its slice of a linear, column tile after column
/// tile, in each the pass's row tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Index in [`Program::linears`]; `None` for the head.
    pub linear: Option<usize>,
    /// Layer; zero for the head.
    pub layer: usize,
    /// Row tiles of the packed weight.
    pub rows: Share,
    /// Column tiles.
    pub k: Share,
    /// Byte offset of its first tile in the CTA's stream.
    pub at: usize,
}

/// A row of a checkpoint's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    /// The tensor.
    pub weight: WeightId,
    /// Its row.
    pub row: usize,
}

impl Linear {
    /// The checkpoint's row that is packed as row `row`; `None` for the padding after the last one.
    pub fn source_row(&self, row: usize) -> Option<Element> {
        match &self.order {
            RowOrder::Stacked => self.in_parts(row, 1),
            RowOrder::ByGroup { groups } => {
                let of_group = self.rows() / groups;
                let element = self.in_parts(row % of_group, *groups)?;
                let rows = self
                    .parts
                    .iter()
                    .find(|(weight, _)| *weight == element.weight)?
                    .1
                    / groups;
                Some(Element {
                    row: element.row + row / of_group * rows,
                    ..element
                })
            }
            RowOrder::Interleaved => {
                let half = TILE / 2;
                let (weight, rows) = self.parts[row % TILE / half];
                let row = row / TILE * half + row % half;
                (row < rows).then_some(Element { weight, row })
            }
        }
    }

    /// Row `row` of the parts one after the other, each part only `1 / of` of its rows.
    fn in_parts(&self, mut row: usize, of: usize) -> Option<Element> {
        for &(weight, rows) in &self.parts {
            if row < rows / of {
                return Some(Element { weight, row });
            }
            row -= rows / of;
        }
        None
    }

    /// The element of a tile, as `(row, column)`, that lies at 16-bit position `at` of its 512 bytes: the A operand of
    /// `mma.m16n8k16`, lane by lane, so that a lane's 16 bytes are its fragment (PTX ISA, "Matrix Fragments for
    /// mma.m16n8k16 with floating point type").
    pub fn fragment(at: usize) -> (usize, usize) {
        let (lane, within) = (at / 8, at % 8);
        let (register, half) = (within / 2, within % 2);
        let row = lane / 4 + register % 2 * 8;
        let column = lane % 4 * 2 + half + register / 2 * 8;
        (row, column)
    }
}

impl Block {
    /// Bytes of its tiles.
    pub fn bytes(&self) -> usize {
        self.k.count * self.column_bytes()
    }

    /// Bytes of a column of tiles: how far a row tile's tiles are apart.
    pub fn column_bytes(&self) -> usize {
        self.rows.count * TILE_BYTES
    }

    /// Byte offset in the CTA's stream of the first tile of the block's row tile `row`, counted as in [`Tile::row`]; its
    /// further tiles follow every [`Self::column_bytes`].
    pub fn row_at(&self, row: usize) -> usize {
        self.at + (row - self.rows.begin) * TILE_BYTES
    }
}

impl Program {
    /// A CTA's stream, block by block.
    pub fn blocks(&self, cta: usize) -> impl Iterator<Item = Block> {
        let mut at = 0;
        self.slices(cta)
            .flat_map(|(linear, layer, rows, k)| {
                let of = self.linear(linear);
                (0..of.tiling.passes).map(move |pass| Block {
                    linear,
                    layer,
                    rows: Share {
                        begin: rows.begin + pass * of.tiling.pass_tiles,
                        count: of.pass_rows(rows.count, pass),
                    },
                    k,
                    at: 0,
                })
            })
            .filter(|block| block.bytes() > 0)
            .map(move |block| {
                let block = Block { at, ..block };
                at += block.bytes();
                block
            })
    }

    /// What a CTA has of every linear, in the order of its stream: which linear, the layer, row tiles, column tiles.
    fn slices(&self, cta: usize) -> impl Iterator<Item = (Option<usize>, usize, Share, Share)> {
        let worker = (cta < self.mesh.workers()).then(|| self.mesh.coordinates(cta));
        let of_layers = worker.into_iter().flat_map(move |(group, member)| {
            let of_layer = move |layer| {
                self.linears.iter().enumerate().map(move |(index, linear)| {
                    let (rows, k) = linear.slice(&self.mesh, group, member);
                    (Some(index), layer, rows, k)
                })
            };
            (0..self.layers).flat_map(of_layer)
        });
        let all_columns = Share {
            begin: 0,
            count: self.head.k_tiles,
        };
        of_layers.chain([(None, 0, self.head_rows(cta), all_columns)])
    }

    /// The linear of that index; the head for `None`.
    pub fn linear(&self, index: Option<usize>) -> &Linear {
        index.map_or(&self.head, |index| &self.linears[index])
    }

    /// Calls `f` for every tile of a CTA, in the order of its stream.
    pub fn for_each_tile(&self, cta: usize, mut f: impl FnMut(Tile)) {
        for block in self.blocks(cta) {
            for k in block.k.indices() {
                for row in block.rows.indices() {
                    f(Tile {
                        linear: block.linear,
                        layer: block.layer,
                        row,
                        k,
                    });
                }
            }
        }
    }

    /// Bytes of a CTA's stream.
    pub fn stream_bytes(&self, cta: usize) -> usize {
        self.blocks(cta).map(|block| block.bytes()).sum()
    }

    /// Byte offset of every CTA's stream in the weights array, and the array's length behind them.
    pub fn stream_offsets(&self) -> Vec<u64> {
        let mut offsets = vec![0];
        for cta in 0..self.mesh.ctas {
            offsets.push(offsets[cta] + self.stream_bytes(cta) as u64);
        }
        offsets
    }
}
