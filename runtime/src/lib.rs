//! The runtime of mirage.

pub mod baseline;
pub mod checkpoint;
pub mod gpu;
pub mod sampler;
pub mod tokenizer;
