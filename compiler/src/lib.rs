//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
pub mod arch;
pub mod cubin_cache;
pub mod diagnostics;
pub mod fuse;
pub mod nvrtc;
