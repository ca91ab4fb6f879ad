//! Simulates the committed plans in many interleavings (`mirage_runtime::cpu::simulator`): the tiny model's program as it is,
//! and the plans of full-size models carried over to small ones, with the same mesh, placements and forms of the stream.
//!
//! `simulate [COUNT] [FIRST]`: COUNT interleavings in all, 10000 unless it says otherwise, from seed FIRST on. What a seed has
//! shown it shows again: `simulate 0 SEED` runs that one of every plan.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::plan::{Plan, Target, Transport};
use mirage_compiler::program::Program;
use mirage_compiler::typed::{ModelConfig, TypedGraph};
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::cpu::simulator::{Schedule, Simulator};
use mirage_runtime::generate::GenerateRequest;
use mirage_runtime::sampler::SamplingParams;
use mirage_testing::{LLAMA3, Model, QWEN3, SIZES, Sizes, llama3, planned, prompts, qwen3, tiny};
use rayon::prelude::*;

/// A committed plan: its snapshot, a Qwen3's layers, hidden, ffn and query heads (`None`: Llama-3.2-1B), the GPU, and the
/// batch.
type Committed = (&'static str, Option<[usize; 4]>, Arch, usize);

const SMALL: Option<[usize; 4]> = Some([28, 1024, 3072, 16]);

const PLANS: [Committed; 6] = [
    ("qwen3_0_6b_h100_b1", SMALL, Arch::Sm90a, 1),
    ("qwen3_0_6b_h100_b8", SMALL, Arch::Sm90a, 8),
    ("qwen3_0_6b_a100_b1", SMALL, Arch::Sm80, 1),
    ("qwen3_0_6b_rtx5090_b1", SMALL, Arch::Sm120a, 1),
    (
        "qwen3_8b_h100_b1",
        Some([36, 4096, 12288, 32]),
        Arch::Sm90a,
        1,
    ),
    ("llama3_2_1b_h100_b1", None, Arch::Sm90a, 1),
];

struct Subject {
    name: &'static str,
    simulator: Simulator,
    batch: Vec<GenerateRequest>,
}

fn subject(name: &'static str, model: &Model, program: Program) -> Result<Subject, Box<dyn Error>> {
    program.verify()?;
    let slots = program.slots;
    let vocab = program.vocab;
    Ok(Subject {
        name,
        simulator: Simulator::load(program, &Checkpoint::open(model)?)?,
        batch: batch(slots, vocab),
    })
}

/// A few tokens for each slot, some drawn, of prompts that take several prefill steps together.
fn batch(slots: usize, vocab: usize) -> Vec<GenerateRequest> {
    let lengths: Vec<usize> = (0..slots).map(|slot| [5, 1, 3, 2][slot % 4]).collect();
    (0u32..)
        .zip(prompts(&lengths, vocab))
        .map(|(stream, prompt)| GenerateRequest {
            sampling: SamplingParams {
                temperature: if stream % 2 == 0 { 0.0 } else { 1.0 },
                top_k: 10,
                ..SamplingParams::default()
            },
            stream,
            ..GenerateRequest::greedy(prompt, 3)
        })
        .collect()
}

/// What the planner needs of a Qwen3's config.json.
fn config([layers, hidden, ffn, heads]: [usize; 4]) -> String {
    format!(
        r#"{{"model_type": "qwen3", "hidden_act": "silu", "attention_bias": false, "head_dim": 128,
        "num_hidden_layers": {layers}, "hidden_size": {hidden}, "intermediate_size": {ffn},
        "num_attention_heads": {heads}, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "tie_word_embeddings": {}}}"#,
        hidden < 4096
    )
}

/// The plan of a full-size model, carried over to a small one, and the program it makes of that.
fn carried_over((_, sizes, arch, batch): Committed) -> Result<(Model, Program), Box<dyn Error>> {
    let (graph, config) = match sizes {
        Some(sizes) => (QWEN3, ModelConfig::parse(&config(sizes), "config.json")?),
        None => (LLAMA3, ModelConfig::none()),
    };
    let typed = TypedGraph::new(&Graph::parse(graph, "graph.ron")?, &config)?;
    let mut target = Target {
        gpu: GpuModel::default_for(arch),
        batch,
        max_seq: 4096,
    };
    let (mut plan, full) = Plan::search(&FusedGraph::new(&typed)?, &target)?;
    // As narrow as the mesh allows: a tile for everybody who has rows or columns of what writes the stream.
    let placement = plan.placements.iter().flatten().last().copied();
    let placement = placement.ok_or("the plan places nothing")?;
    let small = Sizes {
        layers: 2,
        hidden: 16 * placement.row_parts(&plan.mesh) + 16,
        ffn: 16 * placement.column_parts(&plan.mesh) + 16,
        heads: full.attention.heads * plan.mesh.groups,
        kv_heads: full.attention.kv_heads * plan.mesh.groups,
        ..SIZES
    };
    let model = match sizes {
        Some(_) => qwen3(small),
        None => llama3(small),
    };
    // Fewer positions at once.
    plan.prefill.columns = plan.decode.columns.max(2);
    plan.prefill.transport = Transport::Words;
    plan.wide = None;
    target.max_seq = 64;
    plan.verify(&model.fused)?;
    let program = Program::new(&model.fused, &plan, &target)?;
    Ok((model, program))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let count: u64 = arguments.next().map_or(Ok(10_000), |count| count.parse())?;
    let first: u64 = arguments.next().map_or(Ok(0), |first| first.parse())?;

    let model = tiny();
    let target = Target {
        gpu: GpuModel::default_for(Arch::Sm90a),
        batch: 1,
        max_seq: 64,
    };
    let mut subjects = vec![subject("tiny_h100_b1", &model, planned(&model, &target))?];
    for committed in PLANS {
        let (model, program) = carried_over(committed)?;
        subjects.push(subject(committed.0, &model, program)?);
    }
    let all = count.div_ceil(subjects.len() as u64).max(1);
    let bar = ProgressBar::new(all * subjects.len() as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} {msg} ({eta})",
    )?);
    let mut failures = 0;
    for Subject {
        name,
        mut simulator,
        batch,
    } in subjects
    {
        bar.set_message(name);
        let started = Instant::now();
        let want = simulator.lockstep(&batch)?;
        let (turns, writes) = (AtomicU64::new(0), AtomicU64::new(0));
        let failed: Vec<String> = (first..first + all)
            .into_par_iter()
            .filter_map(|seed| {
                let got = simulator.check(&batch, Schedule::of(seed), &want);
                bar.inc(1);
                match got {
                    Ok(got) => {
                        turns.fetch_add(got.turns, Ordering::Relaxed);
                        writes.fetch_add(got.writes, Ordering::Relaxed);
                        None
                    }
                    Err(failure) => Some(failure.to_string()),
                }
            })
            .collect();
        let (turns, writes) = (turns.into_inner(), writes.into_inner());
        bar.suspend(|| {
            println!(
                "{name}: {all} interleavings, {turns} turns, {writes} writes, {} failures, {:.1} s",
                failed.len(),
                started.elapsed().as_secs_f32()
            );
            failed
                .iter()
                .take(5)
                .for_each(|failure| println!("  {failure}"));
        });
        failures += failed.len();
    }
    bar.finish_and_clear();
    if failures > 0 {
        return Err(format!("{failures} interleavings failed").into());
    }
    Ok(())
}
