//! One step: all phases of all layers over all CTAs, and the head. The order is the one the emitter writes into
//! `kernel.cu`.

use mirage_compiler::plan::StreamForm;
use mirage_compiler::program::{Exchange, Linear, Next, Phase, Program, Step, TILE};
use rayon::prelude::*;

use super::area::PhaseFault;
use super::cta::{Column, Cta, Now, Operand};
use super::{CpuError, CpuModel};

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

    fn name(self) -> &'static str {
        match self {
            Kind::Prefill => "prefill step",
            Kind::LastPrefill => "last prefill step",
            Kind::Decode => "decode step",
        }
    }

    fn makes_logits(self) -> bool {
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

impl CpuModel {
    /// Runs a step on its columns, as many as the step has. After one that makes logits every CTA holds its own.
    pub(super) fn step(&mut self, kind: Kind, columns: &[Column]) -> Result<(), CpuError> {
        let epoch = self.next_step();
        let CpuModel {
            shared,
            cache,
            ctas,
            ..
        } = self;
        let shared = &*shared;
        let program = &shared.program;
        let step = kind.step(program, columns.len());
        let at = |layer: usize, epoch: u32| Now {
            shared,
            columns,
            kv_splits: step.kv_splits,
            replicate_below: step.replicate_below,
            layer,
            epoch,
        };
        let (writer, gathered) = writer_of(step).ok_or_else(|| CpuError::Phase {
            phase: format!("{}, all phases", kind.name()),
            layer: 0,
            cta: 0,
            fault: PhaseFault::Form,
        })?;
        let workers = shared.mesh.workers();
        let first = &program.linears[0];
        let start = at(0, epoch);
        all(&mut ctas[..], &start, kind, "embedding", |cta| {
            cta.read = 0;
            if cta.worker {
                let k = cta.slice(shared, first).1;
                let operand = Operand::new(shared, first, k, 0);
                cta.embed(&start, step.stream, writer, &operand);
            }
            Ok(())
        })?;
        let mut now = start;
        for layer in 0..program.layers {
            now = at(layer, now.epoch + 1);
            for phase in &step.layer {
                let described = || program.describe(phase);
                all_lazy(&mut ctas[..workers], &now, kind, &described, |cta| {
                    run_phase(cta, &now, phase, cache)
                })?;
                if matches!(phase, Phase::Attention { .. }) {
                    cache.append(ctas.iter_mut().flat_map(|cta| cta.appends.drain(..)));
                }
            }
        }
        if kind.makes_logits() {
            let now = Now {
                layer: program.layers,
                ..now
            };
            let words_at = gathered.unwrap_or(program.exchange.stream_at);
            if ctas.len() > workers && step.stream == StreamForm::Replicated {
                all(
                    &mut ctas[..1],
                    &now,
                    kind,
                    "hand-over of the stream",
                    |cta| cta.publish_stream(&now, writer, words_at),
                )?;
            }
            all(&mut ctas[..], &now, kind, "head", |cta| {
                if !cta.worker {
                    let k = cta.head_slice(program).1;
                    let operand = Operand::new(shared, &program.head, k, 0);
                    cta.gather_stream(&now, writer, words_at, &operand)?;
                }
                cta.head(&now)
            })?;
        }
        Ok(())
    }

    /// The logits that the last step that makes some made for a column.
    pub(super) fn logits(&self, column: usize) -> Vec<f32> {
        let mut logits = Vec::with_capacity(self.shared.program.head.rows());
        for cta in &self.ctas {
            let width = self.shared.program.head_rows(cta.index).count * TILE;
            logits.extend_from_slice(&cta.logits[column * width..][..width]);
        }
        // The last tile's padding.
        logits.truncate(self.shared.program.vocab);
        logits
    }
}

/// Does something in all CTAs, in parallel; the fault of the lowest CTA counts.
fn all_lazy(
    ctas: &mut [Cta],
    now: &Now<'_>,
    kind: Kind,
    phase: &(dyn Fn() -> String + Sync),
    run: impl Fn(&mut Cta) -> Result<(), PhaseFault> + Sync,
) -> Result<(), CpuError> {
    let faults: Vec<Option<CpuError>> = ctas
        .par_iter_mut()
        .map(|cta| {
            run(cta).err().map(|fault| CpuError::Phase {
                phase: format!("{}, {}", kind.name(), phase()),
                layer: now.layer,
                cta: cta.index,
                fault,
            })
        })
        .collect();
    faults.into_iter().flatten().next().map_or(Ok(()), Err)
}

fn all(
    ctas: &mut [Cta],
    now: &Now<'_>,
    kind: Kind,
    phase: &'static str,
    run: impl Fn(&mut Cta) -> Result<(), PhaseFault> + Sync,
) -> Result<(), CpuError> {
    all_lazy(ctas, now, kind, &|| phase.to_owned(), run)
}

fn run_phase(
    cta: &mut Cta,
    now: &Now<'_>,
    phase: &Phase,
    cache: &super::KvCache,
) -> Result<(), PhaseFault> {
    let program = &now.shared.program;
    match phase {
        Phase::Linear(index) => cta.linear(now, &program.linears[*index]),
        Phase::Attention { exchange, .. } => cta.attention(now, cache, *exchange),
        Phase::CollectHeads { next, all_groups } => {
            cta.collect_heads(now, &program.linears[*next], *all_groups)
        }
        Phase::Collect { exchange, next } => cta.collect(now, *exchange, &program.linears[*next]),
        Phase::AddToStream { exchange, next } => {
            let operand = operand(cta, now, next);
            cta.add_to_stream(now, *exchange, &operand)
        }
        Phase::ReduceScatter {
            exchange,
            words_at,
            next,
        } => {
            let operand = operand(cta, now, next);
            cta.reduce_scatter(now, *exchange, *words_at, &operand)
        }
        Phase::GatherStream {
            exchange,
            words_at,
            next,
        } => {
            let operand = operand(cta, now, next);
            cta.gather_stream(now, *exchange, *words_at, &operand)
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
