//! The runtime of mirage.
pub mod gpu;
