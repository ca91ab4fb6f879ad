//! What the rewrites' tests share: a small layer, fused up to one rewrite and compared as text.

use super::REWRITES;
use super::draft::Draft;
use crate::graph::Graph;
use crate::typed::{ModelConfig, TypedGraph};

/// A graph around the operators of a layer, which starts from `x` and ends with `y`.
pub(super) fn graph_with(ops: &str) -> TypedGraph {
    let text = format!(
        r#"(
            name: "test",
            dims: {{
                "hidden": (keys: ["hidden_size"], default: 32),
                "ffn": (keys: ["intermediate_size"], default: 48),
            }},
            params: {{ "eps": (keys: ["rms_norm_eps"], default: 1e-6) }},
            before: {{ "e": Embedding(tokens: "tokens", weight: "e", rows: 10, columns: "hidden") }},
            layers: (repeat: 2, state: "x", first: "e", next: "y", ops: {{ {ops} }}),
            after: {{
                "logits": LmHead(input: "x", rows: 10, weight: "h", tied: true, tied_weight: "e"),
                "next": Sample(logits: "logits"),
            }},
        )"#
    );
    let graph = Graph::parse(&text, "test.ron").unwrap_or_else(|error| panic!("{error}"));
    TypedGraph::new(&graph, &ModelConfig::none()).unwrap_or_else(|error| panic!("{error}"))
}

/// Applies the rewrites up to and with the one named, and compares the layer.
pub(super) fn check(last: &str, ops: &str, expect: &str) {
    let graph = graph_with(ops);
    let mut draft = Draft::new(&graph.layer, Some(graph.next));
    let end = REWRITES
        .iter()
        .position(|rewrite| rewrite.name == last)
        .expect("a rewrite's name");
    for rewrite in &REWRITES[..=end] {
        (rewrite.apply)(&mut draft);
    }
    assert_eq!(draft.to_string(), expect);
}
