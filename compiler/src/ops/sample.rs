//! `Sample`: picks the next token from the logits. How (greedy, temperature, top-k, top-p) is the request's choice, not the
//! graph's; the reference here is greedy.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, mismatch};
use crate::diagnostics::Diagnostic;
use crate::graph::Spanned;

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// One logit for each token of the vocabulary.
    pub logits: Spanned<String>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedSample {
    /// Number of tokens.
    pub vocab: usize,
}

impl Sample {
    /// `[vocab]` to a token id.
    pub(super) fn infer(&self, _scope: &Scope<'_>, logits: &Type) -> Result<Inferred, Diagnostic> {
        match logits {
            Type::Tensor(dims) if dims.len() == 1 => Ok(Inferred {
                op: TypedOp::Sample(TypedSample { vocab: dims[0] }),
                weight: None,
            }),
            _ => Err(mismatch(
                self.logits.span,
                "Sample",
                "one logit for each token",
                logits,
            )),
        }
    }
}

impl TypedSample {
    /// The token with the highest logit, the first of equals.
    pub fn run(&self, logits: &[f32]) -> u32 {
        let mut best = 0;
        for (token, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = token;
            }
        }
        // `rows` of the embedding is far below 2^32.
        best as u32
    }

    /// One comparison for each token.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            flops: self.vocab as u64 * load.tokens,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_highest_wins() {
        assert_eq!(TypedSample { vocab: 4 }.run(&[1.0, 3.0, 3.0, 2.0]), 1);
    }
}
