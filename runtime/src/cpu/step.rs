//! One step as a CTA goes through it: all phases of all layers, and the head, in the order that the emitter writes into
//! `kernel.cu`. Who has a part in what is known here; how the CTAs run beside each other is not.

use mirage_compiler::plan::StreamForm;
use mirage_compiler::program::{Exchange, Linear, Next, Phase, Program, Step};

use super::Shared;
use super::area::PhaseFault;
use super::cta::{Column, Cta, Now, Operand};
use super::memory::Memory;

/// Which kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Fills the cache; no logits.
    Prefill,
    /// Fills the cache, and makes logits: a prompt's last position is in it.
    LastPrefill,
    /// Makes logits.
    Decode,
}

impl Kind {
    /// The program's step of this kind that has so many columns.
    fn step(self, program: &Program, columns: usize) -> &Step {
        match self {
            Kind::Prefill | Kind::LastPrefill => match &program.wide {
                Some(wide) if wide.step.columns == columns => &wide.step,
                _ => &program.prefill,
            },
            Kind::Decode => &program.decode,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Prefill => "prefill step",
            Kind::LastPrefill => "last prefill step",
            Kind::Decode => "decode step",
        }
    }

    pub(super) fn makes_logits(self) -> bool {
        match self {
            Kind::Prefill => false,
            Kind::LastPrefill | Kind::Decode => true,
        }
    }
}

/// The exchange of the linears that write the residual stream, and where a scattered stream is published last.
fn writer_of(step: &Step) -> Option<(Exchange, Option<usize>)> {
    step.layer.iter().rev().find_map(|phase| match phase {
        Phase::AddToStream { exchange, .. } => Some((*exchange, None)),
        Phase::GatherStream {
            exchange, words_at, ..
        } => Some((*exchange, Some(*words_at))),
        Phase::Linear(_)
        | Phase::Attention { .. }
        | Phase::CollectHeads { .. }
        | Phase::Collect { .. }
        | Phase::ReduceScatter { .. } => None,
    })
}

/// A part of a step that a CTA does in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// The tokens' embeddings.
    Embedding,
    /// Phase `index` of a layer.
    Phase { layer: usize, index: usize },
    /// Hands a replicated stream on to the CTAs without a part of the layers.
    HandOver,
    /// Logits.
    Head,
}

/// A step on its columns.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    shared: &'a Shared,
    pub(super) kind: Kind,
    pub(super) step: &'a Step,
    columns: &'a [Column],
    /// Layer `n` has the epoch `n + 1` after it.
    epoch: u32,
    /// The exchange of the linears that write the residual stream.
    pub(super) writer: Exchange,
    /// Where the stream lies that the CTAs without a part of the layers read.
    handed_over_at: usize,
}

impl<'a> Run<'a> {
    /// A step of a kind, on as many columns as the step has.
    pub(super) fn new(
        shared: &'a Shared,
        kind: Kind,
        columns: &'a [Column],
        epoch: u32,
    ) -> Result<Run<'a>, PhaseFault> {
        let step = kind.step(&shared.program, columns.len());
        let (writer, gathered) = writer_of(step).ok_or(PhaseFault::Form)?;
        Ok(Run {
            shared,
            kind,
            step,
            columns,
            epoch,
            writer,
            handed_over_at: gathered.unwrap_or(shared.program.exchange.stream_at),
        })
    }

    /// All pieces, in order.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + use<> {
        let phases = self.step.layer.len();
        let layers = (0..self.shared.program.layers)
            .flat_map(move |layer| (0..phases).map(move |index| Piece::Phase { layer, index }));
        let end = [Piece::HandOver, Piece::Head];
        let end = if self.kind.makes_logits() {
            &end[..]
        } else {
            &[]
        };
        [Piece::Embedding]
            .into_iter()
            .chain(layers)
            .chain(end.to_vec())
    }

    /// Whether a CTA has a part in a piece.
    pub(super) fn has_part(&self, cta: usize, piece: Piece) -> bool {
        let mesh = &self.shared.mesh;
        match piece {
            Piece::Embedding | Piece::Phase { .. } => cta < mesh.workers(),
            Piece::HandOver => {
                cta == 0 && mesh.ctas > mesh.workers() && self.step.stream == StreamForm::Replicated
            }
            Piece::Head => true,
        }
    }

    /// A piece in words.
    pub(super) fn describe(&self, piece: Piece) -> String {
        describe(&self.shared.program, self.kind, self.columns.len(), piece)
    }

    /// The layer of a piece; the number of layers for the head.
    pub(super) fn layer(&self, piece: Piece) -> usize {
        match piece {
            Piece::Embedding => 0,
            Piece::Phase { layer, .. } => layer,
            Piece::HandOver | Piece::Head => self.shared.program.layers,
        }
    }

    /// The epoch of a piece's words.
    pub(super) fn epoch_of(&self, piece: Piece) -> u32 {
        // Layers are few: there are as many epochs in 32 bits as a generation needs.
        self.epoch
            + match piece {
                Piece::Embedding => 0,
                Piece::Phase { layer, .. } => layer as u32 + 1,
                Piece::HandOver | Piece::Head => self.shared.program.layers as u32,
            }
    }

    /// Does a CTA's part of a piece.
    pub(super) async fn carry_out(
        &self,
        cta: &mut Cta,
        piece: Piece,
        memory: &dyn Memory,
    ) -> Result<(), PhaseFault> {
        let (shared, program) = (self.shared, &self.shared.program);
        let now = Now {
            shared,
            memory,
            columns: self.columns,
            alone: self.kind == Kind::Decode,
            kv_splits: self.step.kv_splits,
            replicate_below: self.step.replicate_below,
            layer: self.layer(piece),
            epoch: self.epoch_of(piece),
        };
        match piece {
            Piece::Embedding => {
                let first = &program.linears[0];
                let operand = Operand::new(shared, first, cta.slice(shared, first).1, 0);
                cta.embed(&now, self.step.stream, self.writer, &operand);
                Ok(())
            }
            Piece::Phase { index, .. } => run_phase(cta, &now, &self.step.layer[index]).await,
            Piece::HandOver => cta.publish_stream(&now, self.writer, self.handed_over_at),
            Piece::Head => {
                if !cta.worker {
                    let k = cta.head_slice(program).1;
                    let operand = Operand::new(shared, &program.head, k, 0);
                    cta.gather_stream(&now, self.writer, self.handed_over_at, &operand)
                        .await?;
                }
                cta.head(&now)
            }
        }
    }
}

/// A piece of a step of so many columns in words.
pub(super) fn describe(program: &Program, kind: Kind, columns: usize, piece: Piece) -> String {
    let what = match piece {
        Piece::Embedding => "embedding".to_owned(),
        Piece::Phase { index, .. } => program.describe(&kind.step(program, columns).layer[index]),
        Piece::HandOver => "hand-over of the stream".to_owned(),
        Piece::Head => "head".to_owned(),
    };
    format!("{}, {what}", kind.name())
}

async fn run_phase(cta: &mut Cta, now: &Now<'_>, phase: &Phase) -> Result<(), PhaseFault> {
    let program = &now.shared.program;
    match phase {
        Phase::Linear(index) => cta.linear(now, &program.linears[*index]),
        Phase::Attention { exchange, .. } => cta.attention(now, *exchange).await,
        Phase::CollectHeads { next, all_groups } => {
            cta.collect_heads(now, &program.linears[*next], *all_groups)
                .await
        }
        Phase::Collect { exchange, next } => {
            cta.collect(now, *exchange, &program.linears[*next]).await
        }
        Phase::AddToStream { exchange, next } => {
            let operand = operand(cta, now, next);
            cta.add_to_stream(now, *exchange, &operand).await
        }
        Phase::ReduceScatter {
            exchange,
            words_at,
            next,
        } => {
            let operand = operand(cta, now, next);
            cta.reduce_scatter(now, *exchange, *words_at, &operand)
                .await
        }
        Phase::GatherStream {
            exchange,
            words_at,
            next,
        } => {
            let operand = operand(cta, now, next);
            cta.gather_stream(now, *exchange, *words_at, &operand).await
        }
    }
}

/// The operand that a worker prepares: of the same layer's linear, the next layer's first, or the head.
fn operand<'a>(cta: &Cta, now: &Now<'a>, next: &Next) -> Operand<'a> {
    let program = &now.shared.program;
    let of_layer = |linear: &Linear, layer: usize| {
        let k = cta.slice(now.shared, linear).1;
        Operand::new(now.shared, linear, k, layer)
    };
    match next {
        Next::SameLayer(index) => of_layer(&program.linears[*index], now.layer),
        Next::NextLayer if now.layer + 1 < program.layers => {
            of_layer(&program.linears[0], now.layer + 1)
        }
        Next::NextLayer => {
            let k = cta.head_slice(program).1;
            Operand::new(now.shared, &program.head, k, 0)
        }
    }
}
