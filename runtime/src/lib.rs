//! The runtime of mirage: loads a checkpoint and runs a compiled program, on a GPU or on CPU threads.
//!
//! Owns everything outside the compiler: files of weights and text ([`checkpoint`], [`tokenizer`]), the order of weights
//! in memory ([`pack`]), devices ([`gpu`]), the definition of sampling ([`sampler`]), and what runs a program behind one
//! trait ([`generate::Executor`]): [`megakernel`] and [`cpu`]. Beside them stands [`baseline`], which runs the unfused graph
//! on the GPU for comparison; it is the only one that sees a graph.
//!
//! ```
//! use mirage_compiler::arch::GpuModel;
//! use mirage_compiler::{driver, plan::Target, typed::ModelConfig};
//! use mirage_runtime::generate::{Executor, GenerateRequest};
//! use mirage_runtime::{checkpoint::Checkpoint, cpu::CpuModel, tokenizer::Tokenizer};
//!
//! let folder = std::path::Path::new("../models/tiny");
//! let config = ModelConfig::parse(&std::fs::read_to_string(folder.join("config.json"))?, "config.json")?;
//! let graph = include_str!("../../graphs/qwen3.ron");
//! let target = Target { gpu: GpuModel::cpu(), batch: 1, max_seq: 64 };
//! let program = driver::compile(graph, "graphs/qwen3.ron", &config, &target)?.program;
//!
//! let mut model = CpuModel::load(program, &Checkpoint::open(folder)?)?;
//! let tokenizer = Tokenizer::open(folder)?;
//! let prompt = tokenizer.encode("It was a fine morning")?;
//! let generated = model.generate_all(&[GenerateRequest::greedy(prompt, 4)])?;
//! assert_eq!(generated[0].tokens.len(), 4);
//! println!("{}", tokenizer.decode(&generated[0].tokens)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod baseline;
pub mod checkpoint;
pub mod cpu;
pub mod generate;
pub mod gpu;
pub mod megakernel;
pub mod pack;
pub mod sampler;
pub mod tokenizer;
