//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
pub mod arch;
pub mod cost;
pub mod cubin_cache;
pub mod diagnostics;
pub mod emit;
pub mod fuse;
pub mod mesh;
pub mod nvrtc;
pub mod plan;
pub mod program;
