//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
//!
//! The front end, from text to the graph that the planner lays out, is three calls; planning and lowering one more:
//!
//! ```
//! use mirage_compiler::{
//!     arch::{Arch, GpuModel},
//!     emit::cuda_source,
//!     fuse::FusedGraph,
//!     graph::Graph,
//!     plan::{Plan, Target},
//!     typed::{ModelConfig, TypedGraph},
//! };
//!
//! let text = include_str!("../../graphs/qwen3.ron");
//! let graph = Graph::parse(text, "graphs/qwen3.ron")?;
//! let typed = TypedGraph::new(&graph, &ModelConfig::none())?;
//! let fused = FusedGraph::new(&typed)?;
//! let target = Target { gpu: GpuModel::default_for(Arch::Sm90a), batch: 1, max_seq: 4096 };
//! let (plan, program) = Plan::search(&fused, &target)?;
//! let source = cuda_source(&program, Arch::Sm90a);
//! assert_eq!(plan.mesh.workers(), 128);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
pub mod arch;
pub mod cost;
pub mod cubin_cache;
pub mod diagnostics;
pub mod emit;
pub mod fuse;
pub mod graph;
pub mod mesh;
pub mod nvrtc;
pub mod ops;
pub mod plan;
pub mod program;
pub mod reference;
pub mod typed;
