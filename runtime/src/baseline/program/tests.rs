//! Lowering, with addresses instead of memory.

use mirage_compiler::graph::Graph;
use mirage_compiler::typed::ModelConfig;

use super::*;

/// Hands out addresses one after the other, with the elements that each stands for.
#[derive(Default)]
struct Addresses {
    given: u64,
    caches: usize,
    tables: Vec<(String, u64)>,
}

impl Addresses {
    fn next(&mut self) -> Result<u64, BaselineError> {
        self.given += 16;
        Ok(self.given)
    }
}

/// Weights lie apart from everything else.
const WEIGHTS: u64 = 1 << 32;

impl Memory for Addresses {
    fn value(&mut self, _width: usize) -> Result<u64, BaselineError> {
        self.next()
    }
    fn logits(&mut self, _width: usize) -> Result<u64, BaselineError> {
        self.next()
    }
    fn cache(&mut self, _width: usize) -> Result<u64, BaselineError> {
        self.caches += 1;
        self.next()
    }
    fn turns(&mut self, rope: &Rope, head_dim: usize) -> Result<u64, BaselineError> {
        let key = format!("{rope:?} {head_dim}");
        if let Some((_, table)) = self.tables.iter().find(|(known, _)| *known == key) {
            return Ok(*table);
        }
        let table = self.next()?;
        self.tables.push((key, table));
        Ok(table)
    }
    fn weight(&self, index: usize, layer: usize) -> u64 {
        WEIGHTS + 16 * (1000 * index + layer) as u64
    }
}

fn typed(text: &str, config: &str) -> TypedGraph {
    let graph = Graph::parse(text, "graph.ron").unwrap();
    TypedGraph::new(&graph, &ModelConfig::parse(config, "config.json").unwrap()).unwrap()
}

const QWEN3: &str = include_str!("../../../../graphs/qwen3.ron");
const LLAMA3: &str = include_str!("../../../../graphs/llama3.ron");

fn check(graph: &TypedGraph, layer: usize) -> (Program, Addresses) {
    let mut memory = Addresses::default();
    let program = Program::new(graph, &mut memory).unwrap();
    assert_eq!(program.body.len(), 1 + graph.layers * layer);
    // Final norm, logits, sample.
    assert_eq!((program.head.len(), program.gathered_head.len()), (3, 3));
    assert_eq!(memory.caches, 2 * graph.layers);
    (program, memory)
}

#[test]
fn every_operator_is_one_launch() {
    let graph = Graph::parse(QWEN3, "qwen3.ron").unwrap();
    let graph = TypedGraph::new(&graph, &ModelConfig::none()).unwrap();
    let (program, memory) = check(&graph, 19);
    assert_eq!(memory.tables.len(), 1, "q and k turn alike");
    let shapes: Vec<_> = products(&program.body)
        .iter()
        .map(|(s, all)| (s.outputs, s.inputs, all.len()))
        .collect();
    assert_eq!(
        shapes,
        [
            (1024, 1024, 56),
            (1024, 2048, 28),
            (1024, 3072, 28),
            (2048, 1024, 28),
            (3072, 1024, 56)
        ]
    );

    let graph = Graph::parse(LLAMA3, "llama3.ron").unwrap();
    check(&TypedGraph::new(&graph, &ModelConfig::none()).unwrap(), 17);
}

/// The addresses a launch reads values from, and the one it writes.
fn values(launch: &Launch) -> (Vec<u64>, Option<u64>) {
    match *launch {
        Launch::Embedding { out, .. } => (vec![], Some(out)),
        Launch::RmsNorm { input, out, .. }
        | Launch::Matmul { input, out, .. }
        | Launch::Rope { input, out, .. } => (vec![input], Some(out)),
        Launch::KvAppend { k, v, .. } => (vec![k, v], None),
        Launch::Attention { q, out, .. } => (vec![q], Some(out)),
        Launch::Silu { input, out, .. } => (vec![input], Some(out)),
        Launch::Mul { a, b, out, .. } | Launch::Add { a, b, out, .. } => (vec![a, b], Some(out)),
        Launch::Sample { logits, .. } => (vec![logits], None),
    }
}

#[test]
fn values_are_written_before_they_are_read_and_the_state_passes_on() {
    let config = r#"{"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "tie_word_embeddings": true}"#;
    let (program, _) = check(&typed(QWEN3, config), 19);
    let mut written = std::collections::BTreeSet::new();
    for step in program.body.iter().chain(&program.head) {
        let (reads, writes) = values(&step.launch);
        for address in &reads {
            assert!(
                written.contains(address),
                "{step:?} reads what nobody wrote"
            );
        }
        assert!(
            writes.is_none_or(|out| !reads.contains(&out)),
            "{step:?} overwrites its input"
        );
        written.extend(writes);
    }
    // Each layer's first norm reads what the layer before wrote last.
    let norms: Vec<_> = program
        .body
        .iter()
        .enumerate()
        .filter(|(_, step)| step.value == "attention_norm")
        .collect();
    assert_eq!(norms.len(), 3);
    for (at, step) in norms {
        let (_, before) = values(&program.body[at - 1].launch);
        assert_eq!(values(&step.launch).0, [before.unwrap()]);
    }
    assert_eq!(values(&program.head[0].launch).0, [program.state]);
    assert_eq!(
        values(&program.gathered_head[0].launch).0,
        [program.gathered]
    );
}

#[test]
fn every_layer_has_its_weights_and_caches() {
    let graph = TypedGraph::new(
        &Graph::parse(QWEN3, "qwen3.ron").unwrap(),
        &ModelConfig::none(),
    )
    .unwrap();
    let (program, _) = check(&graph, 19);
    let mut seen = std::collections::BTreeSet::new();
    for step in &program.body {
        let place = match step.launch {
            Launch::Matmul { matrix, .. } => matrix,
            Launch::RmsNorm { gamma, .. } => gamma,
            Launch::KvAppend { keys, .. } => keys,
            _ => continue,
        };
        assert!(seen.insert(place), "{step:?} shares its weight or cache");
    }
}

#[test]
fn shapes_without_a_kernel_are_named() {
    let config = r#"{"num_hidden_layers": 1, "hidden_size": 60, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "rms_norm_eps": 1e-6, "rope_theta": 10000}"#;
    let error = Program::new(&typed(QWEN3, config), &mut Addresses::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`embedded`") && error.contains("60 elements"),
        "{error}"
    );
}
