//! The runtime of mirage.

pub mod baseline;
pub mod checkpoint;
pub mod cpu;
pub mod generate;
pub mod gpu;
pub mod megakernel;
pub mod pack;
pub mod sampler;
#[cfg(test)]
mod testing;
pub mod tokenizer;
