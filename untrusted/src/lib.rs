//! What mirage makes of input from outside, as functions of bytes.
//!
//! Owns the fuzz targets' bodies, the seeds' place, a small mutator, and the run that both the tests and long runs use. It
//! must not depend on a fuzzer: `fuzz/` is the same for libFuzzer, and calls [`Target::run`].
//!
//! A body panics where mirage breaks a promise: input may be refused, with words, but never panic, hang, take more memory
//! than [`memory::LIMIT`], read outside of its folder, or be called a fault of the compiler.

pub mod memory;
mod mutate;
mod round;
mod targets;

pub use mutate::Mutator;
pub use round::{Round, Seeds};
pub use targets::{TARGETS, Target};
