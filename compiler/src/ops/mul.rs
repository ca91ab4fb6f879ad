//! `Mul`: the product of two values, element by element.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, product, same};
use crate::diagnostics::Diagnostic;
use crate::graph::Spanned;

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mul {
    /// One side.
    pub a: Spanned<String>,
    /// The other, of the same shape.
    pub b: Spanned<String>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedMul {
    /// Dimensions of input and output.
    pub dims: Vec<usize>,
}

impl Mul {
    /// Two tensors of one shape to that shape.
    pub(super) fn infer(
        &self,
        _scope: &Scope<'_>,
        a: &Type,
        b: &Type,
    ) -> Result<Inferred, Diagnostic> {
        let dims = same("Mul", (self.a.span, a), (self.b.span, b))?;
        Ok(Inferred {
            op: TypedOp::Mul(TypedMul { dims }),
            weight: None,
        })
    }
}

impl TypedMul {
    /// Element by element.
    pub fn run(&self, a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| a * b).collect()
    }

    /// One operation for each element.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            flops: product(&self.dims) * load.tokens,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_by_element() {
        let op = TypedMul { dims: vec![2] };
        assert_eq!(op.run(&[1.0, 2.0], &[3.0, 4.0]), [3.0, 8.0]);
    }
}
