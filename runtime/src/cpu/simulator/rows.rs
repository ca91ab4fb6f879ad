//! Steps that exchange rows: what their phases hand on is plain memory, and a CTA's flag says that it is there
//! (`compiler/device/rows.cuh`). Flags are words behind those of the exchange area here.

use mirage_compiler::program::{Along, Phase, Program};

use crate::cpu::step::{Piece, Run};

/// The flags of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Buffer {
    Linear(usize),
    Stream(usize),
    Heads,
}

impl Buffer {
    fn at(self, program: &Program) -> usize {
        let linears = program.linears.len();
        let index = match self {
            Buffer::Linear(linear) => linear,
            Buffer::Stream(linear) => linears + linear,
            Buffer::Heads => 2 * linears,
        };
        program.exchange.words + index * program.mesh.ctas
    }
}

/// Words that flags take.
pub(super) fn flags(program: &Program) -> usize {
    (2 * program.linears.len() + 1) * program.mesh.ctas
}

/// First of the flags that a CTA raises after a piece, all of them the CTAs' in order.
pub(super) fn raised(program: &Program, run: &Run<'_>, piece: Piece) -> Option<usize> {
    let Piece::Phase { index, .. } = piece else {
        return None;
    };
    let buffer = match run.step.layer[index] {
        Phase::Linear(linear) => Buffer::Linear(linear),
        Phase::Attention { .. } => Buffer::Heads,
        Phase::ReduceScatter { exchange, .. } => Buffer::Stream(exchange.source),
        Phase::CollectHeads { .. }
        | Phase::Collect { .. }
        | Phase::AddToStream { .. }
        | Phase::GatherStream { .. } => return None,
    };
    Some(buffer.at(program))
}

/// First of the flags that a CTA waits for ahead of a piece, and whether its own group's are all.
pub(super) fn awaited(
    program: &Program,
    run: &Run<'_>,
    piece: Piece,
    worker: bool,
) -> Option<(usize, bool)> {
    let (buffer, own_group) = match piece {
        Piece::Phase { index, .. } => match run.step.layer[index] {
            Phase::Linear(_) => return None,
            Phase::Attention { exchange, .. } => (Buffer::Linear(exchange.source), true),
            Phase::CollectHeads { all_groups, .. } => (Buffer::Heads, !all_groups),
            Phase::Collect { exchange, .. } => (
                Buffer::Linear(exchange.source),
                exchange.groups == Along::Own,
            ),
            Phase::AddToStream { exchange, .. } | Phase::ReduceScatter { exchange, .. } => {
                (Buffer::Linear(exchange.source), false)
            }
            Phase::GatherStream { exchange, .. } => (Buffer::Stream(exchange.source), false),
        },
        Piece::Head if !worker => (Buffer::Stream(run.writer.source), false),
        Piece::Embedding | Piece::HandOver | Piece::Head => return None,
    };
    Some((buffer.at(program), own_group))
}
