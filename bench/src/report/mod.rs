//! The reports: a run's [`Results`](crate::results::Results) as text, markdown, one HTML page, and JSON.
//!
//! Owns formatting. It must not compute a result: whatever it prints is in the results already.

pub mod format;
pub mod html;
pub mod json;
mod lines;
pub mod markdown;
pub mod svg;
pub mod text;

#[cfg(test)]
pub(crate) mod tests;
