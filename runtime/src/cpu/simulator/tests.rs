//! Interleavings of small programs of many plans, and wrong programs, which must be found out.

use std::collections::BTreeSet;

use mirage_testing::{Choice, Model, SIZES, planned, prompts, qwen3, target};
use rayon::prelude::*;

use super::*;
use crate::sampler::SamplingParams;

/// The seed to replay, if one is asked for.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("MIRAGE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MIRAGE_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}

fn simulator(model: &Model, program: &Program) -> Simulator {
    Simulator::load(program.clone(), &Checkpoint::open(model).unwrap()).unwrap()
}

/// Requests that differ in everything, in a context of 72.
fn batch(count: usize, drawn: bool) -> Vec<GenerateRequest> {
    let lengths = [3, 66, 9, 1, 17, 5, 2, 30];
    let sampling = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 10, 0.9), (2.0, 0, 0.9)];
    let prompts = prompts(&lengths[..count], SIZES.vocab).into_iter();
    (0u32..)
        .zip(prompts.zip(sampling.into_iter().cycle()))
        .map(|(stream, (prompt, (temperature, top_k, top_p)))| GenerateRequest {
            prompt,
            max_new_tokens: 2 + stream as usize % 3,
            sampling: SamplingParams {
                temperature: if drawn { temperature } else { 0.0 },
                top_k,
                top_p,
                seed: 5,
            },
            stream,
            stop_tokens: BTreeSet::from([3]),
        })
        .collect()
}

/// Every seed must make what the executor makes in lockstep.
fn check(model: &Model, program: &Program, batch: &[GenerateRequest], count: u64) {
    let mut simulator = simulator(model, program);
    let want = simulator.lockstep(batch).unwrap();
    seeds(count).into_par_iter().for_each(|seed| {
        let got = simulator.check(batch, Schedule::of(seed), &want);
        if let Err(failure) = got {
            panic!("{failure}\nMIRAGE_SEED={seed} replays it\n{program}");
        }
    });
}

#[test]
fn every_placement_in_many_interleavings() {
    let model = qwen3(SIZES);
    for (index, choice) in Choice::all().into_iter().enumerate() {
        let started = std::time::Instant::now();
        let program = choice.program(&model, 3, 72);
        check(&model, &program, &batch(3, index % 2 == 1), 36);
        eprintln!("{choice:?} {:?}", started.elapsed());
    }
}

#[test]
fn planned_programs_in_many_interleavings() {
    let model = qwen3(SIZES);
    for (sms, count) in [(5, 3), (8, 8), (132, 3)] {
        let started = std::time::Instant::now();
        let program = planned(&model, &target(sms, count, 72));
        check(&model, &program, &batch(count, true), 18);
        eprintln!("{sms} {count} {:?}", started.elapsed());
    }
}
