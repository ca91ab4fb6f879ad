//! A virtual CTA: what on the device is one SM's registers and shared memory.

use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Linear, Norm, Program, TILE};

use super::Shared;
use super::area::{Values, round};
use super::memory::Memory;

/// One token position that a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Column {
    /// Slot in the KV cache; `None` where the column is idle. Its results are finite and ignored.
    pub(super) slot: Option<usize>,
    /// Position in the sequence.
    pub(super) position: usize,
    /// The token there.
    pub(super) token: u32,
    /// Column of this step at which the sequence's run of positions begins.
    pub(super) first: usize,
}

/// What the phases of a step are told.
#[derive(Clone, Copy)]
pub(super) struct Now<'a> {
    pub(super) shared: &'a Shared,
    pub(super) memory: &'a dyn Memory,
    pub(super) columns: &'a [Column],
    /// Whether every column is a sequence of its own.
    pub(super) alone: bool,
    /// Interleaved parts of a sequence's positions.
    pub(super) kv_splits: usize,
    /// A column below this position is attended to by every member of its group, for itself.
    pub(super) replicate_below: usize,
    pub(super) layer: usize,
    pub(super) epoch: u32,
}

/// New rows of the KV cache, kept until the phase has ended: no CTA reads a row of this very step from the cache.
pub(super) struct Append {
    /// First element in the cache.
    pub(super) at: usize,
    pub(super) keys: Vec<u16>,
    pub(super) values: Vec<u16>,
}

/// What attention has made of one query head of a column.
pub(super) struct Head {
    pub(super) column: usize,
    /// Counted over all groups.
    pub(super) head: usize,
    /// `[head_dim]`
    pub(super) values: Vec<f32>,
}

/// The residual stream in f32, as this CTA holds it.
pub(super) enum Stream {
    /// All of it, `[columns, hidden]`.
    Replicated(Vec<f32>),
    /// The words of this worker's share.
    Scattered(Vec<Values>),
}

pub(super) struct Cta {
    pub(super) index: usize,
    /// Coordinates on the mesh; only workers hold a part of the layers.
    pub(super) group: usize,
    pub(super) member: usize,
    pub(super) worker: bool,
    /// Bytes of the weight stream that this step has read.
    pub(super) read: usize,
    /// What the next linear multiplies, or q, k and v: `[columns, stride]`, rounded to bf16.
    pub(super) activation: Vec<f32>,
    /// Sums of squares of the residual stream, for the norm of the linear that reads it.
    pub(super) sum_squares: Vec<f32>,
    pub(super) stream: Stream,
    pub(super) appends: Vec<Append>,
    /// Heads of replicated columns, finished and not yet the next linear's input.
    pub(super) heads: Vec<Head>,
    /// The head's results, `[columns, rows of this CTA]`.
    pub(super) logits: Vec<f32>,
    /// Products of one pass, `[columns, rows]`.
    pub(super) products: Vec<f32>,
}

impl Cta {
    pub(super) fn new(program: &Program, index: usize, stride: usize) -> Cta {
        let (group, member) = program.mesh.coordinates(index);
        let columns = program.most_columns();
        Cta {
            index,
            group,
            member,
            worker: index < program.mesh.workers(),
            read: 0,
            activation: vec![0.0; columns * stride],
            sum_squares: vec![0.0; columns],
            stream: Stream::Scattered(Vec::new()),
            appends: Vec::new(),
            heads: Vec::new(),
            logits: Vec::new(),
            products: Vec::new(),
        }
    }

    /// The tiles of a linear of the layer that this worker multiplies: row tiles and column tiles.
    pub(super) fn slice(&self, shared: &Shared, linear: &Linear) -> (Share, Share) {
        linear.slice(&shared.mesh, self.group, self.member)
    }

    /// The head's tiles of this CTA.
    pub(super) fn head_slice(&self, program: &Program) -> (Share, Share) {
        let k = Share {
            begin: 0,
            count: program.head.k_tiles,
        };
        (program.head_rows(self.index), k)
    }

    /// Writes values that begin at `begin` of a linear's whole input, those of them that `k` holds, to a column.
    pub(super) fn store(
        &mut self,
        stride: usize,
        column: usize,
        k: Share,
        begin: usize,
        values: &[f32],
    ) {
        let slice = k.begin * TILE..(k.begin + k.count) * TILE;
        for (index, &value) in (begin..).zip(values) {
            if slice.contains(&index) {
                self.activation[column * stride + index - slice.start] = round(value);
            }
        }
    }
}

/// The linear that the residual stream is prepared for.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    /// Columns of its input that this CTA multiplies.
    pub(super) k: Share,
    /// Its norm's factors, one for each element of the stream; `None` where it has no norm.
    pub(super) gamma: Option<&'a [half::bf16]>,
}

impl<'a> Operand<'a> {
    /// The operand of a linear of layer `layer`, or of the head.
    pub(super) fn new(shared: &'a Shared, linear: &Linear, k: Share, layer: usize) -> Operand<'a> {
        let gamma = |norm: Norm| {
            let at = norm.gamma_at + layer * norm.gamma_stride;
            &shared.weights.norms[at..at + linear.columns]
        };
        Operand {
            k,
            gamma: linear.norm.map(gamma),
        }
    }

    /// Factor of element `index`.
    pub(super) fn gamma(&self, index: usize) -> f32 {
        self.gamma.map_or(1.0, |gamma| gamma[index].to_f32())
    }
}
