//! Interleavings of small programs of many plans, and wrong programs, which must be found out.

use std::collections::BTreeSet;

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::mesh::{Placement, Split};
use mirage_compiler::plan::StreamForm;
use mirage_compiler::program::Rule;
use mirage_testing::{Choice, Model, SIZES, Sizes, planned, prompts, qwen3, target};
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
    let lengths: Vec<usize> = lengths.into_iter().cycle().take(count).collect();
    let prompts = prompts(&lengths, SIZES.vocab).into_iter();
    (0u32..)
        .zip(prompts.zip(sampling.into_iter().cycle()))
        .map(
            |(stream, (prompt, (temperature, top_k, top_p)))| GenerateRequest {
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
            },
        )
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
        let program = choice.program(&model, 3, 72);
        check(&model, &program, &batch(3, index % 2 == 1), 18);
    }
}

#[test]
fn planned_programs_in_many_interleavings() {
    let model = qwen3(SIZES);
    for (sms, count, seeds) in [(5, 3, 18), (8, 8, 12), (8, 20, 6), (132, 3, 6)] {
        let program = planned(&model, &target(sms, count, 72));
        check(&model, &program, &batch(count, true), seeds);
    }
}

/// Seeds that a mutant is given.
const TRIES: u64 = 72;

/// Some seed must show what is wrong, and show it again. `expect`: part of what is said.
#[track_caller]
fn mutant(simulator: &Simulator, batch: &[GenerateRequest], expect: &str) {
    let run = |seed| simulator.run(batch, Schedule::of(seed)).err();
    let shown =
        |seed| Some((seed, run(seed)?.to_string())).filter(|(_, said)| said.contains(expect));
    let Some((seed, said)) = (0..TRIES).find_map(shown) else {
        panic!("no seed below {TRIES} shows it by {expect}");
    };
    assert_eq!(run(seed).map(|failure| failure.to_string()), Some(said));
}

/// Two groups of two, and one CTA that only helps with the head.
const HELPED: Choice = Choice {
    groups: 2,
    members: 2,
    helpers: 1,
    writers: Placement {
        groups: Split::Rows,
        members: Split::Rows,
    },
    stream: StreamForm::Replicated,
    kv_splits: 1,
    replicate_below: 0,
    heads_per_task: 3,
    prefill_columns: 4,
};

/// A worker without rows of the linears that write the stream may be a layer behind, and nobody knows.
#[test]
fn mutant_worker_without_rows() {
    let model = qwen3(Sizes { layers: 4, ..SIZES });
    // The last member of a group has no rows of any linear.
    let choice = Choice {
        members: 21,
        helpers: 0,
        ..HELPED
    };
    let gpu = GpuModel::default_for(Arch::Sm90a);
    let (plan, target) = choice.plan_on(gpu, &model, 3, 72);
    assert!(plan.verify(&model.fused).is_err());
    let program = Program::new(&model.fused, &plan, &target).unwrap();
    let violation = program.verify().unwrap_err();
    assert_eq!(violation.rule, Rule::Reuse, "{violation}");

    let simulator = simulator(&model, &program);
    mutant(&simulator, &batch(3, false), "is overwritten too early");
}

/// The program of [`HELPED`] under a protocol with something taken away.
#[track_caller]
fn without(protocol: Protocol, expect: &str) {
    let model = qwen3(SIZES);
    let mut simulator = simulator(&model, &HELPED.program(&model, 3, 72));
    simulator.protocol = protocol;
    mutant(&simulator, &batch(3, false), expect);
}

#[test]
fn mutant_one_buffer_of_candidates() {
    let protocol = Protocol {
        candidate_buffers: 1,
        ..Protocol::default()
    };
    without(protocol, "is overwritten too early");
}

#[test]
fn mutant_barrier_dropped() {
    let protocol = Protocol {
        barrier: false,
        ..Protocol::default()
    };
    without(protocol, "of the KV cache is read before");
}

#[test]
fn mutant_fences_dropped() {
    let protocol = Protocol {
        fences: false,
        ..Protocol::default()
    };
    without(protocol, "of the KV cache is read before");
}

/// Rows are read before they are there, where nobody waits for flags.
#[test]
fn mutant_flags_dropped() {
    let model = qwen3(SIZES);
    let mut simulator = simulator(&model, &Choice::of_rows()[1].program(&model, 3, 72));
    simulator.protocol.flags = false;
    let expect = "but was last written in epoch 0";
    mutant(&simulator, &batch(3, false), expect);
}

/// Flags without fences come ahead of what they tell of.
#[test]
fn mutant_fences_of_flags_dropped() {
    let model = qwen3(SIZES);
    let mut simulator = simulator(&model, &Choice::of_rows()[0].program(&model, 3, 72));
    simulator.protocol.fences = false;
    mutant(
        &simulator,
        &batch(3, false),
        "but was last written in epoch 0",
    );
}

/// Programs that the verifier rejects.
#[test]
fn mutants_of_programs() {
    let model = qwen3(SIZES);
    let right = HELPED.program(&model, 3, 72);
    let check = |expect: &str, change: &dyn Fn(&mut Program)| {
        let mut program = right.clone();
        change(&mut program);
        program.verify().unwrap_err();
        mutant(&simulator(&model, &program), &batch(3, true), expect);
    };
    // Attention before the linear that it waits for: nobody begins.
    check(
        "deadlock: CTA 0 (step 20, decode step, attention on qkv",
        &|p| {
            p.decode.layer.swap(0, 1);
        },
    );
    // A wait for a linear that comes later.
    check("carries epoch", &|p| p.decode.layer.swap(5, 7));
    // Buffers shared too soon.
    check("is written twice in epoch", &|p| {
        p.linears[1].words_at = p.linears[0].words_at;
    });
    check("is written twice in epoch", &|p| {
        p.exchange.samples_at = p.exchange.candidates_at;
    });
    check("is written twice in epoch", &|p| {
        p.exchange.samples_at = p.exchange.candidates_at + p.decode.columns * p.mesh.ctas;
    });
    check("lies outside of the", &|p| {
        p.attention.words_at = p.exchange.words
    });
}
