//! The runtime of mirage.

pub mod checkpoint;
pub mod gpu;
pub mod sampler;
pub mod tokenizer;
