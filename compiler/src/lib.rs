//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
pub mod diagnostics;
pub mod fuse;
