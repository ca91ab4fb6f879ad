//! Every stage of the graphs we ship, for several sizes and layouts of config.json.

use mirage_compiler::fuse::{FusedGraph, FusedOp};
use mirage_compiler::graph::Graph;
use mirage_compiler::ops::Load;
use mirage_compiler::typed::{ModelConfig, TypedGraph, ValueRef};

use crate::{LLAMA3, QWEN3, snapshot};

const QWEN3_8B: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}"#;

/// The layout of transformers 5: RoPE has an object of its own.
const QWEN3_32B: &str = r#"{
    "model_type": "qwen3", "hidden_act": "silu", "attention_bias": false, "head_dim": 128, "hidden_size": 5120,
    "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936
}"#;

const LLAMA3_8B: &str = r#"{
    "model_type": "llama", "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}
}"#;

/// The first Llama 3, which scales nothing.
const LLAMA3_8B_UNSCALED: &str = r#"{
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "rope_scaling": null, "vocab_size": 128256
}"#;

fn typed(graph: &str, file: &str, config: Option<&str>) -> TypedGraph {
    let graph = Graph::parse(graph, file).unwrap_or_else(|error| panic!("{error}"));
    let config = config.map_or(ModelConfig::none(), |text| {
        ModelConfig::parse(text, "config.json").unwrap()
    });
    let typed = TypedGraph::new(&graph, &config).unwrap_or_else(|error| panic!("{error}"));
    typed.verify().unwrap();
    typed
}

fn fused(typed: &TypedGraph) -> FusedGraph {
    let fused = FusedGraph::new(typed).unwrap_or_else(|error| panic!("{error}"));
    fused.verify().unwrap();
    fused
}

fn check(name: &str, graph: &str, file: &str, config: Option<&str>) {
    let typed = typed(graph, file, config);
    snapshot("typed", name, &typed.to_string());
    snapshot("fused", name, &fused(&typed).to_string());
}

#[test]
fn graphs() {
    snapshot(
        "graph",
        "qwen3",
        &Graph::parse(QWEN3, "graphs/qwen3.ron").unwrap().to_string(),
    );
    snapshot(
        "graph",
        "llama3",
        &Graph::parse(LLAMA3, "graphs/llama3.ron")
            .unwrap()
            .to_string(),
    );
}

#[test]
fn qwen3_sizes() {
    check("qwen3_0_6b", QWEN3, "graphs/qwen3.ron", None);
    check("qwen3_8b", QWEN3, "graphs/qwen3.ron", Some(QWEN3_8B));
    check("qwen3_32b", QWEN3, "graphs/qwen3.ron", Some(QWEN3_32B));
}

#[test]
fn llama3_sizes() {
    check("llama3_2_1b", LLAMA3, "graphs/llama3.ron", None);
    check("llama3_1_8b", LLAMA3, "graphs/llama3.ron", Some(LLAMA3_8B));
    check(
        "llama3_8b",
        LLAMA3,
        "graphs/llama3.ron",
        Some(LLAMA3_8B_UNSCALED),
    );
}

#[test]
fn a_layer_is_five_nodes_whose_spans_are_their_sources() {
    for (graph, file) in [(QWEN3, "graphs/qwen3.ron"), (LLAMA3, "graphs/llama3.ron")] {
        let fused = fused(&typed(graph, file, None));
        let names: Vec<_> = fused.layer.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["qkv", "attention", "o", "gate_up", "down"]);
        for node in &fused.layer {
            let written = &graph[..node.span.start];
            let id = written.rsplit('"').nth(1).unwrap();
            assert_eq!(node.sources[0], id, "{}", node.name);
        }
        // Every operator went into exactly one node.
        let mut sources: Vec<_> = fused.layer.iter().flat_map(|node| &node.sources).collect();
        let all = sources.len();
        sources.sort();
        sources.dedup();
        assert_eq!(
            (sources.len(), all),
            (all, typed(graph, file, None).layer.len())
        );
    }
}

#[test]
fn the_order_in_the_file_is_free() {
    let moved = "            \"down\": Linear(input: \"gated\", weight: \"model.layers.{layer}.mlp.down_proj.weight\", out: [\"hidden\"]),\n";
    assert!(QWEN3.contains(moved));
    let other = QWEN3.replace(moved, "").replace(
        "            \"attention_norm\": RmsNorm",
        &format!("{moved}            \"attention_norm\": RmsNorm"),
    );
    let (one, two) = (
        fused(&typed(QWEN3, "a", None)),
        fused(&typed(&other, "a", None)),
    );
    let names = |fused: &FusedGraph| {
        fused
            .layer
            .iter()
            .map(|node| node.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&one), names(&two));
}

#[test]
fn verify_refuses_what_was_changed_by_hand() {
    let good = fused(&typed(QWEN3, "a", None));
    let check = |what: &str, change: &dyn Fn(&mut FusedGraph), expect: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.verify().expect_err(what).to_string();
        assert!(error.contains(expect), "{what}: {error}");
    };
    check("a node less", &|g| drop(g.layer.pop()), "rule 2");
    check(
        "twice the same name",
        &|g| g.layer[1].name = "qkv".into(),
        "rule 6",
    );
    check("other width", &|g| g.hidden = 512, "rule");
    check(
        "other heads",
        &|g| {
            let FusedOp::Attention(attention) = &mut g.layer[1].op else {
                panic!()
            };
            attention.kv_heads = 3;
        },
        "rule 4",
    );
    check(
        "one part only",
        &|g| {
            let FusedOp::Linear(linear) = &mut g.layer[3].op else {
                panic!()
            };
            linear.parts.pop();
        },
        "rule 3",
    );
    check("no layers", &|g| g.layers = 0, "rule 6");
    check("another weight", &|g| g.head.parts[0].0 = 99, "rule");
}

#[test]
fn verify_refuses_a_typed_graph_that_was_changed_by_hand() {
    let good = typed(QWEN3, "a", None);
    let check = |what: &str, change: &dyn Fn(&mut TypedGraph), expect: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.verify().expect_err(what).to_string();
        assert!(error.contains(expect), "{what}: {error}");
    };
    check(
        "a later node",
        &|g| g.layer[0].inputs[0] = ValueRef::Node(5),
        "rule 1",
    );
    check(
        "tokens in the layer",
        &|g| g.layer[0].inputs[0] = ValueRef::Tokens,
        "rule 1",
    );
    check(
        "another type",
        &|g| g.layer[4].inputs[0] = ValueRef::State,
        "rule 2",
    );
    check(
        "an input less",
        &|g| g.layer[8].inputs.truncate(1),
        "rule 2",
    );
    check("another result", &|g| g.next = 1, "rule 2");
    check("no such result", &|g| g.next = 99, "rule 2");
    check("no weight", &|g| g.layer[0].weight = None, "rule 3");
    check(
        "no such weight",
        &|g| g.layer[0].weight = Some(99),
        "rule 3",
    );
    check(
        "a weight of another shape",
        &|g| g.weights[1].shape = vec![7],
        "rule 3",
    );
    check(
        "twice the same weight",
        &|g| g.weights[1].name = g.weights[0].name.clone(),
        "rule 3",
    );
    check("no end", &|g| drop(g.after.pop()), "rule 4");
}

#[test]
fn a_step_of_qwen3_0_6b_reads_its_weights_once() {
    let cost = typed(QWEN3, "a", None).cost(Load {
        tokens: 1,
        context: 64,
    });
    // All parameters, and one row of the tied table a second time.
    assert_eq!(cost.weight_bytes, 2 * (596_049_920 + 1024));
    // Every position of the cache is read, and one is written.
    assert_eq!(cost.cache_bytes, 28 * 2 * 2 * 8 * 128 * (64 + 1));
}
