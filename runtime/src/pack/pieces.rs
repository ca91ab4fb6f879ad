//! A program's weights cut into pieces that fit a staging buffer, each with the places of its tiles in the streams.
//!
//! Owns the cut and the table that goes with a piece to the GPU. A piece is some row tiles of one linear's packed weight,
//! as [`Packer::read_rows`](super::Packer::read_rows) reads them; the order of its rows is already that of the streams, so
//! all that is left to say is where tiles go: for every row tile and every CTA that has columns of it, one [`Run`]. Places
//! come from `Program::blocks`, and nothing here reads a tensor or knows a device.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Block, Program, TILE};

/// Tiles of one row tile that lie in one CTA's stream, at equal distances. The twin of `RepackRun` in
/// `compiler/device/repack.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Run {
    /// Byte offset in the weights array, all CTAs' streams, of its first tile.
    pub at: u64,
    /// Bytes from a tile to the next.
    pub stride: u32,
    /// Row tile, counted within the piece.
    pub row: u32,
    /// First column tile.
    pub k: u32,
    /// Column tiles.
    pub count: u32,
}

/// Elements of a staging buffer that a run takes.
const RUN_ELEMENTS: usize = size_of::<Run>() / size_of::<bf16>();

/// Some row tiles of a linear, in all columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index in [`Program::linears`]; `None` for the head.
    pub linear: Option<usize>,
    /// Layer; zero for the head.
    pub layer: usize,
    /// Row tiles of the packed weight.
    pub rows: Share,
    /// Elements of its rows; in a staging buffer the runs lie behind them.
    pub elements: usize,
    /// How many runs it has.
    pub runs: usize,
}

impl Piece {
    /// Elements that it takes in a staging buffer, its runs included.
    pub fn staged_elements(&self) -> usize {
        self.elements + self.runs * RUN_ELEMENTS
    }
}

/// All weights of the streams in pieces.
pub struct Pieces<'a> {
    program: &'a Program,
    /// By layer and linear, the head's behind them; their offsets are of the weights array.
    blocks: Vec<Vec<Block>>,
}

impl<'a> Pieces<'a> {
    /// Finds the places of a program's tiles.
    pub fn new(program: &'a Program) -> Pieces<'a> {
        let mut blocks = vec![Vec::new(); program.layers * program.linears.len() + 1];
        for (cta, offset) in (0..program.mesh.ctas).zip(program.stream_offsets()) {
            for block in program.blocks(cta) {
                blocks[index(program, block.linear, block.layer)].push(Block {
                    at: offset as usize + block.at,
                    ..block
                });
            }
        }
        Pieces { program, blocks }
    }

    /// Cuts the weights, in the order of layers, the head last, into pieces that take at most `limit` elements of a staging
    /// buffer; a row tile is never cut, even where it takes more.
    pub fn cut(&self, limit: usize) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        for blocks in &self.blocks {
            let Some(&Block { linear, layer, .. }) = blocks.first() else {
                continue;
            };
            let of = self.program.linear(linear);
            let elements = TILE * of.columns;
            // Of each row tile.
            let mut runs = vec![0; of.rows() / TILE];
            for row in blocks.iter().flat_map(|block| block.rows.indices()) {
                runs[row] += 1;
            }
            let first = pieces.len();
            for (row, runs) in runs.into_iter().enumerate() {
                match pieces[first..].last_mut() {
                    Some(piece)
                        if piece.staged_elements() + elements + runs * RUN_ELEMENTS <= limit =>
                    {
                        piece.rows.count += 1;
                        piece.elements += elements;
                        piece.runs += runs;
                    }
                    _ => pieces.push(Piece {
                        linear,
                        layer,
                        rows: Share {
                            begin: row,
                            count: 1,
                        },
                        elements,
                        runs,
                    }),
                }
            }
        }
        pieces
    }

    /// Where a piece's tiles go; every tile is in one of its runs. What a GPU addresses fits the fields: 32 bits count tiles
    /// of 512 bytes, and the distance of two column tiles is less than a CTA's part of one linear.
    pub fn runs(&self, piece: &Piece) -> impl Iterator<Item = Run> {
        let rows = piece.rows;
        let of_block = move |block: &Block| {
            let block = *block;
            block.rows.overlap(&rows).indices().map(move |row| Run {
                at: block.row_at(row) as u64,
                stride: block.column_bytes() as u32,
                row: (row - rows.begin) as u32,
                k: block.k.begin as u32,
                count: block.k.count as u32,
            })
        };
        self.blocks[index(self.program, piece.linear, piece.layer)]
            .iter()
            .flat_map(of_block)
    }
}

/// Where the blocks of a linear are in [`Pieces`].
fn index(program: &Program, linear: Option<usize>, layer: usize) -> usize {
    let linears = program.linears.len();
    linear.map_or(program.layers * linears, |linear| layer * linears + linear)
}

#[cfg(test)]
mod tests {
    use mirage_testing::{Choice, Model, SIZES, Sizes, llama3, planned, qwen3, target};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::pack::{HostWeights, Packer};

    /// What `mirage_repack` does with a piece, lane by lane, in its own arithmetic. `rows` are the piece's, as pairs of
    /// columns.
    fn repack(runs: &[Run], rows: &[u32], columns: usize, weights: &mut [u8], written: &mut [u8]) {
        let pairs = columns / 2;
        for run in runs {
            for i in 0..run.count as usize {
                for lane in 0..32 {
                    let top = (run.row as usize * 16 + lane / 4) * pairs
                        + lane % 4
                        + (run.k as usize + i) * 8;
                    let bottom = top + 8 * pairs;
                    let fragment = [rows[top], rows[bottom], rows[top + 4], rows[bottom + 4]];
                    let out = run.at as usize + i * run.stride as usize + lane * 16;
                    weights[out..out + 16].copy_from_slice(bytemuck::bytes_of(&fragment));
                    written[out / 16] += 1;
                }
            }
        }
    }

    /// Pieces, repacked one by one, are the streams; every 16 bytes are written once.
    fn check(model: &Model, program: &Program, limit: usize) {
        let checkpoint = Checkpoint::open(model).unwrap();
        let packer = Packer::new(program, &checkpoint).unwrap();
        let want = HostWeights::pack(program, &checkpoint).unwrap();
        let mut weights = vec![0xee; want.streams.len()];
        let mut written = vec![0; weights.len() / 16];
        let pieces = Pieces::new(program);
        for piece in pieces.cut(limit) {
            let of = program.linear(piece.linear);
            let runs: Vec<Run> = pieces.runs(&piece).collect();
            assert_eq!(runs.len(), piece.runs);
            let tile_row = TILE * of.columns + piece.runs / piece.rows.count * RUN_ELEMENTS;
            assert!(
                piece.staged_elements() <= limit.max(tile_row),
                "{} elements",
                piece.staged_elements()
            );
            let mut rows = vec![bf16::ONE; piece.elements];
            packer
                .read_rows(piece.linear, piece.layer, piece.rows, &mut rows)
                .unwrap();
            let pairs: Vec<u32> = rows
                .as_chunks()
                .0
                .iter()
                .map(|[low, high]: &[bf16; 2]| {
                    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
                })
                .collect();
            repack(&runs, &pairs, of.columns, &mut weights, &mut written);
        }
        assert!(written.iter().all(|&times| times == 1));
        assert!(weights == want.streams, "{}", program.mesh);
    }

    #[test]
    fn repacked_pieces_are_the_streams() {
        let tied = qwen3(SIZES);
        let untied = llama3(Sizes {
            tied: false,
            ..SIZES
        });
        // A row tile at a time; some row tiles; each linear in one piece.
        for limit in [1, 8_000, usize::MAX] {
            for model in [&tied, &untied] {
                for sms in [1, 3, 132] {
                    check(model, &planned(model, &target(sms, 1, 64)), limit);
                }
            }
            for choice in Choice::all() {
                check(&tied, &choice.program(&tied, 2, 64), limit);
            }
        }
    }

    #[test]
    fn pieces_keep_to_the_limit() {
        let model = qwen3(SIZES);
        let program = planned(&model, &target(4, 1, 64));
        let check = |limit, expect: &[usize]| {
            let head = Pieces::new(&program)
                .cut(limit)
                .into_iter()
                .filter(|piece| piece.linear.is_none());
            assert_eq!(
                head.map(|piece| piece.rows.count).collect::<Vec<_>>(),
                expect
            );
        };
        // 75 rows are 5 row tiles of 16 x 80 elements and a run of 12.
        check(1, &[1; 5]);
        check(2 * 1292 - 1, &[1; 5]);
        check(2 * 1292, &[2, 2, 1]);
        check(usize::MAX, &[5]);
    }

    #[test]
    fn a_run_has_the_size_of_its_twin() {
        assert_eq!(size_of::<Run>(), 24);
    }
}
