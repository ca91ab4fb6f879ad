//! The reference executor against Hugging Face transformers in float32: `fixtures/reference_logits.py` made the numbers.

use std::error::Error;

use mirage_compiler::graph::Graph;
use mirage_compiler::reference::{Reference, ReferenceError, Sequence, Tensor, WeightSource};
use mirage_compiler::typed::{ModelConfig, TypedGraph};

use crate::{LLAMA3, QWEN3};

/// What the Python script wrote.
#[derive(serde::Deserialize)]
struct Fixture {
    config: serde_json::Value,
    tokens: Vec<u32>,
    /// One row of the vocabulary for each token.
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

/// Weights made from their name and shape alone, by the same rule as in the script.
struct Made {
    shapes: Vec<(String, Vec<usize>)>,
}

impl Made {
    fn new(graph: &TypedGraph) -> Self {
        let names = |weight: &mirage_compiler::typed::TypedWeight| {
            let copies = if weight.per_layer() { graph.layers } else { 1 };
            (0..copies)
                .map(|layer| (weight.name_in(layer), weight.shape.clone()))
                .collect::<Vec<_>>()
        };
        Self {
            shapes: graph.weights.iter().flat_map(names).collect(),
        }
    }
}

impl WeightSource for Made {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, Box<dyn Error + Send + Sync>> {
        let (_, shape) = self
            .shapes
            .iter()
            .find(|(known, _)| known == name)
            .ok_or("there is no such tensor")?;
        let offset = if name.contains("norm") { 1.0 } else { 0.0 };
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let value = |index: u64| {
            // splitmix64; its top 24 bits make a number of [-0.25, 0.25) that f32 holds exactly.
            let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            offset + ((z >> 40) as f32 / 16_777_216.0 - 0.5) * 0.5
        };
        let elements = shape.iter().product::<usize>() as u64;
        Ok(Tensor {
            shape: shape.clone(),
            data: (0..elements).map(value).collect::<Vec<_>>().into(),
        })
    }
}

fn typed(graph: &str, config: &serde_json::Value) -> TypedGraph {
    let graph = Graph::parse(graph, "graph.ron").unwrap_or_else(|error| panic!("{error}"));
    let config = ModelConfig::parse(&config.to_string(), "config.json").unwrap();
    TypedGraph::new(&graph, &config).unwrap_or_else(|error| panic!("{error}"))
}

fn check(graph: &str, fixture: &str) {
    let fixture: Fixture = serde_json::from_str(fixture).unwrap();
    let typed = typed(graph, &fixture.config);
    let made = Made::new(&typed);
    let reference = Reference::new(&typed, &made).unwrap();
    let logits = reference.logits(&fixture.tokens).unwrap();
    assert_eq!(logits.len(), fixture.logits.len());
    let largest = fixture
        .logits
        .iter()
        .flatten()
        .fold(0.0_f32, |m, x| m.max(x.abs()));
    for (position, (ours, theirs)) in logits.iter().zip(&fixture.logits).enumerate() {
        assert_eq!(ours.len(), theirs.len());
        let error = ours
            .iter()
            .zip(theirs)
            .fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(
            error <= 2e-5 * largest,
            "position {position}: {error} of {largest}"
        );
    }
    assert_eq!(
        reference
            .greedy(&fixture.tokens, fixture.greedy.len())
            .unwrap(),
        fixture.greedy
    );
}

#[test]
fn qwen3_is_transformers_qwen3() {
    check(QWEN3, include_str!("fixtures/qwen3.json"));
}

#[test]
fn llama3_is_transformers_llama() {
    check(LLAMA3, include_str!("fixtures/llama3.json"));
}

fn small() -> TypedGraph {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/qwen3.json")).unwrap();
    typed(QWEN3, &fixture.config)
}

#[test]
fn sequences_do_not_know_each_other() {
    let typed = small();
    let made = Made::new(&typed);
    let reference = Reference::new(&typed, &made).unwrap();
    let (mut a, mut b) = (Sequence::default(), Sequence::default());
    let alone = reference.logits(&[1, 2, 3]).unwrap();
    for (index, token) in [1, 2, 3].into_iter().enumerate() {
        assert_eq!(reference.step(&mut a, token).unwrap(), alone[index]);
        reference.step(&mut b, 7).unwrap();
    }
}

#[test]
fn errors() {
    let typed = small();
    let made = Made::new(&typed);
    let reference = Reference::new(&typed, &made).unwrap();
    assert!(matches!(
        reference.logits(&[1_000_000]),
        Err(ReferenceError::Token(1_000_000))
    ));
    assert!(matches!(
        reference.greedy(&[], 1),
        Err(ReferenceError::EmptyPrompt)
    ));
    let mut other = Made::new(&typed);
    other.shapes[0].1[0] += 1;
    assert!(matches!(
        Reference::new(&typed, &other),
        Err(ReferenceError::Shape { .. })
    ));
    other.shapes.remove(0);
    assert!(matches!(
        Reference::new(&typed, &other),
        Err(ReferenceError::Weight { .. })
    ));
}
