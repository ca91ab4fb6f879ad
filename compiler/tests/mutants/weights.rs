//! Weights: which tensors are packed, in which order, split how over the mesh.

use mirage_compiler::fuse::{Epilogue, WeightId};
use mirage_compiler::mesh::{Placement, Split};
use mirage_compiler::program::{Linear, Program, RowOrder};
use mirage_testing::Random;

use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("tiles missing", tiles_missing),
        kind("tiles beyond the matrix", tiles_beyond),
        kind("columns off by a tile", columns_off),
        kind("rows of a tensor off by a tile", part_off),
        kind("a token too many or too few", vocab_off),
        kind("tensor of another shape", weight_wrong),
        kind("tensor that is not there", weight_missing),
        kind("tile counted twice", weight_twice),
        kind(
            "tensor of one layer in all, or the reverse",
            weight_of_one_layer,
        ),
        kind("embedding of another shape", embedding_wrong),
        kind("rows by another number of groups", groups_off),
        kind("rows in another order", order_wrong),
        kind("shard along the wrong axis", placement_wrong),
        kind("another epilogue", epilogue_wrong),
    ]
}

fn linear<'a>(program: &'a mut Program, random: &mut Random) -> &'a mut Linear {
    match random.below(program.linears.len() + 1) {
        0 => &mut program.head,
        index => &mut program.linears[index - 1],
    }
}

fn with_linear(
    subject: &Subject,
    random: &mut Random,
    change: impl FnOnce(&mut Linear, &mut Random) -> Option<()>,
) -> Option<Program> {
    let mut mutant = subject.program.clone();
    change(linear(&mut mutant, random), random)?;
    Some(mutant)
}

fn tiles_missing(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, _| {
        linear.row_units -= 1;
        Some(())
    })
}

fn tiles_beyond(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        let of = random.below(2);
        let number = [&mut linear.row_units, &mut linear.unit_tiles];
        *number.into_iter().nth(of)? += 1;
        Some(())
    })
}

/// With or without the tiles, it is not what the tensors have.
fn columns_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    with_linear(subject, random, |linear, random| {
        linear.k_tiles += 1;
        if random.in_hundred(50) {
            linear.columns += 16;
        }
        Some(())
    })
}

/// Tensor and tiles agree, but the checkpoint has other rows.
fn part_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let index = random.below(mutant.linears.len());
    let linear = &mut mutant.linears[index];
    let more = match linear.order {
        RowOrder::Stacked => 16,
        RowOrder::ByGroup { groups } => 16 * groups,
        RowOrder::Interleaved => 16,
    };
    match linear.order {
        RowOrder::Stacked => linear.parts[0].1 += more,
        RowOrder::ByGroup { .. } => {
            let part = random.below(linear.parts.len());
            linear.parts[part].1 += more;
        }
        RowOrder::Interleaved => linear.parts.iter_mut().for_each(|part| part.1 += more),
    }
    match linear.order {
        RowOrder::Stacked | RowOrder::Interleaved => linear.row_units += 1,
        RowOrder::ByGroup { .. } => linear.unit_tiles += 1,
    }
    Some(mutant)
}

/// Where the tiles' padding hides it.
fn vocab_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let vocab = match random.below(2) {
        0 => mutant.vocab + 1,
        _ => mutant.vocab - 1,
    };
    mutant.vocab = vocab;
    mutant.head.parts[0].1 = vocab;
    (mutant.head.rows() == vocab.next_multiple_of(16)).then_some(mutant)
}

fn weight_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let weights = subject.program.weights.clone();
    with_linear(subject, random, |linear, random| {
        let part = random.below(linear.parts.len());
        let part = &mut linear.parts[part].0;
        let shape = &weights[part.0 as usize].shape;
        let others: Vec<usize> = (0..weights.len())
            .filter(|&other| weights[other].shape != *shape)
            .collect();
        *part = WeightId(*random.choose(&others)? as u32);
        Some(())
    })
}

fn weight_missing(subject: &Subject, random: &mut Random) -> Option<Program> {
    let weights = subject.program.weights.len();
    with_linear(subject, random, |linear, random| {
        let part = random.below(linear.parts.len());
        linear.parts[part].0 = WeightId((weights + random.below(3)) as u32);
        Some(())
    })
}

/// A tensor in the place of another of its shape, which is then nowhere.
fn weight_twice(subject: &Subject, random: &mut Random) -> Option<Program> {
    let weights = subject.program.weights.clone();
    let streamed: Vec<WeightId> = (subject.program.linears.iter())
        .flat_map(|linear| linear.parts.iter().map(|part| part.0))
        .collect();
    let mut mutant = subject.program.clone();
    let index = random.below(mutant.linears.len());
    let linear = &mut mutant.linears[index];
    let part = random.below(linear.parts.len());
    let part = &mut linear.parts[part].0;
    let alike: Vec<WeightId> = streamed
        .into_iter()
        .filter(|other| other != part)
        .filter(|other| weights[other.0 as usize].shape == weights[part.0 as usize].shape)
        .collect();
    *part = *random.choose(&alike)?;
    Some(mutant)
}

fn weight_of_one_layer(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let at = random.below(mutant.weights.len());
    let name = &mut mutant.weights[at].name;
    *name = match name.contains("{layer}") {
        true => name.replace("{layer}", "0"),
        false => format!("{name}.{{layer}}"),
    };
    Some(mutant)
}

fn embedding_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let shape = [mutant.vocab, mutant.hidden];
    let others: Vec<usize> = (0..mutant.weights.len())
        .filter(|&other| mutant.weights[other].shape != shape)
        .collect();
    mutant.embedding = WeightId(*random.choose(&others)? as u32);
    Some(mutant)
}

fn groups_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let index = mutant.attention.qkv;
    match &mut mutant.linears[index].order {
        RowOrder::ByGroup { groups } => *groups += 1 + random.below(2),
        RowOrder::Stacked | RowOrder::Interleaved => return None,
    }
    Some(mutant)
}

fn order_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let groups = subject.program.mesh.groups;
    with_linear(subject, random, |linear, random| {
        let others: Vec<RowOrder> = match linear.order {
            // With one group it is the same.
            RowOrder::Stacked => vec![RowOrder::Interleaved],
            RowOrder::ByGroup { .. } if groups == 1 => vec![RowOrder::Interleaved],
            RowOrder::ByGroup { .. } => vec![RowOrder::Stacked, RowOrder::Interleaved],
            RowOrder::Interleaved => vec![RowOrder::Stacked, RowOrder::ByGroup { groups }],
        };
        linear.order = random.choose(&others)?.clone();
        Some(())
    })
}

/// The plan says so too.
fn placement_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mesh = mutant.mesh;
    let index = random.below(mutant.linears.len());
    let placement = &mut mutant.linears[index].placement;
    let other = |split: &mut Split| {
        *split = match split {
            Split::Rows => Split::Columns,
            Split::Columns => Split::Rows,
        }
    };
    let Placement { groups, members } = placement;
    match random.below(2) {
        0 if mesh.groups > 1 => other(groups),
        1 if mesh.members > 1 => other(members),
        _ => return None,
    }
    let placement = *placement;
    let mut planned = mutant.plan.placements.iter_mut().flatten();
    *planned.nth(index)? = placement;
    Some(mutant)
}

fn epilogue_wrong(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let index = random.below(mutant.linears.len());
    let epilogue = &mut mutant.linears[index].epilogue;
    let all = [Epilogue::Store, Epilogue::SwiGlu, Epilogue::AddResidual];
    *epilogue = *random.choose(&all)?;
    (mutant != subject.program).then_some(mutant)
}
