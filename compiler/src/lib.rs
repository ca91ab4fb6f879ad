//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
//!
//! [`driver::compile`] runs all stages; each is a type of its own, made only from the one before:
//!
//! ```
//! use mirage_compiler::arch::{Arch, GpuModel};
//! use mirage_compiler::{driver, plan::Target, typed::ModelConfig};
//!
//! let text = include_str!("../../graphs/qwen3.ron");
//! let target = Target { gpu: GpuModel::default_for(Arch::Sm90a), batch: 1, max_seq: 4096 };
//! let done = driver::compile(text, "graphs/qwen3.ron", &ModelConfig::none(), &target)?;
//! assert_eq!(done.plan.mesh.workers(), 128);
//! println!("{}\n{}", done.program, done.source.text);
//! # Ok::<(), driver::CompileError>(())
//! ```
//!
//! [`driver::Compilation::build`] makes the cubin, and [`artifact::Artifact`] is what the runtime loads.
pub mod arch;
pub mod artifact;
pub mod calibration;
pub mod cost;
pub mod cubin_cache;
pub mod diagnostics;
pub mod driver;
pub mod emit;
pub mod fuse;
pub mod graph;
pub mod input;
pub mod mesh;
pub mod nvrtc;
pub mod ops;
pub mod plan;
pub mod profile;
pub mod program;
pub mod reference;
pub mod typed;
