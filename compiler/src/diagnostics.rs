//! Diagnostics: one clear error with the place, the rule and the mend.

use serde::{Deserialize, Serialize};

/// A byte range of the graph file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}
