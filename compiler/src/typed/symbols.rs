//! The values of a graph's symbols under one config.json.
//!
//! Owns where a value comes from (config.json, `absent`, `default`) and its limits, so that no later stage meets a size that
//! is zero, absurd, or overflows when multiplied.

use std::collections::BTreeMap;

use super::ModelConfig;
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Graph, Spanned, Symbol, Value};

/// Largest size of one dimension. The product of any two then fits in 2^48, of any three in 2^72: weights have two.
pub const MAX_DIM: usize = 1 << 24;
/// Most parameters of a model: a hundred times those of the largest that one GPU holds. Bytes, tiles and operations of all
/// weights together then stay far below 2^64.
pub const MAX_PARAMETERS: u64 = 1 << 43;
/// Most layers.
pub const MAX_LAYERS: usize = 1024;

/// The values of all dims and params.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Symbols {
    values: BTreeMap<String, (Value, String)>,
}

impl Symbols {
    /// Gives every symbol its value; adds an error for every one that has none.
    pub(super) fn bind(graph: &Graph, config: &ModelConfig, errors: &mut Vec<Diagnostic>) -> Self {
        let mut symbols = Self::default();
        let dims = graph.dims.iter().map(|symbol| (symbol, true));
        for (symbol, is_dim) in dims.chain(graph.params.iter().map(|symbol| (symbol, false))) {
            let value = symbols
                .value_of(symbol, config)
                .and_then(|(value, origin)| {
                    if is_dim {
                        check_dim(symbol, &value, &origin)?;
                    }
                    Ok((value, origin))
                });
            match value {
                Ok(value) => {
                    symbols.values.insert(symbol.name.value.clone(), value);
                }
                Err(error) => errors.push(error),
            }
        }
        symbols
    }

    /// The value of a symbol and, in words, where it comes from.
    fn value_of(
        &self,
        symbol: &Symbol,
        config: &ModelConfig,
    ) -> Result<(Value, String), Diagnostic> {
        let origin = &symbol.origin;
        let Some(file) = config.file_name() else {
            return Ok((
                self.evaluate(&origin.default)?,
                "the graph's default".to_owned(),
            ));
        };
        let keys = || {
            origin
                .keys
                .iter()
                .map(|key| format!("`{}`", key.value))
                .collect::<Vec<_>>()
                .join(" or ")
        };
        match origin
            .keys
            .iter()
            .find_map(|key| config.get(key).map(|value| (key, value)))
        {
            Some((key, json)) => match value_from_json(json) {
                Some(value) => Ok((value, format!("`{}` of {file}", key.value))),
                None => Err(Diagnostic::new(
                    "config-type",
                    key.span,
                    format!(
                        "`{}` of {file} is {}, not a number or a condition",
                        key.value,
                        shorten(json)
                    ),
                )
                .help("mend config.json, or name another key here")),
            },
            None => match &origin.absent {
                Some(absent) => Ok((
                    self.evaluate(absent)?,
                    format!("`absent`, as {file} has no {}", keys()),
                )),
                None => Err(Diagnostic::new(
                    "missing-key",
                    symbol.name.span,
                    format!("{file} has no {}", keys()),
                )
                .label("needed here")
                .help("add it to config.json, or say here what its absence means: `absent: …`")),
            },
        }
    }

    fn evaluate(&self, expr: &Spanned<Expr>) -> Result<Value, Diagnostic> {
        let lookup = |name: &str| self.values.get(name).map(|(value, _)| *value);
        expr.evaluate(&lookup).map_err(|message| {
            let error = Diagnostic::new("expression", expr.span, message);
            let uses: Vec<_> = expr
                .names()
                .into_iter()
                .filter_map(|name| {
                    self.values
                        .get(name)
                        .map(|(value, origin)| format!("{name} = {value} ({origin})"))
                })
                .collect();
            if uses.is_empty() {
                error
            } else {
                error.help(format!("here {}", uses.join(", ")))
            }
        })
    }

    /// The value of a size.
    pub(crate) fn dim(&self, expr: &Spanned<Expr>) -> Result<usize, Diagnostic> {
        let value = self.evaluate(expr)?;
        as_dim(&value).ok_or_else(|| {
            Diagnostic::new(
                "dim-limit",
                expr.span,
                format!("`{}` is {value}", expr.value),
            )
            .help(format!("a size is a whole number from 1 to {MAX_DIM}"))
        })
    }

    /// The value of a number.
    pub(crate) fn real(&self, expr: &Spanned<Expr>) -> Result<f64, Diagnostic> {
        match self.evaluate(expr)? {
            Value::Int(int) => Ok(int as f64),
            Value::Real(real) => Ok(real),
            Value::Bool(flag) => Err(Diagnostic::new(
                "expression",
                expr.span,
                format!("`{}` is {flag}, not a number", expr.value),
            )
            .help("name a param that is a number")),
        }
    }

    /// The value of a condition.
    pub(crate) fn flag(&self, expr: &Spanned<Expr>) -> Result<bool, Diagnostic> {
        match self.evaluate(expr)? {
            Value::Bool(flag) => Ok(flag),
            value @ (Value::Int(_) | Value::Real(_)) => Err(Diagnostic::new(
                "expression",
                expr.span,
                format!("`{}` is {value}, not true or false", expr.value),
            )
            .help("name a param that is true or false")),
        }
    }

    /// How many layers there are.
    pub(super) fn layers(&self, expr: &Spanned<Expr>) -> Result<usize, Diagnostic> {
        let layers = self.dim(expr)?;
        if layers <= MAX_LAYERS {
            return Ok(layers);
        }
        let origin = expr
            .names()
            .first()
            .and_then(|name| self.values.get(*name))
            .map(|(_, origin)| origin);
        let from = origin.map_or_else(String::new, |origin| format!(" (from {origin})"));
        Err(Diagnostic::new(
            "dim-limit",
            expr.span,
            format!("{layers} layers{from} are too many"),
        )
        .help(format!("a decoder has 1 to {MAX_LAYERS} layers")))
    }

    /// Names and values in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value)> {
        self.values
            .iter()
            .map(|(name, (value, _))| (name.as_str(), *value))
    }
}

fn as_dim(value: &Value) -> Option<usize> {
    match value {
        Value::Int(int) => usize::try_from(*int)
            .ok()
            .filter(|dim| (1..=MAX_DIM).contains(dim)),
        Value::Real(_) | Value::Bool(_) => None,
    }
}

fn check_dim(symbol: &Symbol, value: &Value, origin: &str) -> Result<(), Diagnostic> {
    if as_dim(value).is_some() {
        return Ok(());
    }
    let message = format!("`{}` is {value} (from {origin})", symbol.name.value);
    Err(Diagnostic::new("dim-limit", symbol.name.span, message)
        .label("this size")
        .help(format!(
            "a size is a whole number from 1 to {MAX_DIM}; mend it where it comes from"
        )))
}

fn value_from_json(json: &serde_json::Value) -> Option<Value> {
    match json {
        serde_json::Value::Bool(flag) => Some(Value::Bool(*flag)),
        serde_json::Value::Number(number) => match number.as_u64() {
            Some(int) => Some(Value::Int(int)),
            None => number
                .as_f64()
                .filter(|real| real.is_finite())
                .map(Value::Real),
        },
        _ => None,
    }
}

/// JSON for an error message.
pub(super) fn shorten(json: &serde_json::Value) -> String {
    let text = json.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
