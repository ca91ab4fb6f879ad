//! What tests of several packages share: small models with random weights, damaged ones, programs of plans of many kinds,
//! and the tiny model with what transformers makes of it.
//!
//! It must not depend on the runtime, whose unit tests use it: to them the runtime's types would be others than their own.
//! So a checkpoint is a folder here, and whoever tests opens it. Everything panics where it fails, as tests do.

mod damaged;
mod expected;
mod logits;
mod model;
mod programs;
mod random;

pub use damaged::{CASES, Damage, damaged};
pub use expected::{Expected, expected, tiny, tiny_dir};
pub use logits::{BOUND, MEAN_BOUND, behind, error};
pub use model::{LLAMA3, Model, QWEN3, SIZES, Sizes, llama3, qwen3};
pub use programs::{Choice, planned, target};
pub use random::{Random, prompts};
