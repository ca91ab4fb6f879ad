//! The tiny model of this repository, and `models/tiny/expected.json`: what transformers makes of it in f32.

use std::path::PathBuf;

use serde::Deserialize;

use crate::model::{Model, QWEN3};

/// One prompt with n tokens and its continuation of g tokens.
#[derive(Deserialize)]
pub struct Expected {
    /// What the prompt is called.
    pub name: String,
    /// The prompt.
    pub text: String,
    /// Its tokens, `[n]`.
    pub ids: Vec<u32>,
    /// The likeliest continuation, `[g]`.
    pub greedy: Vec<u32>,
    /// The same as text.
    pub greedy_text: String,
    /// The likeliest token at each position, `[n + g]`.
    pub argmax: Vec<u32>,
    /// Its logit.
    pub max_logit: Vec<f32>,
    /// How far the second logit is below it.
    margin: Vec<f32>,
    /// The largest error of a logit over the vocabulary when transformers calculates in bf16.
    pub bf16_noise: Vec<f32>,
    /// Of the logits after the prompt: the highest, or all.
    top_ids: Vec<u32>,
    top_logits: Vec<f32>,
    #[serde(default)]
    logits: Vec<f32>,
}

impl Expected {
    /// Prompt and continuation.
    pub fn whole(&self) -> Vec<u32> {
        self.ids.iter().chain(&self.greedy).copied().collect()
    }

    /// Whether every logit within the noise leaves the same token the likeliest.
    pub fn is_decided(&self, position: usize) -> bool {
        self.margin[position] > 2.0 * self.bf16_noise[position]
    }

    /// The logits after the prompt that are known, with their tokens.
    pub fn known(&self) -> impl Iterator<Item = (u32, f32)> {
        let top = self.top_ids.iter().copied().zip(self.top_logits.clone());
        top.chain((0..).zip(self.logits.clone()))
    }
}

/// The tiny model's folder.
pub fn tiny_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))
}

/// The tiny model.
pub fn tiny() -> Model {
    Model::open(QWEN3, &tiny_dir())
}

/// All prompts; the last one is long.
pub fn expected() -> Vec<Expected> {
    #[derive(Deserialize)]
    struct File {
        prompts: Vec<Expected>,
    }
    let text = std::fs::read_to_string(tiny_dir().join("expected.json")).unwrap();
    let file: File = serde_json::from_str(&text).unwrap();
    assert!(file.prompts.len() > 4);
    file.prompts
}
