//! The weight stream: the order in which a CTA consumes its tiles, which is the order in which they lie in memory.
//!
//! Owns the order and the fragment layout of a tile; the device library follows the same order in `device/linear.cuh`.

use super::{Linear, Program, RowOrder, TILE};
use crate::fuse::WeightId;

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

impl Program {
    /// Calls `f` for every tile of a CTA, in the order of its stream.
    pub fn for_each_tile(&self, cta: usize, mut f: impl FnMut(Tile)) {
        let mut walk = |linear: &Linear,
                        index: Option<usize>,
                        layer: usize,
                        rows: crate::mesh::Share,
                        k: crate::mesh::Share| {
            for pass in 0..linear.tiling.passes {
                for k_tile in 0..k.count {
                    for row in 0..linear.pass_rows(rows.count, pass) {
                        f(Tile {
                            linear: index,
                            layer,
                            row: rows.begin + pass * linear.tiling.pass_tiles + row,
                            k: k.begin + k_tile,
                        });
                    }
                }
            }
        };
        if cta < self.mesh.workers() {
            let (group, member) = self.mesh.coordinates(cta);
            for layer in 0..self.layers {
                for (index, linear) in self.linears.iter().enumerate() {
                    let (rows, k) = linear.slice(&self.mesh, group, member);
                    walk(linear, Some(index), layer, rows, k);
                }
            }
        }
        walk(
            &self.head,
            None,
            0,
            self.head_rows(cta),
            crate::mesh::Share {
                begin: 0,
                count: self.head.k_tiles,
            },
        );
    }

    /// Bytes of a CTA's stream.
    pub fn stream_bytes(&self, cta: usize) -> usize {
        let mut tiles = self.head_rows(cta).count * self.head.k_tiles;
        if cta < self.mesh.workers() {
            let (group, member) = self.mesh.coordinates(cta);
            for linear in &self.linears {
                let (rows, k) = linear.slice(&self.mesh, group, member);
                tiles += self.layers * rows.count * k.count;
            }
        }
        tiles * TILE_BYTES
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
