//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
pub mod diagnostics;
pub mod fuse;
pub mod arch;
pub mod cost;
pub mod mesh;
pub mod plan;
pub mod program;
pub mod emit;
