//! Waits, publishes and exchanges: what the phases of a step do in which order, and whose values they read.

use mirage_compiler::mesh::{Mesh, Split};
use mirage_compiler::plan::{Plan, StepPlan, StreamForm, Transport};
use mirage_compiler::program::{Along, Exchange, Linear, Next, Phase, Program, Step};
use mirage_testing::Random;

use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("wait dropped", wait_dropped),
        kind("publish dropped", publish_dropped),
        kind("waited for before it is published", waits_too_early),
        kind("signal early, before its operands", signals_too_early),
        kind("step order swapped", phases_swapped),
        kind("published twice", published_twice),
        kind("added to the stream twice", added_twice),
        kind("exchange along the wrong axis", along_wrong),
        kind("exchange otherwise in one step", along_differs),
        kind("another linear's words read", source_wrong),
        kind("another linear's input prepared", next_wrong),
        kind("epoch off by a layer", layer_off_by_one),
        kind("heads of the own group only", heads_of_own_group),
        kind("gathered elsewhere than scattered", gathered_elsewhere),
        kind("stream in another form", form_wrong),
        kind("exchanged in another way", transport_wrong),
        kind("worker that nobody waits for", worker_without_rows),
    ]
}

/// All kinds of step.
pub(crate) fn steps(program: &mut Program) -> Vec<&mut Step> {
    let wide = program.wide.as_mut().map(|wide| &mut wide.step);
    [&mut program.prefill]
        .into_iter()
        .chain(wide)
        .chain([&mut program.decode])
        .collect()
}

/// The plan of each kind of step, in the order of [`steps`].
pub(crate) fn plans(plan: &mut Plan) -> Vec<&mut StepPlan> {
    [&mut plan.prefill]
        .into_iter()
        .chain(plan.wide.as_mut())
        .chain([&mut plan.decode])
        .collect()
}

pub(crate) fn exchange(phase: &mut Phase) -> Option<&mut Exchange> {
    match phase {
        Phase::Attention { exchange, .. }
        | Phase::Collect { exchange, .. }
        | Phase::AddToStream { exchange, .. }
        | Phase::ReduceScatter { exchange, .. }
        | Phase::GatherStream { exchange, .. } => Some(exchange),
        Phase::Linear(_) | Phase::CollectHeads { .. } => None,
    }
}

/// Changes a layer at one of the phases that fit.
fn at_phase(
    subject: &Subject,
    random: &mut Random,
    fits: impl Fn(usize, &Phase) -> bool,
    change: impl FnOnce(&mut Vec<Phase>, usize),
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mut steps = steps(&mut mutant);
    let step = random.below(steps.len());
    let layer = &mut steps[step].layer;
    let fitting: Vec<usize> = (0..layer.len())
        .filter(|&at| fits(at, &layer[at]))
        .collect();
    change(layer, *random.choose(&fitting)?);
    Some(mutant)
}

fn computes(phase: &Phase) -> bool {
    matches!(phase, Phase::Linear(_))
}

fn wait_dropped(subject: &Subject, random: &mut Random) -> Option<Program> {
    let waits = |_, phase: &Phase| !computes(phase);
    at_phase(subject, random, waits, |layer, at| {
        layer.remove(at);
    })
}

fn publish_dropped(subject: &Subject, random: &mut Random) -> Option<Program> {
    let publishes = |_, phase: &Phase| computes(phase);
    at_phase(subject, random, publishes, |layer, at| {
        layer.remove(at);
    })
}

fn waits_too_early(subject: &Subject, random: &mut Random) -> Option<Program> {
    let waits = |at, phase: &Phase| at > 0 && !computes(phase);
    at_phase(subject, random, waits, |layer, at| layer.swap(at - 1, at))
}

fn signals_too_early(subject: &Subject, random: &mut Random) -> Option<Program> {
    let publishes = |at, phase: &Phase| at > 0 && computes(phase);
    at_phase(subject, random, publishes, |layer, at| {
        layer.swap(at - 1, at)
    })
}

fn phases_swapped(subject: &Subject, random: &mut Random) -> Option<Program> {
    let far = 2 + random.below(4);
    let has_other = |at, _: &Phase| at >= far;
    at_phase(subject, random, has_other, |layer, at| {
        layer.swap(at - far, at)
    })
}

fn published_twice(subject: &Subject, random: &mut Random) -> Option<Program> {
    let publishes = |_, phase: &Phase| matches!(phase, Phase::Linear(_) | Phase::Attention { .. });
    at_phase(subject, random, publishes, twice)
}

fn added_twice(subject: &Subject, random: &mut Random) -> Option<Program> {
    let adds = |_, phase: &Phase| {
        matches!(
            phase,
            Phase::AddToStream { .. } | Phase::ReduceScatter { .. }
        )
    };
    at_phase(subject, random, adds, twice)
}

fn twice(layer: &mut Vec<Phase>, at: usize) {
    layer.insert(at, layer[at].clone());
}

/// Another way along an axis that has more than one coordinate. Whoever reads all side by side instead of its own has more
/// than it needs, which is not wrong.
fn other_along(random: &mut Random, mesh: &Mesh, exchange: &mut Exchange) -> bool {
    let (size, along) = match random.below(2) {
        0 => (mesh.groups, &mut exchange.groups),
        _ => (mesh.members, &mut exchange.members),
    };
    let others: Vec<Along> = [Along::Own, Along::Concat, Along::Sum]
        .into_iter()
        .filter(|other| other != along)
        .filter(|other| (*along, *other) != (Along::Own, Along::Concat))
        .collect();
    if let Some(other) = random.choose(&others).filter(|_| size > 1) {
        *along = *other;
        return true;
    }
    false
}

/// In all steps alike.
fn along_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mesh = mutant.mesh;
    let mut source = mutant.decode.layer.clone();
    let mut exchanges: Vec<&mut Exchange> = source.iter_mut().filter_map(exchange).collect();
    let at = random.below(exchanges.len());
    let wrong = &mut *exchanges[at];
    other_along(random, &mesh, wrong).then_some(())?;
    let wrong = *wrong;
    for step in steps(&mut mutant) {
        for exchange in step.layer.iter_mut().filter_map(exchange) {
            if exchange.source == wrong.source {
                *exchange = wrong;
            }
        }
    }
    Some(mutant)
}

fn along_differs(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mesh = mutant.mesh;
    let mut steps = steps(&mut mutant);
    let step = random.below(steps.len());
    let mut exchanges: Vec<&mut Exchange> =
        steps[step].layer.iter_mut().filter_map(exchange).collect();
    let at = random.below(exchanges.len());
    other_along(random, &mesh, exchanges[at]).then_some(mutant)
}

fn source_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let linears = subject.program.linears.len();
    let off = 1 + random.below(linears.max(2) - 1);
    let reads = |_, phase: &Phase| exchange(&mut phase.clone()).is_some();
    at_phase(subject, random, reads, |layer, at| {
        if let Some(exchange) = exchange(&mut layer[at]) {
            exchange.source = (exchange.source + off) % linears;
        }
    })
}

fn next_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let linears = subject.program.linears.len();
    let off = 1 + random.below(linears.max(2) - 1);
    let prepares = |_, phase: &Phase| !computes(phase);
    at_phase(subject, random, prepares, |layer, at| {
        match &mut layer[at] {
            Phase::Attention { next, .. }
            | Phase::CollectHeads { next, .. }
            | Phase::Collect { next, .. } => *next = (*next + off) % linears,
            Phase::AddToStream { next, .. }
            | Phase::ReduceScatter { next, .. }
            | Phase::GatherStream { next, .. } => {
                *next = match next {
                    Next::SameLayer(linear) => Next::SameLayer((*linear + off) % linears),
                    Next::NextLayer => Next::SameLayer(off),
                }
            }
            Phase::Linear(_) => {}
        }
    })
}

/// What is for the next layer is prepared with this one's norm and waited for in this one's epoch, or the reverse.
fn layer_off_by_one(subject: &Subject, random: &mut Random) -> Option<Program> {
    let prepares = |_, phase: &Phase| {
        matches!(
            phase,
            Phase::AddToStream { .. } | Phase::ReduceScatter { .. } | Phase::GatherStream { .. }
        )
    };
    at_phase(subject, random, prepares, |layer, at| {
        if let Phase::AddToStream { next, .. }
        | Phase::ReduceScatter { next, .. }
        | Phase::GatherStream { next, .. } = &mut layer[at]
        {
            *next = match next {
                Next::SameLayer(_) => Next::NextLayer,
                Next::NextLayer => Next::SameLayer(0),
            };
        }
    })
}

fn heads_of_own_group(subject: &Subject, random: &mut Random) -> Option<Program> {
    let several = subject.program.mesh.groups > 1;
    let all = |_, phase: &Phase| {
        several && matches!(phase, Phase::CollectHeads { all_groups, .. } if *all_groups)
    };
    at_phase(subject, random, all, |layer, at| {
        if let Phase::CollectHeads { all_groups, .. } = &mut layer[at] {
            *all_groups = false;
        }
    })
}

fn gathered_elsewhere(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let by = [-8, 8, 16][random.below(3)];
    let mut of_words: Vec<&mut Step> = steps(&mut mutant)
        .into_iter()
        .filter(|step| step.transport == Transport::Words)
        .collect();
    let at = random.below(of_words.len().max(1));
    let step = of_words.get_mut(at)?;
    let mut places: Vec<&mut usize> = step
        .layer
        .iter_mut()
        .filter_map(|phase| match phase {
            Phase::ReduceScatter { words_at, .. } | Phase::GatherStream { words_at, .. } => {
                Some(words_at)
            }
            _ => None,
        })
        .collect();
    let at = random.below(places.len().max(1));
    let place = places.get_mut(at)?;
    **place = place.checked_add_signed(by)?;
    Some(mutant)
}

/// The plan says so too.
fn form_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let step = random.below(steps(&mut mutant).len());
    let other = match steps(&mut mutant)[step].stream {
        StreamForm::Replicated => StreamForm::Scattered,
        StreamForm::Scattered => StreamForm::Replicated,
    };
    steps(&mut mutant)[step].stream = other;
    plans(&mut mutant.plan)[step].stream = other;
    Some(mutant)
}

/// Rows without buffers for them, or more columns in words than these are for.
fn transport_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let rows_exist = steps(&mut mutant)
        .iter()
        .any(|step| step.transport == Transport::Rows);
    let step = random.below(steps(&mut mutant).len());
    let columns = steps(&mut mutant)[step].columns;
    let other = match steps(&mut mutant)[step].transport {
        Transport::Words if !rows_exist => Transport::Rows,
        Transport::Rows if columns > 16 => Transport::Words,
        Transport::Words | Transport::Rows => return None,
    };
    steps(&mut mutant)[step].transport = other;
    plans(&mut mutant.plan)[step].transport = other;
    Some(mutant)
}

/// Lowered from a plan with more members than a group has rows of anything, and tasks of attention: nobody ever waits for
/// the last one, so nothing keeps it from lagging a layer behind and finding words overwritten.
fn worker_without_rows(subject: &Subject, random: &mut Random) -> Option<Program> {
    let program = &subject.program;
    let mut plan = program.plan.clone();
    plan.wide = None;
    let shares = |linear: &Linear| match linear.placement.members {
        Split::Rows => Some(linear.row_units * linear.unit_tiles),
        Split::Columns => None,
    };
    let shares: Option<Vec<usize>> = program.linears.iter().map(shares).collect();
    let tasks = [&program.prefill, &program.decode].map(|step| program.attention.tasks(step));
    let most = shares?.into_iter().chain(tasks).max()?;
    plan.mesh.members = most + 1 + random.below(3);
    plan.mesh.ctas = plan.mesh.workers();
    if [&plan.prefill, &plan.decode]
        .iter()
        .any(|step| step.stream == StreamForm::Scattered)
        || plan.mesh.ctas > 150
    {
        return None;
    }
    Program::new(&subject.graph, &plan, &subject.target).ok()
}
