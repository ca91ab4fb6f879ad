//! `RmsNorm`: `x * gamma / sqrt(mean(x²) + eps)` over the last dimension (Zhang & Sennrich, arXiv:1910.07467).
//!
//! Over `[hidden]` it is a layer's norm; over `[heads, head_dim]` it norms every head on its own, as Qwen3 does with q and k.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, WeightUse, product, tensor};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNorm {
    /// What is normed.
    pub input: Spanned<String>,
    /// gamma, as long as the last dimension.
    pub weight: Spanned<String>,
    /// Added to the mean square.
    pub eps: Spanned<Expr>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct TypedRmsNorm {
    /// Dimensions of input and output.
    pub dims: Vec<usize>,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNorm {
    /// Any tensor to the same shape.
    pub(super) fn infer(&self, scope: &Scope<'_>, input: &Type) -> Result<Inferred, Diagnostic> {
        let dims = tensor("RmsNorm", self.input.span, input)?.to_vec();
        let eps = scope.symbols.real(&self.eps)? as f32;
        if !eps.is_finite() || eps < 0.0 {
            return Err(
                Diagnostic::new("invalid-value", self.eps.span, format!("eps is {eps}"))
                    .help("eps is a small number, not negative"),
            );
        }
        let op = TypedRmsNorm { dims, eps };
        let weight = WeightUse {
            name: self.weight.clone(),
            shape: vec![op.width()],
        };
        Ok(Inferred {
            op: TypedOp::RmsNorm(op),
            weight: Some(weight),
        })
    }
}

impl TypedRmsNorm {
    /// Elements normed together: the last dimension.
    pub fn width(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    /// Norms every run of [`width`](Self::width) elements.
    pub fn run(&self, input: &[f32], gamma: &[f32]) -> Vec<f32> {
        input
            .chunks_exact(self.width())
            .flat_map(|x| norm(x, gamma, self.eps))
            .collect()
    }

    /// Square, sum, scale twice.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            weight_bytes: 2 * self.width() as u64,
            flops: 4 * product(&self.dims) * load.tokens,
            ..Cost::default()
        }
    }
}

fn norm(x: &[f32], gamma: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    x.iter().zip(gamma).map(|(v, g)| v * scale * g).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_the_last_dimension() {
        let op = TypedRmsNorm {
            dims: vec![2, 2],
            eps: 0.0,
        };
        // Root mean squares 5/√2·… : [3, 4] has mean square 12.5, [1, 1] has 1.
        let out = op.run(&[3.0, 4.0, 1.0, 1.0], &[1.0, 2.0]);
        let root = 12.5_f32.sqrt();
        for (got, want) in out.iter().zip([3.0 / root, 8.0 / root, 1.0, 2.0]) {
            assert!((got - want).abs() < 1e-6, "{out:?}");
        }
    }

    #[test]
    fn eps_keeps_zero_finite() {
        let op = TypedRmsNorm {
            dims: vec![2],
            eps: 1e-6,
        };
        assert_eq!(op.run(&[0.0, 0.0], &[1.0, 1.0]), [0.0, 0.0]);
    }
}
