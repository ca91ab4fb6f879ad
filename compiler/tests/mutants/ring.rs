//! The ring of weight pages, and how passes and pages divide a slice.

use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Linear, Program, Ring};
use mirage_testing::Random;

use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("ring shallower than in flight", ring_shallow),
        kind("nothing in flight", nothing_in_flight),
        kind("ring deeper than its memory", ring_deep),
        kind("page smaller than a linear's", page_small),
        kind("page of no whole tiles", page_uneven),
        kind("page order swapped", page_order_swapped),
        kind("passes off by one", passes_off),
        kind("row tiles off by one", rows_off),
        kind("column tiles off by one", columns_off),
        kind("tiles of a pass off by one", pass_off),
        kind("warps that share rows off", warps_off),
        kind("page wider than the ring's", page_wide),
        kind("exact where something is left over", falsely_exact),
        kind("head's rows shared by warps", head_shared),
    ]
}

fn with_ring(
    subject: &Subject,
    random: &mut Random,
    change: impl FnOnce(&mut Ring),
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let of_wide = random.in_hundred(50);
    match &mut mutant.wide {
        Some(wide) if of_wide => change(&mut wide.ring),
        _ => change(&mut mutant.ring),
    }
    (mutant != subject.program).then_some(mutant)
}

fn ring_shallow(subject: &Subject, random: &mut Random) -> Option<Program> {
    let (more, in_head) = (1 + random.below(4), random.in_hundred(50));
    with_ring(subject, random, |ring| {
        let in_flight = match in_head {
            true => &mut ring.head_in_flight,
            false => &mut ring.in_flight,
        };
        *in_flight = ring.pages + more;
    })
}

fn nothing_in_flight(subject: &Subject, random: &mut Random) -> Option<Program> {
    let in_head = random.in_hundred(50);
    with_ring(subject, random, |ring| match in_head {
        true => ring.head_in_flight = 0,
        false => ring.in_flight = 0,
    })
}

fn ring_deep(subject: &Subject, random: &mut Random) -> Option<Program> {
    let more = 1 + random.below(4);
    with_ring(subject, random, |ring| ring.pages += more)
}

/// The ring's pages are as large as the largest of a linear, so any less is too small.
fn page_small(subject: &Subject, random: &mut Random) -> Option<Program> {
    let less = 512 * (1 + random.below(2));
    with_ring(subject, random, |ring| {
        ring.page_bytes = ring.page_bytes.saturating_sub(less);
    })
}

fn page_uneven(subject: &Subject, random: &mut Random) -> Option<Program> {
    let less = 16 * (1 + random.below(31));
    with_ring(subject, random, |ring| ring.page_bytes -= less)
}

/// Two linears in each other's place in the stream, while the phases stay. If they are alike they are another model's.
fn page_order_swapped(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let linears = mutant.linears.len();
    let (first, second) = (random.below(linears), random.below(linears));
    let kind_of = |linear: &Linear| {
        (
            linear.columns,
            linear.rows(),
            linear.epilogue,
            linear.norm.is_some(),
            linear.placement,
        )
    };
    if kind_of(&mutant.linears[first]) == kind_of(&mutant.linears[second]) {
        return None;
    }
    mutant.linears.swap(first, second);
    let nodes: Vec<usize> = (0..mutant.plan.placements.len())
        .filter(|&node| mutant.plan.placements[node].is_some())
        .collect();
    mutant.plan.placements.swap(nodes[first], nodes[second]);
    Some(mutant)
}

fn with_linear(
    subject: &Subject,
    random: &mut Random,
    change: impl FnOnce(&mut Linear, &mut Random),
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let linear = match random.below(mutant.linears.len() + 1) {
        0 => &mut mutant.head,
        index => &mut mutant.linears[index - 1],
    };
    change(linear, random);
    (mutant != subject.program).then_some(mutant)
}

fn off_by_one(number: &mut usize, random: &mut Random) {
    match random.below(2) {
        0 => *number += 1,
        _ => *number = number.saturating_sub(1),
    }
}

fn passes_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        off_by_one(&mut linear.tiling.passes, random)
    })
}

fn rows_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        off_by_one(&mut linear.tiling.rows, random)
    })
}

fn columns_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        off_by_one(&mut linear.tiling.k, random)
    })
}

fn pass_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        let of = random.below(2);
        let tiling = &mut linear.tiling;
        let number = [&mut tiling.pass_tiles, &mut tiling.tiles_per_warp];
        off_by_one(number.into_iter().nth(of).unwrap(), random);
    })
}

fn warps_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        linear.tiling.warp_rows = [0, 3, 5, 16][random.below(4)];
    })
}

fn page_wide(subject: &Subject, random: &mut Random) -> Option<Program> {
    let page_bytes = subject.program.ring.page_bytes;
    with_linear(subject, random, |linear, _| {
        while linear.tiling.page_bytes() <= page_bytes {
            linear.tiling.page_k += linear.tiling.warp_k();
        }
    })
}

fn falsely_exact(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mesh = mutant.mesh;
    let index = random.below(mutant.linears.len());
    let linear = &mut mutant.linears[index];
    let slices: Vec<(Share, Share)> = (0..mesh.workers())
        .map(|cta| mesh.coordinates(cta))
        .map(|(group, member)| linear.slice(&mesh, group, member))
        .collect();
    let tiling = &mut linear.tiling;
    let filled = (tiling.passes * tiling.pass_tiles, tiling.page_k);
    if slices.iter().any(|(rows, _)| rows.count != filled.0) {
        tiling.rows_exact = true;
    } else if slices.iter().any(|(_, k)| k.count % filled.1 != 0) {
        tiling.k_exact = true;
    }
    (mutant != subject.program).then_some(mutant)
}

fn head_shared(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let tiling = &mut mutant.head.tiling;
    tiling.warp_rows /= 2;
    tiling.tiles_per_warp *= 2;
    tiling.page_k = tiling.page_k.next_multiple_of(2);
    Some(mutant)
}
