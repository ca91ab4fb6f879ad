//! How large a graph may be.
//!
//! Owns the limits and their errors. Real graphs have some thirty operators; the limits are far above, and low enough that
//! whatever later stages do with the parts of a graph, pairs of them included, ends soon.

use serde::de::IgnoredAny;

use super::read::{Entries, Spanned};
use super::{File, Graph, check};
use crate::diagnostics::{Diagnostic, Span};
use crate::input::MAX_TEXT;

/// Most operators of the three sections together.
pub const MAX_OPERATORS: usize = 256;
/// Most dims and params together.
pub const MAX_SYMBOLS: usize = 256;
/// Longest list inside of an entry: keys of config.json, values that are expected of one, dimensions of a result.
pub const MAX_LIST: usize = 64;
/// Longest name of a weight, in bytes. Those of checkpoints have some 60.
pub const MAX_WEIGHT_NAME: usize = 256;

/// Refuses a text before anything is made of it.
pub(super) fn check_text(text: &str) -> Result<(), Diagnostic> {
    let start = Span { start: 0, end: 1 };
    at_most("bytes of text", text.len(), MAX_TEXT, start)
}

/// Counts what is read one by one afterwards.
pub(super) fn check_file(file: &File) -> Result<(), Diagnostic> {
    let sections = [&file.before, &file.layers.ops, &file.after];
    let operators: usize = sections.iter().map(|Entries(list)| list.len()).sum();
    let last = |entries: &Entries<Spanned<IgnoredAny>>| entries.0.last().map(|(id, _)| id.span);
    let place = sections
        .into_iter()
        .filter_map(last)
        .max_by_key(|span| span.start);
    at_most(
        "operators",
        operators,
        MAX_OPERATORS,
        place.unwrap_or(file.name.span),
    )?;
    let symbols = [Some(&file.dims), file.params.as_ref()];
    let symbols: Vec<_> = symbols
        .into_iter()
        .flatten()
        .flat_map(|Entries(list)| list)
        .collect();
    let place = symbols.last().map_or(file.name.span, |(name, _)| name.span);
    at_most("dims and params", symbols.len(), MAX_SYMBOLS, place)?;
    for (name, origin) in symbols {
        at_most("keys", origin.keys.len(), MAX_LIST, name.span)?;
    }
    at_most("expectations", file.expect.len(), MAX_LIST, file.name.span)?;
    for expectation in &file.expect {
        let place = expectation.values.span;
        at_most("keys", expectation.keys.len(), MAX_LIST, place)?;
        at_most("values", expectation.values.len(), MAX_LIST, place)?;
    }
    Ok(())
}

/// Counts what operators hold.
pub(super) fn check_operators(graph: &Graph) -> Result<(), Diagnostic> {
    let sections = [&graph.before, &graph.layers.nodes, &graph.after];
    for node in sections.into_iter().flatten() {
        let expressions = check::expressions(&node.op);
        at_most("expressions", expressions.len(), MAX_LIST, node.op.span)?;
        for weight in node.op.weights() {
            let what = "bytes of a weight's name";
            at_most(what, weight.len(), MAX_WEIGHT_NAME, weight.span)?;
        }
    }
    Ok(())
}

fn at_most(what: &str, found: usize, limit: usize, place: Span) -> Result<(), Diagnostic> {
    if found <= limit {
        return Ok(());
    }
    let message = format!("{found} {what} are too many: at most {limit} are taken");
    Err(Diagnostic::new("graph-limit", place, message)
        .help("a graph has one layer of a decoder, written once; graphs/qwen3.ron shows one"))
}
