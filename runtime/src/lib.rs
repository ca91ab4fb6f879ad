//! The runtime of mirage.
