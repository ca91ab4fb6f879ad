//! `Silu`: `x * sigmoid(x)`, also known as swish.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, product, tensor};
use crate::diagnostics::Diagnostic;
use crate::graph::Spanned;

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silu {
    /// What it is applied to.
    pub input: Spanned<String>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedSilu {
    /// Dimensions of input and output.
    pub dims: Vec<usize>,
}

impl Silu {
    /// Any tensor to the same shape.
    pub(super) fn infer(&self, _scope: &Scope<'_>, input: &Type) -> Result<Inferred, Diagnostic> {
        let dims = tensor("Silu", self.input.span, input)?.to_vec();
        Ok(Inferred {
            op: TypedOp::Silu(TypedSilu { dims }),
            weight: None,
        })
    }
}

impl TypedSilu {
    /// Element by element.
    pub fn run(&self, input: &[f32]) -> Vec<f32> {
        input.iter().map(|x| x / (1.0 + (-x).exp())).collect()
    }

    /// An exponential, an addition, a division and a multiplication for each element.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            flops: 4 * product(&self.dims) * load.tokens,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_by_element() {
        let op = TypedSilu { dims: vec![2] };
        assert_eq!(op.run(&[0.0, 100.0]), [0.0, 100.0]);
    }
}
