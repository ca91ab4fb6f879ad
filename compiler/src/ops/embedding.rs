//! `Embedding`: the token's row of a table.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, WeightUse, mismatch};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// The token ids.
    pub tokens: Spanned<String>,
    /// The table, `[rows, columns]`.
    pub weight: Spanned<String>,
    /// Number of tokens there are.
    pub rows: Spanned<Expr>,
    /// Width of the result.
    pub columns: Spanned<Expr>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedEmbedding {
    /// Number of tokens there are.
    pub rows: usize,
    /// Width of the result.
    pub columns: usize,
}

impl Embedding {
    /// A token id to `[columns]`.
    pub(super) fn infer(&self, scope: &Scope<'_>, tokens: &Type) -> Result<Inferred, Diagnostic> {
        if *tokens != Type::Token {
            return Err(mismatch(self.tokens.span, "Embedding", "token ids", tokens)
                .help("write `tokens: \"tokens\"`"));
        }
        let op = TypedEmbedding {
            rows: scope.symbols.dim(&self.rows)?,
            columns: scope.symbols.dim(&self.columns)?,
        };
        let weight = WeightUse {
            name: self.weight.clone(),
            shape: vec![op.rows, op.columns],
        };
        Ok(Inferred {
            op: TypedOp::Embedding(op),
            weight: Some(weight),
        })
    }
}

impl TypedEmbedding {
    /// Row `token` of `table`; `None` where there is no such token.
    pub fn run(&self, token: u32, table: &[f32]) -> Option<Vec<f32>> {
        let row = usize::try_from(token).ok()?;
        table
            .chunks_exact(self.columns)
            .nth(row)
            .map(<[f32]>::to_vec)
    }

    /// One row for each token.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            weight_bytes: 2 * self.columns as u64 * load.tokens,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_row() {
        let op = TypedEmbedding {
            rows: 3,
            columns: 2,
        };
        let table = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(op.run(2, &table), Some(vec![4.0, 5.0]));
        assert_eq!(op.run(3, &table), None);
    }
}
