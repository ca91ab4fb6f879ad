//! The mirage compiler: a decoder's operator graph in, one persistent CUDA kernel out.
//!
//! The front end, from text to the graph that the planner lays out, is three calls:
//!
//! ```
//! use mirage_compiler::{fuse::FusedGraph, graph::Graph, typed::{ModelConfig, TypedGraph}};
//!
//! let text = include_str!("../../graphs/qwen3.ron");
//! let graph = Graph::parse(text, "graphs/qwen3.ron")?;
//! let typed = TypedGraph::new(&graph, &ModelConfig::none())?;
//! let fused = FusedGraph::new(&typed)?;
//! assert_eq!(fused.layers, 28);
//! # Ok::<(), mirage_compiler::diagnostics::Diagnostics>(())
//! ```
pub mod arch;
pub mod cubin_cache;
pub mod diagnostics;
pub mod fuse;
pub mod graph;
pub mod nvrtc;
pub mod ops;
pub mod typed;
