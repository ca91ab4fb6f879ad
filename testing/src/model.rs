//! Small models with random weights: a graph with the sizes of a config.json, and a checkpoint for it on disk.

use std::path::{Path, PathBuf};

use half::bf16;
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::typed::{ModelConfig, TypedGraph};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use crate::random::Random;

/// The graph of Qwen3.
pub const QWEN3: &str = include_str!("../../graphs/qwen3.ron");
/// The graph of Llama 3.
pub const LLAMA3: &str = include_str!("../../graphs/llama3.ron");

/// Sizes of a model. Heads have 64 elements.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Layers.
    pub layers: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Elements between up and down.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Whether the head's weight is the embedding table.
    pub tied: bool,
}

/// Nothing divides evenly: 5 tiles of the stream, 7 of the ffn, 75 tokens, three query heads to a KV head.
pub const SIZES: Sizes = Sizes {
    layers: 2,
    hidden: 80,
    ffn: 112,
    heads: 6,
    kv_heads: 2,
    vocab: 75,
    tied: true,
};

/// A model with the folder of its checkpoint (`AsRef<Path>`), which lives as long as the model does.
pub struct Model {
    /// The text of its graph.
    pub graph: &'static str,
    /// The graph with its sizes.
    pub typed: TypedGraph,
    /// The same, fused.
    pub fused: FusedGraph,
    dir: PathBuf,
    /// The folder of a checkpoint made here.
    _made: Option<TempDir>,
}

impl Model {
    /// A graph with the sizes of a `config.json` and random weights.
    pub fn random(graph: &'static str, config: &str) -> Model {
        let made = tempfile::tempdir().unwrap();
        std::fs::write(made.path().join("config.json"), config).unwrap();
        let mut model = Model::open(graph, made.path());
        write_weights(&model.typed, made.path());
        model._made = Some(made);
        model
    }

    /// A graph with the sizes of a checkpoint that is there.
    pub(crate) fn open(graph: &'static str, dir: &Path) -> Model {
        let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let config = ModelConfig::parse(&config, "config.json").unwrap();
        let typed = TypedGraph::new(&Graph::parse(graph, "graph.ron").unwrap(), &config);
        let typed = typed.unwrap_or_else(|error| panic!("{error}"));
        Model {
            graph,
            fused: FusedGraph::new(&typed).unwrap(),
            typed,
            dir: dir.to_path_buf(),
            _made: None,
        }
    }
}

impl AsRef<Path> for Model {
    fn as_ref(&self) -> &Path {
        &self.dir
    }
}

/// A Qwen3: q and k normed, head tied or not.
pub fn qwen3(sizes: Sizes) -> Model {
    Model::random(
        QWEN3,
        &config(sizes, r#""model_type": "qwen3", "rope_theta": 10000.0"#),
    )
}

/// A Llama with scaled rotary frequencies, low ones among them at these contexts.
pub fn llama3(sizes: Sizes) -> Model {
    let extra = r#""model_type": "llama", "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#;
    Model::random(LLAMA3, &config(sizes, extra))
}

fn config(sizes: Sizes, extra: &str) -> String {
    let Sizes {
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        vocab,
        tied,
    } = sizes;
    format!(
        r#"{{{extra}, "num_hidden_layers": {layers}, "hidden_size": {hidden}, "intermediate_size": {ffn},
        "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": 64, "vocab_size": {vocab},
        "rms_norm_eps": 1e-6, "tie_word_embeddings": {tied}}}"#
    )
}

/// Writes every weight of the graph, in bf16.
fn write_weights(typed: &TypedGraph, dir: &Path) {
    let mut random = Random::new(7);
    let mut tensors = Vec::new();
    for weight in &typed.weights {
        let copies = if weight.per_layer() { typed.layers } else { 1 };
        for layer in 0..copies {
            let elements: usize = weight.shape.iter().product();
            let mut value = || match weight.shape[..] {
                // Products of the size of their inputs; factors around 1.
                [_, columns] => 1.7 * random.number() / (columns as f32).sqrt(),
                _ => 1.0 + 0.5 * random.number(),
            };
            let bytes: Vec<u8> = (0..elements)
                .flat_map(|_| bf16::from_f32(value()).to_le_bytes())
                .collect();
            tensors.push((weight.name_in(layer), weight.shape.clone(), bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), bytes);
        (name, view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}
