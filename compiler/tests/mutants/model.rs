//! Programs of another model: sound schedules that compute something else. A program says which tensor is streamed where,
//! but not that the gate's is the one that goes through the SiLU, so no rule of a program can find these.

use mirage_compiler::fuse::Epilogue;
use mirage_compiler::program::Program;
use mirage_testing::Random;

use crate::{Kind, Subject};

pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |name, make| Kind { name, make };
    vec![
        kind("gate and up in each other's place", gate_and_up),
        kind("k and v in each other's place", k_and_v),
        kind("another epsilon", epsilon),
        kind("another rotation", rotation),
        kind("another factor of the scores", scale),
    ]
}

fn gate_and_up(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let mut linears = mutant.linears.iter_mut();
    let linear = linears.find(|linear| linear.epilogue == Epilogue::SwiGlu)?;
    linear.parts.swap(0, 1);
    Some(mutant)
}

fn k_and_v(subject: &Subject, _: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    mutant.linears[mutant.attention.qkv].parts.swap(1, 2);
    Some(mutant)
}

fn epsilon(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    let index = random.below(mutant.linears.len());
    mutant.linears[index].norm.as_mut()?.eps *= 100.0;
    Some(mutant)
}

fn rotation(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    mutant.attention.rope.theta *= [0.5, 2.0][random.below(2)];
    Some(mutant)
}

fn scale(subject: &Subject, random: &mut Random) -> Option<Program> {
    let mut mutant = subject.program.clone();
    mutant.attention.scale *= [0.5, 2.0][random.below(2)];
    Some(mutant)
}
