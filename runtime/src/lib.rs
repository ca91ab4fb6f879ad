//! The runtime of mirage.

pub mod checkpoint;
