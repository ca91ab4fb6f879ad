//! Small models with random weights for tests: a graph with the sizes of a config.json, a checkpoint for it on disk, and
//! the programs that plans of many kinds make of it.
//!
//! No part of the library: unit tests have it as a module, and the tests beside `src` include this file
//! (`tests/common/mod.rs`), so it must use nothing of this crate that is not public.

use std::path::Path;

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::mesh::{Mesh, Placement, Split};
use mirage_compiler::plan::{Plan, StreamForm, Target};
use mirage_compiler::program::Program;
use mirage_compiler::reference::{Tensor, WeightSource};
use mirage_compiler::typed::{ModelConfig, TypedGraph};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use crate::checkpoint::Checkpoint;

pub(crate) const QWEN3: &str = include_str!("../../graphs/qwen3.ron");
pub(crate) const LLAMA3: &str = include_str!("../../graphs/llama3.ron");

/// Sizes of a model. Heads have 64 elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) vocab: usize,
    pub(crate) tied: bool,
}

/// A model with its checkpoint, whose files live as long as the model does.
pub(crate) struct Model {
    pub(crate) typed: TypedGraph,
    pub(crate) fused: FusedGraph,
    pub(crate) checkpoint: Checkpoint,
    /// The folder of a checkpoint made here.
    _dir: Option<TempDir>,
}

/// A Qwen3: q and k normed, head tied or not.
pub(crate) fn qwen3(sizes: Sizes) -> Model {
    model(
        QWEN3,
        &config(sizes, r#""model_type": "qwen3", "rope_theta": 10000.0"#),
    )
}

/// A Llama with scaled rotary frequencies, low ones among them at these contexts.
pub(crate) fn llama3(sizes: Sizes) -> Model {
    let extra = r#""model_type": "llama", "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#;
    model(LLAMA3, &config(sizes, extra))
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

/// A graph with the sizes of a config.json.
fn stages(graph: &str, config: &str) -> (TypedGraph, FusedGraph) {
    let graph = Graph::parse(graph, "graph.ron").unwrap();
    let typed = TypedGraph::new(&graph, &ModelConfig::parse(config, "config.json").unwrap());
    let typed = typed.unwrap_or_else(|error| panic!("{error}"));
    let fused = FusedGraph::new(&typed).unwrap();
    (typed, fused)
}

fn model(graph: &str, config: &str) -> Model {
    let (_, fused) = stages(graph, config);
    let mut random = Random(7);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = fused
        .weights
        .iter()
        .flat_map(|weight| {
            let copies = if weight.name.contains("{layer}") {
                fused.layers
            } else {
                1
            };
            (0..copies).map(|layer| {
                (
                    weight.name.replace("{layer}", &layer.to_string()),
                    &weight.shape,
                )
            })
        })
        .map(|(name, shape)| {
            let elements: usize = shape.iter().product();
            let mut value = || match shape[..] {
                // Products of the size of their inputs; factors around 1.
                [_, columns] => 1.7 * random.next() / (columns as f32).sqrt(),
                _ => 1.0 + 0.5 * random.next(),
            };
            let bytes = (0..elements)
                .flat_map(|_| half::bf16::from_f32(value()).to_le_bytes())
                .collect();
            (name, shape.clone(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap(),
        )
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let opened = open(graph, dir.path());
    Model {
        _dir: Some(dir),
        ..opened
    }
}

/// A graph with the sizes and the weights of a checkpoint.
pub(crate) fn open(graph: &str, dir: &Path) -> Model {
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let (typed, fused) = stages(graph, &config);
    Model {
        typed,
        fused,
        checkpoint: Checkpoint::open(dir).unwrap(),
        _dir: None,
    }
}

impl WeightSource for Model {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, Box<dyn std::error::Error + Send + Sync>> {
        let tensor = self.checkpoint.tensor(name)?;
        let mut data = vec![0.0; tensor.rows() * tensor.columns()];
        for (row, out) in data.chunks_exact_mut(tensor.columns()).enumerate() {
            tensor.read_f32(row, 0, out)?;
        }
        Ok(Tensor {
            shape: tensor.shape().to_vec(),
            data: data.into(),
        })
    }
}

/// Numbers from -1 to 1 (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count)
            .map(|_| (self.bits() % vocab as u64) as u32)
            .collect()
    }
}

/// A target of so many SMs.
pub(crate) fn target(sms: u32, batch: usize, max_seq: usize) -> Target {
    let gpu = GpuModel {
        sms,
        ..GpuModel::default_for(Arch::Sm90a)
    };
    Target {
        gpu,
        batch,
        max_seq,
    }
}

/// The program that the planner makes.
pub(crate) fn planned(model: &Model, target: &Target) -> Program {
    Plan::search(&model.fused, target).unwrap().1
}

/// What a plan by hand decides; the planner would not choose most of these, but executors must run them all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) groups: usize,
    pub(crate) members: usize,
    /// CTAs that only help with the head.
    pub(crate) helpers: usize,
    /// Placement of the linears that write the residual stream.
    pub(crate) writers: Placement,
    pub(crate) stream: StreamForm,
    pub(crate) kv_splits: usize,
    /// Of decode steps; the writers split their columns over the groups then.
    pub(crate) replicate_below: usize,
    pub(crate) heads_per_task: usize,
    pub(crate) prefill_columns: usize,
}

impl Choice {
    /// The program of this plan.
    pub(crate) fn program(&self, model: &Model, batch: usize, max_seq: usize) -> Program {
        let gpu = GpuModel::default_for(Arch::Sm90a);
        self.program_on(gpu, model, batch, max_seq)
    }

    /// The program of this plan, on some SMs of a GPU.
    pub(crate) fn program_on(
        &self,
        gpu: GpuModel,
        model: &Model,
        batch: usize,
        max_seq: usize,
    ) -> Program {
        let ctas = self.groups * self.members + self.helpers;
        let sms = ctas as u32;
        let target = Target {
            gpu: GpuModel { sms, ..gpu },
            batch,
            max_seq,
        };
        let (mut plan, _) = Plan::search(&model.fused, &target).unwrap();
        plan.mesh = Mesh {
            groups: self.groups,
            members: self.members,
            ctas,
        };
        let rows = Placement {
            groups: Split::Rows,
            members: Split::Rows,
        };
        // q, k and v; attention; o; gate and up; down.
        plan.placements = vec![
            Some(rows),
            None,
            Some(self.writers),
            Some(rows),
            Some(self.writers),
        ];
        plan.heads_per_task = self.heads_per_task;
        plan.prefill.columns = self.prefill_columns;
        for step in [&mut plan.prefill, &mut plan.decode] {
            step.stream = self.stream;
            step.kv_splits = self.kv_splits;
        }
        plan.decode.replicate_below = self.replicate_below;
        plan.verify(&model.fused).unwrap();
        Program::new(&model.fused, &plan, &target).unwrap()
    }

    /// Every placement of the writers with both forms of the stream, on meshes of several shapes.
    pub(crate) fn all() -> Vec<Choice> {
        let mut all = Vec::new();
        for (i, writers) in Placement::ALL.into_iter().enumerate() {
            for (j, stream) in [StreamForm::Replicated, StreamForm::Scattered]
                .into_iter()
                .enumerate()
            {
                let odd = (i + j) % 2;
                let by_rows = writers.groups == Split::Rows && writers.members == Split::Rows;
                all.push(Choice {
                    groups: [2, 1][odd],
                    // A stream of five tiles has rows for five workers.
                    members: [if by_rows { 2 } else { 3 }, 5][odd],
                    helpers: [3, 0, 1][(i + 2 * j) % 3],
                    writers,
                    stream,
                    kv_splits: [1, 3, 2][(2 * i + j) % 3],
                    replicate_below: match writers.groups {
                        Split::Columns => [5, 0][j],
                        Split::Rows => 0,
                    },
                    heads_per_task: [3, 1][j],
                    prefill_columns: [4, 8, 1, 16][i],
                });
            }
        }
        all
    }
}
