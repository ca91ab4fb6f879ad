//! `Linear`: `W · x` without a bias, W `[out, in]` as PyTorch stores it.

use rayon::prelude::*;
use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, WeightUse, product, tensor};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// What is multiplied; its dimensions are taken as one.
    pub input: Spanned<String>,
    /// The matrix, `[product of out, product of the input's dimensions]`.
    pub weight: Spanned<String>,
    /// Dimensions of the result, such as `["heads", "head_dim"]`.
    pub out: Vec<Spanned<Expr>>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedLinear {
    /// Dimensions of the input.
    pub input: Vec<usize>,
    /// Dimensions of the result.
    pub output: Vec<usize>,
}

impl Linear {
    /// Any tensor to one of the dimensions `out`.
    pub(super) fn infer(&self, scope: &Scope<'_>, input: &Type) -> Result<Inferred, Diagnostic> {
        let input = tensor("Linear", self.input.span, input)?.to_vec();
        let output = self
            .out
            .iter()
            .map(|dim| scope.symbols.dim(dim))
            .collect::<Result<Vec<_>, _>>()?;
        if output.is_empty() || output.len() > 2 {
            return Err(Diagnostic::new(
                "invalid-value",
                scope.span,
                "a Linear has one or two output dimensions",
            )
            .help("write `out: [\"hidden\"]` or `out: [\"heads\", \"head_dim\"]`"));
        }
        let op = TypedLinear { input, output };
        let weight = WeightUse {
            name: self.weight.clone(),
            shape: vec![op.rows(), op.columns()],
        };
        Ok(Inferred {
            op: TypedOp::Linear(op),
            weight: Some(weight),
        })
    }
}

impl TypedLinear {
    /// Outputs.
    pub fn rows(&self) -> usize {
        self.output.iter().product()
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.input.iter().product()
    }

    /// `matrix · input`.
    pub fn run(&self, input: &[f32], matrix: &[f32]) -> Vec<f32> {
        multiply(matrix, input)
    }

    /// One multiply-add for each element of the matrix and each token.
    pub(super) fn cost(&self, load: Load) -> Cost {
        product_cost(self.rows(), self.columns(), load)
    }
}

/// `matrix · x`, rows in parallel; each row is summed in order, so the result does not depend on the threads.
pub(super) fn multiply(matrix: &[f32], x: &[f32]) -> Vec<f32> {
    let rows = matrix.par_chunks_exact(x.len()).with_min_len(64);
    rows.map(|row| dot(row, x)).collect()
}

/// Eight partial sums, which the compiler can keep in vector registers.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 8];
    let (a_runs, b_runs) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a_runs
        .remainder()
        .iter()
        .zip(b_runs.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_runs.zip(b_runs) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Cost of a matrix product with bf16 weights.
pub(super) fn product_cost(rows: usize, columns: usize, load: Load) -> Cost {
    let elements = product(&[rows, columns]);
    Cost {
        weight_bytes: 2 * elements,
        flops: 2 * elements * load.tokens,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_outputs() {
        let op = TypedLinear {
            input: vec![3],
            output: vec![2],
        };
        assert_eq!(
            op.run(&[1.0, 2.0, 3.0], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
            [1.0, 6.0]
        );
    }

    #[test]
    fn dot_takes_every_element() {
        let ones = [1.0; 19];
        assert_eq!(dot(&ones, &ones), 19.0);
    }

    #[test]
    fn a_matrix_is_read_once_however_many_tokens() {
        let op = TypedLinear {
            input: vec![4],
            output: vec![2, 4],
        };
        let cost = op.cost(Load {
            tokens: 3,
            context: 1,
        });
        assert_eq!((cost.weight_bytes, cost.flops), (64, 192));
    }
}
