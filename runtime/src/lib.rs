//! The runtime of mirage.

pub mod checkpoint;
pub mod sampler;
pub mod tokenizer;
