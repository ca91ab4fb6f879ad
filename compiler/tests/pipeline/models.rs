//! The models and targets that the tests compile.

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::plan::{Plan, PlanError, Target};
use mirage_compiler::program::Program;
use mirage_compiler::typed::{ModelConfig, TypedGraph};

const QWEN3: &str = include_str!("../../../graphs/qwen3.ron");
const LLAMA3: &str = include_str!("../../../graphs/llama3.ron");
const TINY: &str = include_str!("../../../models/tiny/config.json");

/// Sizes of a Qwen3: layers, hidden, ffn, heads; 8 KV heads of 128 elements and 151936 tokens they have in common.
const QWEN3_SIZES: [(&str, [usize; 4], bool); 6] = [
    ("0.6B", [28, 1024, 3072, 16], true),
    ("1.7B", [28, 2048, 6144, 16], true),
    ("4B", [36, 2560, 9728, 32], true),
    ("8B", [36, 4096, 12288, 32], false),
    ("14B", [40, 5120, 17408, 40], false),
    ("32B", [64, 5120, 25600, 64], false),
];

/// The fused graph of a model by name: a Qwen3 by its size, `llama3` for Llama-3.2-1B, or `tiny`.
pub(crate) fn model(name: &str) -> FusedGraph {
    let (text, config) = match name {
        "llama3" => (LLAMA3, ModelConfig::none()),
        "tiny" => (QWEN3, parse(TINY)),
        _ => (QWEN3, parse(&qwen3_config(name))),
    };
    let graph = Graph::parse(text, "graph.ron").unwrap_or_else(|error| panic!("{error}"));
    let typed = TypedGraph::new(&graph, &config).unwrap_or_else(|error| panic!("{name}: {error}"));
    FusedGraph::new(&typed).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn parse(config: &str) -> ModelConfig {
    ModelConfig::parse(config, "config.json").unwrap_or_else(|error| panic!("{error}"))
}

/// What matters of a Qwen3's config.json.
fn qwen3_config(size: &str) -> String {
    let (_, [layers, hidden, ffn, heads], tied) = QWEN3_SIZES
        .into_iter()
        .find(|(name, ..)| *name == size)
        .unwrap_or_else(|| panic!("no Qwen3 of size {size}"));
    format!(
        r#"{{
            "model_type": "qwen3", "hidden_act": "silu", "attention_bias": false, "head_dim": 128,
            "num_hidden_layers": {layers}, "hidden_size": {hidden}, "intermediate_size": {ffn},
            "num_attention_heads": {heads}, "num_key_value_heads": 8, "vocab_size": 151936,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": {tied}
        }}"#
    )
}

/// The GPU that is planned for where only an architecture is named.
pub(crate) fn target(arch: Arch, batch: usize) -> Target {
    Target {
        gpu: GpuModel::default_for(arch),
        batch,
        max_seq: 4096,
    }
}

/// Plan and program of a model; both verified.
pub(crate) fn compile(name: &str, arch: Arch, batch: usize) -> (Plan, Program) {
    try_compile(name, arch, batch)
        .unwrap_or_else(|error| panic!("{name}, {arch}, batch {batch}: {error}"))
}

/// Plan and program of a model, both verified, or why there are none.
pub(crate) fn try_compile(
    name: &str,
    arch: Arch,
    batch: usize,
) -> Result<(Plan, Program), PlanError> {
    let (graph, target) = (model(name), target(arch, batch));
    let what = format!("{name}, {}, batch {batch}", target.gpu.name);
    let (plan, program) = Plan::search(&graph, &target)?;
    plan.verify(&graph)
        .unwrap_or_else(|error| panic!("{what}: {error}\n{plan}"));
    program
        .verify()
        .unwrap_or_else(|error| panic!("{what}: {error}\n{plan}\n{program}"));
    program
        .fits(&target.gpu)
        .unwrap_or_else(|error| panic!("{what}: {error}\n{program}"));
    Ok((plan, program))
}
