//! The matrix product of a linear: a CTA's tiles, taken from its weight stream in order, times the step's columns. The twin
//! of `compiler/device/linear.cuh`, and of `head.cuh` for the logits.

use mirage_compiler::fuse::Epilogue;
use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Linear, TILE, TILE_BYTES};

use super::area::PhaseFault;
use super::cta::{Cta, Now};
use super::exchange::publish;

/// Lanes of a warp.
const LANES: usize = 32;
/// Elements of a tile that one lane holds, neighbours in memory.
const OF_LANE: usize = TILE * TILE / LANES;
/// Lanes that hold the same rows of a tile; they differ in their columns.
const QUAD: usize = 4;

/// Sixteen inputs of a column in the order in which a tile's elements meet them: `[lane % 4][element of the lane]`.
type Inputs = [[f32; OF_LANE]; QUAD];
/// Products of a tile's elements, in the tile's own order, summed over column tiles.
type Sums = [[f32; OF_LANE]; LANES];

impl Cta {
    /// The linear of a worker: all passes, published.
    pub(super) fn linear(&mut self, now: &Now<'_>, linear: &Linear) -> Result<(), PhaseFault> {
        let columns = now.columns.len();
        let (rows, k) = self.slice(now.shared, linear);
        let inputs = self.inputs(now, k);
        let scales = self.norm_scales(linear, columns);
        let words = linear.words_at + self.index * columns * linear.words();
        for pass in 0..linear.tiling.passes {
            let tiles = linear.pass_rows(rows.count, pass);
            if tiles == 0 {
                break;
            }
            self.multiply(now, &inputs, tiles, k.count)?;
            let outputs = tiles * linear.outputs_per_tile();
            for (column, scale) in scales.iter().enumerate() {
                let products = &self.products[column * tiles * TILE..][..tiles * TILE];
                let output = |index: usize| match linear.epilogue {
                    Epilogue::Store | Epilogue::AddResidual => products[index] * scale,
                    Epilogue::SwiGlu => {
                        // Each tile holds eight rows of gate over eight rows of up.
                        let row = index / (TILE / 2) * TILE + index % (TILE / 2);
                        silu(products[row] * scale) * (products[row + TILE / 2] * scale)
                    }
                };
                let at = words + column * linear.words() + pass * linear.pass_words();
                publish(now, at, (0..outputs).map(output))?;
            }
        }
        Ok(())
    }

    /// The LM head: this CTA's logits of all columns, in f32.
    pub(super) fn head(&mut self, now: &Now<'_>) -> Result<(), PhaseFault> {
        let program = &now.shared.program;
        let head = &program.head;
        let columns = now.columns.len();
        let (rows, k) = self.head_slice(program);
        let inputs = self.inputs(now, k);
        let scales = self.norm_scales(head, columns);
        let width = rows.count * TILE;
        self.logits.clear();
        self.logits.resize(columns * width, 0.0);
        for pass in 0..head.tiling.passes {
            let tiles = head.pass_rows(rows.count, pass);
            if tiles == 0 {
                break;
            }
            self.multiply(now, &inputs, tiles, k.count)?;
            let first = pass * head.tiling.pass_tiles * TILE;
            for (column, scale) in scales.iter().enumerate() {
                let products = &self.products[column * tiles * TILE..][..tiles * TILE];
                let to = &mut self.logits[column * width + first..][..tiles * TILE];
                for (to, product) in to.iter_mut().zip(products) {
                    *to = product * scale;
                }
            }
        }
        Ok(())
    }

    /// `1 / sqrt(mean square + eps)` of each column of the residual stream, or 1 where the linear has no norm.
    fn norm_scales(&self, linear: &Linear, columns: usize) -> Vec<f32> {
        let scale = |squares: &f32| {
            linear.norm.map_or(1.0, |norm| {
                1.0 / (squares / linear.columns as f32 + norm.eps).sqrt()
            })
        };
        self.sum_squares[..columns].iter().map(scale).collect()
    }

    /// The activation as tiles meet it, `[column tiles, columns]`.
    fn inputs(&self, now: &Now<'_>, k: Share) -> Vec<Inputs> {
        let columns = now.columns.len();
        let mut inputs = Vec::with_capacity(k.count * columns);
        for tile in 0..k.count {
            for column in 0..columns {
                let row = &self.activation[column * now.shared.stride + tile * TILE..][..TILE];
                inputs.push(std::array::from_fn(|quad| {
                    std::array::from_fn(|i| row[Linear::fragment(quad * OF_LANE + i).1])
                }));
            }
        }
        inputs
    }

    /// One pass: `tiles` row tiles, of which the stream holds those of one column tile side by side. Leaves the products of
    /// all columns, `[columns, rows]`.
    fn multiply(
        &mut self,
        now: &Now<'_>,
        inputs: &[Inputs],
        tiles: usize,
        k_tiles: usize,
    ) -> Result<(), PhaseFault> {
        let columns = now.columns.len();
        let bytes = tiles * k_tiles * TILE_BYTES;
        let weights = &now.shared.weights;
        let begin = weights.stream_offsets[self.index] as usize;
        let end = weights.stream_offsets[self.index + 1] as usize;
        if begin + self.read + bytes > end {
            return Err(PhaseFault::Stream {
                end: end - begin,
                wanted: self.read + bytes,
            });
        }
        let (pass, _) = weights.streams[begin + self.read..][..bytes].as_chunks::<TILE_BYTES>();
        self.read += bytes;
        self.products.clear();
        self.products.resize(columns * tiles * TILE, 0.0);
        let mut sums = vec![[[0.0; OF_LANE]; LANES]; columns];
        for row in 0..tiles {
            sums.fill([[0.0; OF_LANE]; LANES]);
            let of_row = pass.iter().skip(row).step_by(tiles);
            for (tile, inputs) in of_row.zip(inputs.chunks_exact(columns)) {
                let tile = unpack(tile);
                for (sums, inputs) in sums.iter_mut().zip(inputs) {
                    add_products(sums, &tile, inputs);
                }
            }
            for (column, sums) in sums.iter().enumerate() {
                let to = &mut self.products[(column * tiles + row) * TILE..][..TILE];
                for (at, sum) in sums.as_flattened().iter().enumerate() {
                    to[Linear::fragment(at).0] += sum;
                }
            }
        }
        Ok(())
    }
}

/// The elements of a tile, lane by lane.
fn unpack(tile: &[u8; TILE_BYTES]) -> Sums {
    let (elements, _) = tile.as_chunks::<2>();
    let (lanes, _) = elements.as_chunks::<OF_LANE>();
    let element = |bytes: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    std::array::from_fn(|lane| lanes[lane].map(element))
}

fn add_products(sums: &mut Sums, tile: &Sums, inputs: &Inputs) {
    let (sums, _) = sums.as_chunks_mut::<QUAD>();
    let (tile, _) = tile.as_chunks::<QUAD>();
    for (sums, weights) in sums.iter_mut().zip(tile) {
        for ((sums, weights), inputs) in sums.iter_mut().zip(weights).zip(inputs) {
            for ((sum, weight), input) in sums.iter_mut().zip(weights).zip(inputs) {
                *sum += weight * input;
            }
        }
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
