//! Buffers of the exchange area, regions of shared memory, places of the gammas.

use mirage_compiler::plan::{StreamForm, Transport};
use mirage_compiler::program::{Norm, Phase, Program, SharedLayout};
use mirage_testing::Random;

use crate::phases::steps;
use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("buffer shared by two", buffer_shared),
        kind("buffer overlapping the next", buffer_overlapping),
        kind("parity of candidates lost", parity_lost),
        kind("exchange area short by a word", area_short),
        kind("region on top of another", regions_overlapping),
        kind("region too small", region_short),
        kind("region short by its last line", region_short_by_a_line),
        kind("region missing", region_missing),
        kind("region misaligned", region_misaligned),
        kind("region elsewhere in wide steps", region_elsewhere),
        kind("gamma of another", gamma_elsewhere),
        kind("gamma of another layer", gamma_stride_off),
        kind("gammas on top of each other", gammas_overlapping),
        kind("gammas short by one", gammas_short),
        kind("norm dropped", norm_dropped),
    ]
}

/// A buffer of the exchange area that some step uses.
#[derive(Clone, Copy, PartialEq)]
enum Buffer {
    Linear(usize),
    Heads,
    /// The scattered stream after a linear.
    Gathered(usize),
    Rows(usize),
    Flags(usize),
    StreamRows(usize),
    HeadRows,
    /// The stream for CTAs without a part of the layers.
    Stream,
    Candidates,
    Sums,
    Samples,
    Barrier,
    Histograms,
}

impl Buffer {
    fn all(program: &Program) -> Vec<Buffer> {
        let with = |transport| {
            let mut steps = program.steps();
            steps.any(|(_, step)| step.transport == transport)
        };
        let mut all = vec![
            Buffer::Candidates,
            Buffer::Sums,
            Buffer::Samples,
            Buffer::Barrier,
            Buffer::Histograms,
        ];
        let linears = 0..program.linears.len();
        if with(Transport::Words) {
            all.push(Buffer::Heads);
            all.extend(linears.clone().map(Buffer::Linear));
        }
        if with(Transport::Rows) {
            all.push(Buffer::HeadRows);
            all.extend(linears.clone().map(Buffer::Rows));
            all.extend(linears.map(Buffer::Flags));
        }
        for (_, step) in program.steps() {
            let gathers = step.layer.iter().filter_map(|phase| match phase {
                Phase::GatherStream { exchange, .. } => Some(exchange.source),
                _ => None,
            });
            let buffers: Vec<Buffer> = match step.transport {
                Transport::Words => gathers.map(Buffer::Gathered).collect(),
                Transport::Rows => gathers.map(Buffer::StreamRows).collect(),
            };
            all.extend(buffers);
            let helpers = program.mesh.ctas > program.mesh.workers();
            if helpers && step.stream == StreamForm::Replicated {
                all.push(Buffer::Stream);
            }
        }
        all
    }

    /// Where it is said to be: the same number everywhere.
    fn places(self, program: &mut Program) -> Vec<&mut usize> {
        let one = match self {
            Buffer::Linear(index) => &mut program.linears[index].words_at,
            Buffer::Rows(index) => &mut program.linears[index].rows.at,
            Buffer::Flags(index) => &mut program.linears[index].rows.flags_at,
            Buffer::StreamRows(index) => &mut program.linears[index].stream_rows.at,
            Buffer::Heads => &mut program.attention.words_at,
            Buffer::HeadRows => &mut program.attention.rows.at,
            Buffer::Stream => &mut program.exchange.stream_at,
            Buffer::Candidates => &mut program.exchange.candidates_at,
            Buffer::Sums => &mut program.exchange.sums_at,
            Buffer::Samples => &mut program.exchange.samples_at,
            Buffer::Barrier => &mut program.exchange.barrier_at,
            Buffer::Histograms => &mut program.exchange.histograms_at,
            Buffer::Gathered(index) => {
                let phases = steps(program).into_iter().flat_map(|step| &mut step.layer);
                return phases
                    .filter_map(|phase| match phase {
                        Phase::ReduceScatter {
                            exchange, words_at, ..
                        }
                        | Phase::GatherStream {
                            exchange, words_at, ..
                        } if exchange.source == index => Some(words_at),
                        _ => None,
                    })
                    .collect();
            }
        };
        vec![one]
    }
}

/// Two different buffers, of which the second is moved to where `to` says from the place of the first.
fn moved(
    subject: &Subject,
    random: &mut Random,
    movable: impl Fn(Buffer) -> bool,
    to: impl Fn(usize) -> Option<usize>,
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let all = Buffer::all(&mutant);
    let (first, second) = (*random.choose(&all)?, *random.choose(&all)?);
    if first == second || !movable(second) {
        return None;
    }
    let to = to(**first.places(&mut mutant).first()?)?;
    for place in second.places(&mut mutant) {
        *place = to;
    }
    (mutant != subject.program).then_some(mutant)
}

fn buffer_shared(subject: &Subject, random: &mut Random) -> Option<Program> {
    moved(subject, random, |_| true, Some)
}

/// A buffer's second word is another's first. Barrier and flags may have no second.
fn buffer_overlapping(subject: &Subject, random: &mut Random) -> Option<Program> {
    let longer = |buffer| !matches!(buffer, Buffer::Barrier | Buffer::Flags(_));
    moved(subject, random, longer, |at| at.checked_sub(1))
}

/// What the CTAs publish in odd steps lies where the sampler's sums are.
fn parity_lost(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let of_a_step = 2 * mutant.decode.columns * mutant.mesh.ctas;
    mutant.exchange.sums_at = mutant.exchange.candidates_at + of_a_step;
    Some(mutant)
}

fn area_short(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    mutant.exchange.words -= 1 + random.below(8);
    Some(mutant)
}

/// The layout of wide steps, where there are some, or of all others.
fn layout<'a>(program: &'a mut Program, random: &mut Random) -> &'a mut SharedLayout {
    let wide = random.in_hundred(50);
    match &mut program.wide {
        Some(of_wide) if wide => &mut of_wide.shared,
        _ => &mut program.shared,
    }
}

fn regions_overlapping(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let regions = &mut layout(&mut mutant, random).regions;
    let (first, second) = (random.below(regions.len()), random.below(regions.len()));
    if first == second || regions[first].bytes == 0 || regions[second].bytes == 0 {
        return None;
    }
    regions[second].at = regions[first].at;
    (mutant != subject.program).then_some(mutant)
}

/// Makes a region smaller; those behind it move up.
fn shrink(layout: &mut SharedLayout, name: &str, bytes: impl FnOnce(usize) -> usize) -> bool {
    let Some(at) = layout.regions.iter().position(|region| region.name == name) else {
        return false;
    };
    let before = layout.regions[at].bytes;
    let after = bytes(before).min(before);
    layout.regions[at].bytes = after;
    let lost = before.next_multiple_of(128) - after.next_multiple_of(128);
    for region in &mut layout.regions[at + 1..] {
        region.at -= lost;
    }
    layout.bytes -= lost;
    before != after
}

fn region_name(layout: &SharedLayout, random: &mut Random) -> String {
    layout.regions[random.below(layout.regions.len())]
        .name
        .clone()
}

/// An eighth in both layouts, since most regions are as large as the larger of them asks for.
fn region_short(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let name = region_name(&mutant.shared, random);
    if name.ends_with("Storage") {
        // Two barriers of eight bytes a page, and more.
        let pages = mutant.ring.pages;
        shrink(&mut mutant.shared, &name, |_| pages * 16);
    } else {
        shrink(&mut mutant.shared, &name, |bytes| bytes / 8);
        if let Some(wide) = &mut mutant.wide {
            shrink(&mut wide.shared, &name, |bytes| bytes / 8);
        }
    }
    (mutant != subject.program).then_some(mutant)
}

/// Of the regions that are no larger than they must be.
fn region_short_by_a_line(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let name = *random.choose(&["Activation", "Stream", "Pages", "Rope"])?;
    shrink(layout(&mut mutant, random), name, |bytes| {
        bytes.saturating_sub(128)
    })
    .then_some(mutant)
}

fn region_missing(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let layout = layout(&mut mutant, random);
    let at = random.below(layout.regions.len());
    layout.regions.remove(at);
    Some(mutant)
}

/// It and all behind it, the pages among them, whose copies ask for 16 bytes.
fn region_misaligned(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let layout = layout(&mut mutant, random);
    let from = random.below(layout.regions.len());
    for region in &mut layout.regions[from..] {
        region.at += 8;
    }
    layout.bytes += 128;
    Some(mutant)
}

/// Where the steps that follow do not look.
fn region_elsewhere(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let layout = &mut mutant.wide.as_mut()?.shared;
    // All but the pages, which each layout has of its own.
    let from = random.below(layout.regions.len() - 1);
    for region in &mut layout.regions[from..] {
        region.at += 128;
    }
    layout.bytes += 128;
    let bytes = layout.bytes;
    mutant.shared.bytes = mutant.shared.bytes.max(bytes);
    Some(mutant)
}

/// All norms but the head's.
fn norms(program: &mut Program) -> Vec<&mut Norm> {
    let a = &mut program.attention;
    let of_linears = program.linears.iter_mut().filter_map(|l| l.norm.as_mut());
    of_linears
        .chain(a.q_norm.as_mut())
        .chain(a.k_norm.as_mut())
        .collect()
}

fn with_norm(
    subject: &Subject,
    random: &mut Random,
    change: impl FnOnce(&mut Norm),
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mut norms = norms(&mut mutant);
    let at = random.below(norms.len().max(1));
    change(norms.get_mut(at)?);
    Some(mutant)
}

fn gamma_elsewhere(subject: &Subject, random: &mut Random) -> Option<Program> {
    let by = 1 + random.below(24);
    with_norm(subject, random, |norm| norm.gamma_at += by)
}

fn gamma_stride_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let by = 8 * (1 + random.below(4));
    with_norm(subject, random, |norm| norm.gamma_stride += by)
}

fn gammas_overlapping(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let layer = &mut mutant.norms.layer;
    let (first, second) = (random.below(layer.len()), random.below(layer.len()));
    let (from, to) = (layer[second].1, layer[first].1);
    layer[second].1 = to;
    for norm in norms(&mut mutant) {
        if norm.gamma_at == from {
            norm.gamma_at = to;
        }
    }
    (from != to).then_some(mutant)
}

fn gammas_short(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    mutant.norms.len -= 1;
    Some(mutant)
}

fn norm_dropped(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let a = &mut mutant.attention;
    let of_linears = mutant.linears.iter_mut().map(|linear| &mut linear.norm);
    let all = of_linears.chain([&mut a.q_norm, &mut a.k_norm, &mut mutant.head.norm]);
    let mut there: Vec<_> = all.filter(|norm| norm.is_some()).collect();
    let at = random.below(there.len().max(1));
    **there.get_mut(at)? = None;
    Some(mutant)
}
