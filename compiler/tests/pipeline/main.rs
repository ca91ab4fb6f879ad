//! From a graph to a kernel: plans, programs and CUDA source for many models, GPUs and batches.
//!
//! Snapshots lie under `snapshots/` at the top of the repository, a folder for each stage; `INSTA_UPDATE=always` accepts
//! what changed.

mod kernels;
mod models;
mod planner;
mod stages;
