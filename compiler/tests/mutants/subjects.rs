//! The correct programs that mutants are made of.

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::mesh::Placement;
use mirage_compiler::plan::{StreamForm, Target};
use mirage_compiler::program::Program;
use mirage_testing::{Choice, Model, SIZES, Sizes, llama3, planned, qwen3};

/// A program and what it was made from.
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) program: Program,
    pub(crate) graph: FusedGraph,
    pub(crate) target: Target,
}

/// Programs of the planner, on GPUs of few SMs so that they are verified quickly, and those of plans by hand.
pub(crate) fn subjects() -> Vec<Subject> {
    let small = qwen3(SIZES);
    let untied = llama3(Sizes {
        tied: false,
        ..SIZES
    });
    let deeper = qwen3(Sizes {
        layers: 3,
        hidden: 256,
        ffn: 384,
        heads: 8,
        kv_heads: 4,
        vocab: 515,
        tied: true,
    });
    let mut subjects = Vec::new();
    for (name, model) in [("qwen3", &small), ("llama3", &untied), ("deeper", &deeper)] {
        for (arch, sms, batch, max_seq) in [
            (Arch::Sm90a, 8, 1, 64),
            (Arch::Sm80, 13, 3, 300),
            (Arch::Sm120a, 6, 8, 2000),
            (Arch::Sm100a, 24, 24, 128),
            (Arch::Sm90a, 8, 17, 64),
        ] {
            let target = target(arch, sms, batch, max_seq);
            subjects.push(Subject {
                name: format!("{name}, {} SMs of {arch:?}, batch {batch}", sms),
                program: planned(model, &target),
                graph: model.fused.clone(),
                target,
            });
        }
    }
    subjects.extend(by_hand(&small));
    subjects.push(replicated());
    subjects
}

fn by_hand(model: &Model) -> impl Iterator<Item = Subject> {
    Choice::all().into_iter().enumerate().map(|(i, choice)| {
        let batch = [3, 1, 4][i % 3];
        let ctas = choice.groups * choice.members + choice.helpers;
        Subject {
            name: format!("{choice:?}, batch {batch}"),
            program: choice.program(model, batch, 72),
            graph: model.fused.clone(),
            target: target(Arch::Sm90a, ctas as u32, batch, 72),
        }
    })
}

/// Decode steps whose attention, replicated, needs more of the activation's region than anything else does.
fn replicated() -> Subject {
    let model = qwen3(Sizes { heads: 40, ..SIZES });
    let choice = Choice {
        groups: 2,
        members: 2,
        helpers: 1,
        writers: Placement::ALL[1],
        stream: StreamForm::Replicated,
        kv_splits: 1,
        replicate_below: 64,
        heads_per_task: 5,
        prefill_columns: 1,
    };
    Subject {
        name: format!("{choice:?}"),
        program: choice.program(&model, 1, 72),
        target: target(Arch::Sm90a, 5, 1, 72),
        graph: model.fused,
    }
}

fn target(arch: Arch, sms: u32, batch: usize, max_seq: usize) -> Target {
    Target {
        gpu: GpuModel {
            sms,
            ..GpuModel::default_for(arch)
        },
        batch,
        max_seq,
    }
}
