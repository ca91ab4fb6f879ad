//! The megakernel on a GPU, from graph to tokens: compiled for the GPU at hand, loaded, and held against the CPU executor
//! of the same program, against transformers, and against itself.
//!
//! Needs NVRTC beside the GPU (`MIRAGE_NVRTC`, or where `mirage_compiler::nvrtc` looks).

mod device;
mod endings;
mod loading;
mod numerics;
mod refusals;
mod sameness;
mod tiny;
#[path = "../transformers/mod.rs"]
mod transformers;
