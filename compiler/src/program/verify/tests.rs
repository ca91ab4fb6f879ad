//! Programs that pass, for every legal way to lay a small decoder out, and small changes of one that do not.

use super::Rule;
use crate::arch::{Arch, GpuModel};
use crate::cost::StepCost;
use crate::fuse::{FusedGraph, FusedOp};
use crate::graph::Graph;
use crate::mesh::{Mesh, Placement};
use crate::plan::{Plan, StepPlan, StreamForm, Target, Transport};
use crate::program::{Along, Next, Phase, Program};
use crate::typed::{ModelConfig, TypedGraph};

/// Two KV heads under four query heads, and widths of 8, 6 and 16 tiles: uneven over three members.
fn small_graph() -> FusedGraph {
    let config = r#"{
        "model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 200,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true
    }"#;
    let graph = Graph::parse(include_str!("../../../../graphs/qwen3.ron"), "qwen3.ron").unwrap();
    let config = ModelConfig::parse(config, "config.json").unwrap();
    FusedGraph::new(&TypedGraph::new(&graph, &config).unwrap()).unwrap()
}

fn target(ctas: usize) -> Target {
    let gpu = GpuModel {
        sms: ctas as u32,
        ..GpuModel::default_for(Arch::Sm90a)
    };
    Target {
        gpu,
        batch: 4,
        max_seq: 64,
    }
}

/// Every choice of placements, legal or not.
fn all_placements(graph: &FusedGraph) -> Vec<Vec<Option<Placement>>> {
    let mut all = vec![Vec::new()];
    for node in &graph.layer {
        let options: Vec<Option<Placement>> = match node.op {
            FusedOp::Attention(_) => vec![None],
            FusedOp::Linear(_) => Placement::ALL.into_iter().map(Some).collect(),
        };
        all = all
            .iter()
            .flat_map(|chosen: &Vec<_>| {
                options
                    .iter()
                    .map(move |option| [&chosen[..], &[*option]].concat())
            })
            .collect();
    }
    all
}

struct Forced {
    mesh: Mesh,
    placements: Vec<Option<Placement>>,
    heads_per_task: usize,
    kv_splits: usize,
    columns: usize,
    prefill: StreamForm,
    decode: StreamForm,
}

impl Forced {
    fn plan(&self, graph: &FusedGraph) -> Plan {
        let step = |columns, stream| StepPlan {
            columns,
            transport: Transport::Words,
            stream,
            kv_splits: self.kv_splits,
            replicate_below: 0,
            cost: StepCost::default(),
        };
        Plan {
            mesh: self.mesh,
            placements: self.placements.clone(),
            heads_per_task: self.heads_per_task,
            prefill: step(self.columns, self.prefill),
            wide: None,
            decode: step(4, self.decode),
            weight_bytes: 0,
            floor: 0.0,
            considered: 0,
            nodes: graph.layer.iter().map(|node| node.name.clone()).collect(),
        }
    }
}

const FORMS: [StreamForm; 2] = [StreamForm::Replicated, StreamForm::Scattered];

/// Four workers and an idle CTA; the stream is scattered in prefill and replicated in decode, or the reverse.
pub(super) fn program(prefill: StreamForm, decode: StreamForm) -> Program {
    let graph = small_graph();
    let placements = all_placements(&graph).into_iter().filter(|placements| {
        let columns = Placement::ALL[1];
        placements
            .iter()
            .flatten()
            .filter(|p| **p == columns)
            .count()
            == 2
    });
    for placements in placements {
        let mesh = Mesh {
            groups: 2,
            members: 2,
            ctas: 5,
        };
        let forced = Forced {
            mesh,
            placements,
            heads_per_task: 1,
            kv_splits: 2,
            columns: 8,
            prefill,
            decode,
        };
        let plan = forced.plan(&graph);
        if plan.verify(&graph).is_ok() {
            return Program::new(&graph, &plan, &target(5)).unwrap();
        }
    }
    panic!("no legal placement with o and down split by groups' columns");
}

#[test]
fn every_legal_layout_passes() {
    let graph = small_graph();
    let mut passed = 0;
    for placements in all_placements(&graph) {
        for (groups, members, idle) in [
            (1, 1, 0),
            (1, 3, 1),
            (2, 1, 1),
            (2, 2, 0),
            (2, 3, 2),
            (1, 4, 0),
        ] {
            let mesh = Mesh {
                groups,
                members,
                ctas: groups * members + idle,
            };
            for (i, (prefill, decode)) in FORMS
                .into_iter()
                .flat_map(|p| FORMS.map(|d| (p, d)))
                .enumerate()
            {
                let forced = Forced {
                    mesh,
                    placements: placements.clone(),
                    heads_per_task: 1 + (i + members) % 2,
                    kv_splits: 1 + (i + groups) % 3,
                    columns: [4, 8, 4, 16][(i + members) % 4],
                    prefill,
                    decode,
                };
                let plan = forced.plan(&graph);
                if plan.verify(&graph).is_err() {
                    continue;
                }
                let program = match Program::new(&graph, &plan, &target(mesh.ctas)) {
                    Ok(program) => program,
                    // One worker has too few threads to hold the whole stream.
                    Err(_) if mesh.workers() == 1 => continue,
                    Err(error) => panic!("{error}"),
                };
                match program.verify() {
                    Ok(()) => passed += 1,
                    Err(violation) => panic!("{violation}\n{program}"),
                }
                program.fits(&target(mesh.ctas).gpu).unwrap();
            }
        }
    }
    assert!(passed >= 80, "{passed} passed");
}

/// A change that must be found, by this rule. It is made on both kinds of step and both forms of the stream.
#[track_caller]
fn check(mutate: impl Fn(&mut Program), expect: Rule) {
    for (prefill, decode) in [(FORMS[0], FORMS[1]), (FORMS[1], FORMS[0])] {
        let mut program = program(prefill, decode);
        assert_eq!(program.verify(), Ok(()));
        let before = program.clone();
        mutate(&mut program);
        assert_ne!(before, program, "nothing was changed");
        match program.verify() {
            Ok(()) => panic!("not found:\n{program}"),
            Err(violation) => assert_eq!(violation.rule, expect, "{violation}"),
        }
    }
}

/// Every change of this kind must be found, by whatever rule.
#[track_caller]
fn check_all(mutants: impl Fn(&Program) -> Vec<(String, Program)>) {
    for (prefill, decode) in [(FORMS[0], FORMS[1]), (FORMS[1], FORMS[0])] {
        let program = program(prefill, decode);
        let mutants = mutants(&program);
        assert!(!mutants.is_empty());
        for (what, mutant) in mutants {
            assert!(mutant.verify().is_err(), "{what} was not found:\n{mutant}");
        }
    }
}

/// The phases of each kind of step, one program for each change of them.
fn changed_layers(
    program: &Program,
    change: impl Fn(&[Phase]) -> Vec<(String, Vec<Phase>)>,
) -> Vec<(String, Program)> {
    let mut mutants = Vec::new();
    for prefill in [true, false] {
        let step = if prefill {
            &program.prefill
        } else {
            &program.decode
        };
        for (what, layer) in change(&step.layer) {
            let mut mutant = program.clone();
            let step = if prefill {
                &mut mutant.prefill
            } else {
                &mut mutant.decode
            };
            step.layer = layer;
            mutants.push((format!("{what} (prefill: {prefill})"), mutant));
        }
    }
    mutants
}

#[test]
fn mutant_phase_dropped() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let without = |at: usize| [&layer[..at], &layer[at + 1..]].concat();
            (0..layer.len())
                .map(|at| (format!("phase {at} dropped"), without(at)))
                .collect()
        })
    });
}

#[test]
fn mutant_phase_doubled() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let twice = |at: usize| [&layer[..=at], &layer[at..]].concat();
            let harmless = |phase: &Phase| {
                // To collect again what is still there, or to attend again, changes nothing but the time it takes.
                matches!(phase, Phase::CollectHeads { .. } | Phase::Collect { .. })
            };
            (0..layer.len())
                .filter(|at| !harmless(&layer[*at]))
                .map(|at| (format!("phase {at} doubled"), twice(at)))
                .collect()
        })
    });
}

#[test]
fn mutant_phases_swapped() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let pairs = (0..layer.len()).flat_map(|a| (a + 1..layer.len()).map(move |b| (a, b)));
            pairs
                .map(|(a, b)| {
                    let mut layer = layer.to_vec();
                    layer.swap(a, b);
                    (format!("phases {a} and {b} swapped"), layer)
                })
                .collect()
        })
    });
}

#[test]
fn mutant_next_linear_changed() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let mut mutants = Vec::new();
            for (at, phase) in layer.iter().enumerate() {
                for other in 0..5 {
                    let mut layer = layer.to_vec();
                    match &mut layer[at] {
                        Phase::CollectHeads { next, .. } | Phase::Collect { next, .. } => {
                            *next = other
                        }
                        Phase::AddToStream { next, .. }
                        | Phase::ReduceScatter { next, .. }
                        | Phase::GatherStream { next, .. } => *next = Next::SameLayer(other),
                        Phase::Linear(index) => *index = other,
                        _ => continue,
                    }
                    if layer[at] != *phase {
                        mutants.push((format!("phase {at} prepares {other}"), layer));
                    }
                }
            }
            mutants
        })
    });
}

#[test]
fn mutant_along_changed() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let mut mutants = Vec::new();
            for at in 0..layer.len() {
                for along in [Along::Own, Along::Concat, Along::Sum] {
                    for axis in 0..2 {
                        let mut changed = layer.to_vec();
                        let (Phase::Attention { exchange, .. }
                        | Phase::Collect { exchange, .. }
                        | Phase::AddToStream { exchange, .. }
                        | Phase::ReduceScatter { exchange, .. }
                        | Phase::GatherStream { exchange, .. }) = &mut changed[at]
                        else {
                            continue;
                        };
                        *(if axis == 0 {
                            &mut exchange.groups
                        } else {
                            &mut exchange.members
                        }) = along;
                        if changed[at] != layer[at] {
                            mutants.push((format!("phase {at}, axis {axis}: {along:?}"), changed));
                        }
                    }
                }
            }
            mutants
        })
    });
}

#[test]
fn mutant_heads_of_the_wrong_groups() {
    check(
        |program| {
            for step in [&mut program.prefill, &mut program.decode] {
                for phase in &mut step.layer {
                    if let Phase::CollectHeads { all_groups, .. } = phase {
                        // o splits its columns over the groups, so its own group's heads are all it needs.
                        *all_groups = true;
                    }
                }
            }
            program.linears[program.attention.qkv].placement = Placement::ALL[1];
        },
        Rule::Mesh,
    );
}

#[test]
fn mutant_words_shifted() {
    check_all(|program| {
        let mut mutants = Vec::new();
        for (what, change) in [
            (
                "a linear's words",
                (|p| &mut p.linears[1].words_at) as fn(&mut Program) -> &mut usize,
            ),
            ("the first linear's words", |p| &mut p.linears[0].words_at),
            ("the heads' words", |p| &mut p.attention.words_at),
            ("candidates", |p| &mut p.exchange.candidates_at),
            ("sums", |p| &mut p.exchange.sums_at),
            ("samples", |p| &mut p.exchange.samples_at),
            ("the barrier", |p| &mut p.exchange.barrier_at),
            ("histograms", |p| &mut p.exchange.histograms_at),
        ] {
            let mut mutant = program.clone();
            *change(&mut mutant) += 1024;
            mutants.push((format!("{what} moved on"), mutant));
            let mut mutant = program.clone();
            let at = change(&mut mutant);
            *at = at.saturating_sub(8);
            // What lies ahead of the candidates is used by one form of the stream only.
            if mutant != *program && what != "candidates" {
                mutants.push((format!("{what} moved back"), mutant));
            }
        }
        let mut mutant = program.clone();
        mutant.exchange.words -= 8;
        mutants.push(("the area shrunk".to_owned(), mutant));
        mutants
    });
}

#[test]
fn mutant_gathered_words_elsewhere() {
    check_all(|program| {
        changed_layers(program, |layer| {
            let mut mutants = Vec::new();
            for at in 0..layer.len() {
                let mut layer = layer.to_vec();
                if let Phase::ReduceScatter { words_at, .. }
                | Phase::GatherStream { words_at, .. } = &mut layer[at]
                {
                    *words_at += 8;
                    mutants.push((format!("phase {at}"), layer));
                }
            }
            mutants
        })
    });
}

#[test]
fn mutant_region_shrunk_or_moved() {
    check_all(|program| {
        let mut mutants = Vec::new();
        for i in 0..program.shared.regions.len() {
            let name = &program.shared.regions[i].name;
            let mut mutant = program.clone();
            mutant.shared.regions[i].bytes /= 8;
            mutants.push((format!("{name} shrunk"), mutant));
            let mut mutant = program.clone();
            mutant.shared.regions[i].at += 64;
            mutants.push((format!("{name} moved"), mutant));
            let mut mutant = program.clone();
            mutant.shared.regions.remove(i);
            mutants.push((format!("{name} removed"), mutant));
        }
        let mut mutant = program.clone();
        mutant.shared.bytes -= 128;
        mutants.push(("all shrunk".to_owned(), mutant));
        mutants
    });
}

#[test]
fn mutant_false_exactness() {
    check(|program| program.head.tiling.rows_exact = true, Rule::Pages);
    check(
        |program| {
            // 16 column tiles over two groups, in pages of eight: make the pages uneven.
            let tiling = &mut program.linears[1].tiling;
            tiling.k_exact = true;
            tiling.page_k *= 16;
        },
        Rule::Ring,
    );
}

#[test]
fn mutant_tilings() {
    check(|program| program.linears[0].tiling.passes += 1, Rule::Pages);
    check(|program| program.linears[0].tiling.k += 1, Rule::Pages);
    check(
        |program| program.linears[2].tiling.pass_tiles += 1,
        Rule::Pages,
    );
    check(|program| program.linears[0].tiling.page_k += 1, Rule::Pages);
    check(
        |program| program.linears[0].tiling.warp_rows = 3,
        Rule::Pages,
    );
    check(|program| program.ring.page_bytes = 512, Rule::Ring);
}

#[test]
fn mutant_ring() {
    check(|program| program.ring.in_flight = 0, Rule::Ring);
    check(|program| program.ring.head_in_flight = 0, Rule::Ring);
    check(
        |program| program.ring.in_flight = program.ring.pages + 1,
        Rule::Ring,
    );
    // o and down in each other's place: the plan's placements and the ring's pages would still fit.
    check(|program| program.linears.swap(1, 3), Rule::Inputs);
}

#[test]
fn mutant_weights() {
    check(|program| program.linears[2].k_tiles += 1, Rule::Tiles);
    check(|program| program.linears[2].row_units -= 1, Rule::Tiles);
    check(|program| program.linears[0].parts.swap(0, 1), Rule::Steps);
    check(|program| program.head.row_units += 1, Rule::Tiles);
    check(
        |program| program.linears[0].placement = Placement::ALL[2],
        Rule::Mesh,
    );
}

#[test]
fn mutant_norms() {
    check(|program| program.norms.layer_stride -= 1, Rule::Norms);
    check(
        |program| {
            if let Some(norm) = &mut program.linears[0].norm {
                norm.gamma_at += 2;
            }
        },
        Rule::Norms,
    );
    check(|program| program.head.norm = None, Rule::Weights);
}

#[test]
fn mutant_steps() {
    check(|program| program.slots += 1, Rule::Steps);
    check(|program| program.attention.heads_per_task = 2, Rule::Mesh);
    check(|program| program.attention.kv_heads *= 2, Rule::Steps);
    check(|program| program.prefill.columns *= 2, Rule::Mesh);
    // Fewer columns than decode steps go on with.
    check(
        |program| {
            program.slots = 2;
            program.prefill.columns = 2;
            program.plan.prefill.columns = 2;
        },
        Rule::Steps,
    );
}

/// More members than rows, which `Plan::verify` would refuse: nobody waits for the worker without rows, so nothing keeps it from lagging behind.
#[test]
fn workers_that_nobody_waits_for_are_found() {
    let graph = small_graph();
    let mut placements = vec![Some(Placement::ALL[0]); graph.layer.len()];
    for (node, placement) in graph.layer.iter().zip(&mut placements) {
        if matches!(node.op, FusedOp::Attention(_)) {
            *placement = None;
        }
    }
    let mesh = Mesh {
        groups: 2,
        members: 20,
        ctas: 40,
    };
    let forced = Forced {
        mesh,
        placements,
        heads_per_task: 2,
        kv_splits: 1,
        columns: 4,
        prefill: StreamForm::Replicated,
        decode: StreamForm::Replicated,
    };
    let plan = forced.plan(&graph);
    assert!(
        plan.verify(&graph)
            .unwrap_err()
            .contains("leave some without any")
    );
    let program = Program::new(&graph, &plan, &target(40)).unwrap();
    let violation = program.verify().unwrap_err();
    assert_eq!(violation.rule, Rule::Reuse, "{violation}");
}

#[test]
fn programs_fit_only_their_gpu() {
    let program = program(FORMS[0], FORMS[1]);
    program.fits(&target(5).gpu).unwrap();
    assert_eq!(program.fits(&target(4).gpu).unwrap_err().rule, Rule::Mesh);
    let small = GpuModel {
        smem_per_block_optin: program.shared.bytes as u32 - 1,
        ..target(5).gpu
    };
    assert_eq!(program.fits(&small).unwrap_err().rule, Rule::Shared);
}
