//! Counts: columns, sequences, heads, layers, CTAs.

use mirage_compiler::mesh::Mesh;
use mirage_compiler::plan::{StreamForm, Transport};
use mirage_compiler::program::Program;
use mirage_testing::Random;

use crate::phases::{plans, steps};
use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("more sequences than columns", sequences_beyond),
        kind("columns short by one", columns_short),
        kind("more columns than decode has room for", columns_beyond),
        kind("more splits than heads have room for", splits_beyond),
        kind("attention replicated where none asks", replicated),
        kind("task of heads that share nothing", task_off),
        kind("query heads off", heads_off),
        kind("KV heads off", kv_heads_off),
        kind("head dimension off", head_dim_off),
        kind("q, k and v of another linear", qkv_off),
        kind("stream's width off", hidden_off),
        kind("layers off by one", layers_off),
        kind("fewer CTAs than workers", ctas_short),
        kind("groups and members exchanged", mesh_transposed),
    ]
}

fn with(subject: &Subject, change: impl FnOnce(&mut Program)) -> Option<Program> {
    let mut mutant = subject.program.clone();
    change(&mut mutant);
    Some(mutant)
}

fn sequences_beyond(subject: &Subject, random: &mut Random) -> Option<Program> {
    let more = 1 + random.below(3);
    with(subject, |mutant| {
        mutant.slots = mutant.decode.columns + more
    })
}

/// The plan says so too. From four on, a column less is no power of two.
fn columns_short(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let step = random.below(steps(&mut mutant).len());
    let columns = steps(&mut mutant)[step].columns - 1;
    if columns < 3 {
        return None;
    }
    steps(&mut mutant)[step].columns = columns;
    plans(&mut mutant.plan)[step].columns = columns;
    Some(mutant)
}

fn columns_beyond(subject: &Subject, _: &mut Random) -> Option<Program> {
    with(subject, |mutant| {
        mutant.decode.columns *= 2;
        mutant.plan.decode.columns *= 2;
    })
}

/// In all steps, the plan included. Behind the heads lies what a scattered stream gathers: nothing is there to be
/// overwritten where none is scattered.
fn splits_beyond(subject: &Subject, random: &mut Random) -> Option<Program> {
    let times = 2 + random.below(3);
    let mut steps_of = subject.program.steps();
    if !steps_of.any(|(_, step)| step.stream == StreamForm::Scattered) {
        return None;
    }
    with(subject, |mutant| {
        for step in steps(mutant) {
            step.kv_splits *= times;
        }
        for step in plans(&mut mutant.plan) {
            step.kv_splits *= times;
        }
    })
}

/// Only decode steps whose heads stay in their group can do that.
fn replicated(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let positions = 1 + random.below(64);
    if mutant.prefill.transport == Transport::Rows && random.in_hundred(50) {
        mutant.decode.replicate_below = 0;
    }
    mutant.prefill.replicate_below = positions;
    mutant.plan.prefill.replicate_below = positions;
    mutant.plan.decode.replicate_below = mutant.decode.replicate_below;
    Some(mutant)
}

fn task_off(subject: &Subject, _: &mut Random) -> Option<Program> {
    with(subject, |mutant| {
        let shared = mutant.attention.heads / mutant.attention.kv_heads;
        mutant.attention.heads_per_task = shared + 1;
        mutant.plan.heads_per_task = shared + 1;
    })
}

fn heads_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let more = 1 + random.below(4);
    with(subject, |mutant| mutant.attention.heads += more)
}

fn kv_heads_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let times = 2 + random.below(2);
    with(subject, |mutant| mutant.attention.kv_heads *= times)
}

fn head_dim_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let others = [32, 96, 128, 256];
    let other = others[random.below(others.len())];
    with(subject, |mutant| mutant.attention.head_dim = other)
}

fn qkv_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let more = 1 + random.below(subject.program.linears.len() + 1);
    with(subject, |mutant| mutant.attention.qkv += more)
}

fn hidden_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let by = [1, 8, 16][random.below(3)];
    with(subject, |mutant| mutant.hidden -= by)
}

fn layers_off(subject: &Subject, random: &mut Random) -> Option<Program> {
    let more = random.in_hundred(50);
    with(subject, |mutant| match more {
        true => mutant.layers += 1,
        false => mutant.layers -= 1,
    })
}

fn ctas_short(subject: &Subject, random: &mut Random) -> Option<Program> {
    let less = 1 + random.below(2);
    with(subject, |mutant| {
        mutant.mesh.ctas = mutant.mesh.workers().saturating_sub(less);
        mutant.plan.mesh = mutant.mesh;
    })
}

fn mesh_transposed(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let Mesh {
        groups, members, ..
    } = mutant.mesh;
    mutant.mesh.groups = members;
    mutant.mesh.members = groups;
    mutant.plan.mesh = mutant.mesh;
    (groups != members).then_some(mutant)
}
