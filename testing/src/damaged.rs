//! Checkpoints with one thing wrong.

use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use crate::model::Model;

/// What is wrong.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// A tensor is not there.
    Missing(&'static str),
    /// A matrix is `[columns, rows]`.
    Transposed(&'static str),
    /// The file ends so many bytes early.
    Truncated(usize),
}

/// Damages that are found when a program asks for the tensor, and what the error says. For a Qwen3 of at least two layers.
pub const CASES: [(Damage, &str); 3] = [
    (
        Damage::Missing("model.layers.1.mlp.up_proj.weight"),
        "the checkpoint has no tensor model.layers.1.mlp.up_proj.weight",
    ),
    (
        Damage::Missing("model.norm.weight"),
        "the checkpoint has no tensor model.norm.weight",
    ),
    (
        Damage::Transposed("model.layers.0.self_attn.q_proj.weight"),
        "tensor model.layers.0.self_attn.q_proj.weight has shape [80, 384], but [384, 80] is expected",
    ),
];

/// The folder of a damaged copy of a model's checkpoint.
pub fn damaged(model: &Model, damage: Damage) -> TempDir {
    let from = model.as_ref();
    let dir = tempfile::tempdir().unwrap();
    fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let to = dir.path().join("model.safetensors");
    if let Damage::Truncated(by) = damage {
        fs::write(to, &bytes[..bytes.len() - by]).unwrap();
        return dir;
    }
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.len();
    let mut changed = 0;
    let views: Vec<(String, TensorView<'_>)> = tensors
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| match damage {
            Damage::Missing(missing) if name == missing => None,
            Damage::Transposed(transposed) if name == transposed => {
                changed += 1;
                let shape = view.shape().iter().rev().copied().collect();
                let view = TensorView::new(view.dtype(), shape, view.data()).unwrap();
                Some((name, view))
            }
            _ => Some((name, view)),
        })
        .collect();
    assert_eq!(changed + all - views.len(), 1, "{damage:?} damages nothing");
    safetensors::serialize_to_file(views, None, &to).unwrap();
    dir
}
