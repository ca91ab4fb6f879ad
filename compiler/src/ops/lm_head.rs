//! `LmHead`: the logits, one for each token of the vocabulary. Its matrix is the embedding table where the two are tied.

use serde::Deserialize;

use super::linear::{multiply, product_cost};
use super::{Cost, Inferred, Load, Scope, Type, TypedOp, WeightUse, mismatch};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LmHead {
    /// The last layer's normed output.
    pub input: Spanned<String>,
    /// The matrix, `[rows, columns of the input]`, where it is not tied.
    pub weight: Spanned<String>,
    /// Whether the embedding table serves in its place.
    pub tied: Spanned<Expr>,
    /// The embedding table.
    pub tied_weight: Spanned<String>,
    /// Number of tokens.
    pub rows: Spanned<Expr>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedLmHead {
    /// Number of tokens.
    pub rows: usize,
    /// Width of the input.
    pub columns: usize,
}

impl LmHead {
    /// `[columns]` to `[rows]`.
    pub(super) fn infer(&self, scope: &Scope<'_>, input: &Type) -> Result<Inferred, Diagnostic> {
        let columns = match input {
            Type::Tensor(dims) if dims.len() == 1 => dims[0],
            _ => return Err(mismatch(self.input.span, "LmHead", "one dimension", input)),
        };
        let rows = scope.symbols.dim(&self.rows)?;
        let name = if scope.symbols.flag(&self.tied)? {
            &self.tied_weight
        } else {
            &self.weight
        };
        let weight = WeightUse {
            name: name.clone(),
            shape: vec![rows, columns],
        };
        Ok(Inferred {
            op: TypedOp::LmHead(TypedLmHead { rows, columns }),
            weight: Some(weight),
        })
    }
}

impl TypedLmHead {
    /// `matrix · input`.
    pub fn run(&self, input: &[f32], matrix: &[f32]) -> Vec<f32> {
        multiply(matrix, input)
    }

    /// One multiply-add for each element of the matrix and each token.
    pub(super) fn cost(&self, load: Load) -> Cost {
        product_cost(self.rows, self.columns, load)
    }
}
