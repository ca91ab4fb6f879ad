//! The graph: a decoder's operators as its authors define them, read from a RON file with the place of every part.
//!
//! Owns the language (what fields a graph file has, and what names mean); `graphs/qwen3.ron` is its commented example. Sizes
//! are still symbols here: they get values in [`crate::typed`].
//!
//! Rules of a well-formed graph, checked by [`Graph::parse`]:
//! 1. Ids are identifiers, unique in the whole file; `tokens` and the state's name are taken.
//! 2. An operator reads values of its own section; `before` also sees `tokens`, `layers` and `after` the state. What else is
//!    to pass from section to section must go through the state.
//! 3. No operator depends on its own result. The order in the file is free.
//! 4. Every result is used. The one end of the graph is a Sample in `after`.
//! 5. Expressions use declared dims and params only; `absent` uses only those declared above it.
//! 6. Weights of the layer have `{layer}` in their name, other weights have not.
//! 7. Nothing is larger than the limits in `limits.rs`.

mod check;
mod display;
mod expr;
mod limits;
mod read;

use std::sync::Arc;

use serde::Deserialize;

use crate::diagnostics::{Diagnostic, Diagnostics, Source, Span};
use crate::ops::Op;
pub use expr::{Expr, Value};
pub use limits::{MAX_LIST, MAX_OPERATORS, MAX_SYMBOLS, MAX_WEIGHT_NAME};
pub use read::Spanned;
use read::{Entries, WRONG_TYPE, read};

/// Stands for the layer's index in the names of its weights.
pub const LAYER: &str = "{layer}";

/// The value that `before` starts from: the ids of the tokens.
pub const TOKENS: &str = "tokens";

/// A decoder's graph.
#[derive(Clone, Debug)]
pub struct Graph {
    /// The file it was read from.
    pub source: Arc<Source>,
    /// Its name, an identifier.
    pub name: Spanned<String>,
    /// What a config.json must say for this graph to be its model.
    pub expect: Vec<Expectation>,
    /// Sizes: whole numbers above 0, in the order of the file.
    pub dims: Vec<Symbol>,
    /// Other numbers and conditions, in the order of the file.
    pub params: Vec<Symbol>,
    /// From token ids to the first state, in order of execution.
    pub before: Vec<Node>,
    /// The layer.
    pub layers: Layers,
    /// From the last state to the next token, in order of execution.
    pub after: Vec<Node>,
}

/// The repeated part of a decoder.
#[derive(Clone, Debug)]
pub struct Layers {
    /// How many times it runs.
    pub repeat: Spanned<Expr>,
    /// Name of the value that passes from layer to layer.
    pub state: Spanned<String>,
    /// The value of `before` that it starts as.
    pub first: Spanned<String>,
    /// The value of the layer that it goes on as.
    pub next: Spanned<String>,
    /// One layer's operators, in order of execution.
    pub nodes: Vec<Node>,
}

/// An operator and the name of its result.
#[derive(Clone, Debug)]
pub struct Node {
    /// The name.
    pub id: Spanned<String>,
    /// The operator.
    pub op: Spanned<Op>,
}

/// A named number whose value comes from config.json.
#[derive(Clone, Debug)]
pub struct Symbol {
    /// The name.
    pub name: Spanned<String>,
    /// Where its value comes from.
    pub origin: Spanned<Origin>,
}

/// Where a symbol's value comes from.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Keys of config.json, the first that is there counts; a dot goes into a nested object.
    pub keys: Vec<Spanned<String>>,
    /// The value where there is no config.json at all.
    pub default: Spanned<Expr>,
    /// The value where config.json has none of the keys. Without it they are required.
    #[serde(default)]
    pub absent: Option<Spanned<Expr>>,
}

/// What a config.json must say, if it says anything.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// Keys of config.json; every one of them that is there is checked.
    pub keys: Vec<Spanned<String>>,
    /// The values that this graph is right for.
    pub values: Spanned<Vec<serde_json::Value>>,
}

/// The file as serde reads it. The operators are read one by one afterwards, so that each can have its own error.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename = "Graph")]
struct File {
    name: Spanned<String>,
    #[serde(default)]
    expect: Vec<Expectation>,
    dims: Entries<Spanned<Origin>>,
    #[serde(default)]
    params: Option<Entries<Spanned<Origin>>>,
    before: Entries<Spanned<serde::de::IgnoredAny>>,
    layers: LayersFile,
    after: Entries<Spanned<serde::de::IgnoredAny>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename = "Layers")]
struct LayersFile {
    repeat: Spanned<Expr>,
    state: Spanned<String>,
    first: Spanned<String>,
    next: Spanned<String>,
    ops: Entries<Spanned<serde::de::IgnoredAny>>,
}

impl Graph {
    /// Reads and checks a graph. `file_name` is what errors call it; nothing is opened.
    ///
    /// # Errors
    /// Every broken rule with its place: RON syntax and fields first (alone, since nothing else can be known), then all
    /// operators that cannot be read, then all names that do not fit.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, Diagnostics> {
        let source = Arc::new(Source {
            name: file_name.to_owned(),
            text: text.to_owned(),
        });
        let all = Span {
            start: 0,
            end: text.len(),
        };
        limits::check_text(text).map_err(|error| Diagnostics::one(&source, error))?;
        // Whatever is wrong after this is not syntax.
        let syntax = read::<serde::de::IgnoredAny>(&source, all, "ron-syntax");
        syntax.map_err(|error| Diagnostics::one(&source, error))?;
        let file: File =
            read(&source, all, WRONG_TYPE).map_err(|error| Diagnostics::one(&source, error))?;
        limits::check_file(&file).map_err(|error| Diagnostics::one(&source, error))?;
        let mut errors = Vec::new();
        let mut nodes = |entries: Entries<Spanned<_>>| read_nodes(&source, entries, &mut errors);
        let (before, layer, after) = (
            nodes(file.before),
            nodes(file.layers.ops),
            nodes(file.after),
        );
        let symbols = |Entries(entries): Entries<Spanned<Origin>>| {
            entries
                .into_iter()
                .map(|(name, origin)| Symbol { name, origin })
                .collect()
        };
        let mut graph = Self {
            source: Arc::clone(&source),
            name: file.name,
            expect: file.expect,
            dims: symbols(file.dims),
            params: file.params.map_or_else(Vec::new, symbols),
            before,
            layers: Layers {
                repeat: file.layers.repeat,
                state: file.layers.state,
                first: file.layers.first,
                next: file.layers.next,
                nodes: layer,
            },
            after,
        };
        Diagnostics::check(&source, errors, ())?;
        limits::check_operators(&graph).map_err(|error| Diagnostics::one(&source, error))?;
        graph.verify()?;
        for section in [&mut graph.before, &mut graph.layers.nodes, &mut graph.after] {
            check::sort(section);
        }
        Ok(graph)
    }

    /// Checks the rules at the head of this module.
    ///
    /// # Errors
    /// All broken rules, in the order of their places.
    pub fn verify(&self) -> Result<(), Diagnostics> {
        Diagnostics::check(&self.source, check::check(self), ())
    }
}

fn read_nodes(
    source: &Source,
    Entries(entries): Entries<Spanned<serde::de::IgnoredAny>>,
    errors: &mut Vec<Diagnostic>,
) -> Vec<Node> {
    let mut nodes = Vec::new();
    for (id, written) in entries {
        match read::<Op>(source, written.span, WRONG_TYPE) {
            Ok(value) => nodes.push(Node {
                id,
                op: Spanned {
                    value,
                    span: written.span,
                },
            }),
            Err(error) => errors.push(error),
        }
    }
    nodes
}

/// Whether a name can stand in generated code as it is.
pub(crate) fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= 64
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}
