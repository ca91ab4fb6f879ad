//! A plan is found for every model, GPU and batch, it verifies, and it is not the same for all of them.

use std::time::{Duration, Instant};

use mirage_compiler::arch::Arch;
use mirage_compiler::mesh::{Placement, Split};
use mirage_compiler::plan::{PlanError, StreamForm, Target};
use mirage_compiler::program::ProgramError;

use crate::models::{compile, model, target, try_compile};

const ARCHS: [Arch; 4] = [Arch::Sm80, Arch::Sm90a, Arch::Sm100a, Arch::Sm120a];

/// Every GPU at batch 1, 8 and 16: a plan, or, for those listed, the clear answer that shared memory does not suffice.
#[track_caller]
fn check_all_targets(name: &str, no_room: &[(Arch, usize)]) {
    let mut refused = Vec::new();
    for arch in ARCHS {
        for batch in [1, 8, 16] {
            match try_compile(name, arch, batch) {
                Ok((plan, program)) => {
                    let stream = plan.decode.cost.total > plan.floor;
                    assert!(
                        stream,
                        "{name}, {arch}, batch {batch}: faster than its weights\n{plan}"
                    );
                    assert!(program.ring.pages >= 3, "{name}, {arch}, batch {batch}");
                }
                Err(PlanError::Program(ProgramError::SharedMemory { .. })) => {
                    refused.push((arch, batch))
                }
                Err(error) => panic!("{name}, {arch}, batch {batch}: {error}"),
            }
        }
    }
    assert_eq!(refused, no_room, "{name}");
}

#[test]
fn qwen3_0_6b_has_plans() {
    check_all_targets("0.6B", &[]);
}

#[test]
fn qwen3_1_7b_has_plans() {
    check_all_targets("1.7B", &[(Arch::Sm120a, 16)]);
}

#[test]
fn qwen3_4b_has_plans() {
    check_all_targets("4B", &[(Arch::Sm120a, 16)]);
}

#[test]
fn qwen3_8b_has_plans() {
    check_all_targets("8B", &[(Arch::Sm80, 16), (Arch::Sm120a, 16)]);
}

#[test]
fn qwen3_14b_has_plans() {
    check_all_targets(
        "14B",
        &[(Arch::Sm80, 16), (Arch::Sm120a, 8), (Arch::Sm120a, 16)],
    );
}

#[test]
fn qwen3_32b_has_plans() {
    check_all_targets(
        "32B",
        &[(Arch::Sm80, 16), (Arch::Sm120a, 8), (Arch::Sm120a, 16)],
    );
}

#[test]
fn llama3_has_plans() {
    check_all_targets("llama3", &[]);
}

#[test]
fn tiny_has_plans() {
    check_all_targets("tiny", &[]);
}

/// What was found by hand for one H100 (ARCHITECTURE.md): heads and their rows to a group, partial sums of o and down over
/// the grid, the stream replicated by an all-reduce.
#[test]
fn the_plan_for_one_sequence_is_the_measured_one() {
    let (plan, program) = compile("0.6B", Arch::Sm90a, 1);
    assert_eq!(plan.mesh.workers(), 128, "{plan}");
    assert_eq!(plan.decode.stream, StreamForm::Replicated, "{plan}");
    let writer = plan.placements[2].unwrap();
    assert_eq!(writer.groups, Split::Columns, "{plan}");
    assert_ne!(plan.placements[2], Some(Placement::ALL[0]), "{plan}");
    assert!(program.exchanges(&program.decode) <= 5, "{program}");
}

#[test]
fn the_stream_is_scattered_where_many_columns_share_it() {
    let form = |batch| compile("0.6B", Arch::Sm90a, batch).0.decode.stream;
    assert_eq!(form(1), StreamForm::Replicated);
    assert_eq!(form(16), StreamForm::Scattered);
}

#[test]
fn columns_follow_the_batch() {
    for (batch, columns) in [(1, 1), (3, 4), (8, 8), (9, 16)] {
        assert_eq!(
            compile("tiny", Arch::Sm90a, batch).0.decode.columns,
            columns,
            "batch {batch}"
        );
    }
}

#[test]
fn batches_and_contexts_out_of_range_are_refused() {
    let graph = model("tiny");
    let of = |batch, max_seq| Target {
        max_seq,
        ..target(Arch::Sm90a, batch)
    };
    let search = |target: Target| mirage_compiler::plan::Plan::search(&graph, &target).unwrap_err();
    assert_eq!(search(of(0, 64)), PlanError::Batch { batch: 0 });
    assert_eq!(search(of(65, 64)), PlanError::Batch { batch: 65 });
    assert_eq!(search(of(1, 0)), PlanError::MaxSeq { max_seq: 0 });
    assert_eq!(
        search(of(1, usize::MAX)),
        PlanError::MaxSeq {
            max_seq: usize::MAX
        }
    );
}

/// Programs are verified at every compilation, so it must not take long.
#[test]
fn verification_is_quick() {
    let (_, program) = compile("0.6B", Arch::Sm90a, 1);
    let quickest = (0..3)
        .map(|_| {
            let start = Instant::now();
            program.verify().unwrap();
            start.elapsed()
        })
        .min();
    let limit = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });
    assert!(quickest < Some(limit), "{quickest:?}");
}
