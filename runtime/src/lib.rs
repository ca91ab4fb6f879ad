//! The runtime of mirage.

pub mod checkpoint;
pub mod cpu;
pub mod generate;
pub mod gpu;
pub mod pack;
pub mod sampler;
#[cfg(test)]
mod testing;
pub mod tokenizer;
