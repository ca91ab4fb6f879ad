//! `Attention`: causal grouped-query attention over the layer's cache: `softmax(scale · q · kᵀ) · v` for every query head,
//! where `heads / kv_heads` neighbouring query heads share a key/value head (Ainslie et al., arXiv:2305.13245). The cache ends
//! with the token's own position, which makes it causal.

use serde::Deserialize;

use super::kv_append::KvCache;
use super::linear::dot;
use super::{Cost, Inferred, Load, Scope, Type, TypedOp, heads, mismatch, product};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Queries, `[heads, head_dim]`.
    pub q: Spanned<String>,
    /// The cache, from KvAppend.
    pub cache: Spanned<String>,
    /// Factor of the scores; without it `1 / sqrt(head_dim)`.
    #[serde(default)]
    pub scale: Option<Spanned<Expr>>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct TypedAttention {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; they divide `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl Attention {
    /// `[heads, head_dim]` and a cache of as long heads, whose number divides `heads`, to `[heads, head_dim]`.
    pub(super) fn infer(
        &self,
        scope: &Scope<'_>,
        q: &Type,
        cache: &Type,
    ) -> Result<Inferred, Diagnostic> {
        let (heads, head_dim) = heads("Attention", self.q.span, q)?;
        let Type::Cache {
            kv_heads,
            head_dim: kv_head_dim,
        } = *cache
        else {
            return Err(mismatch(self.cache.span, "Attention", "a cache", cache)
                .help("name a KvAppend here"));
        };
        if kv_head_dim != head_dim || heads % kv_heads != 0 {
            return Err(Diagnostic::new(
                "shape-mismatch",
                self.cache.span,
                format!("{heads} query heads of {head_dim} elements cannot share {kv_heads} key/value heads of {kv_head_dim}"),
            )
            .related(self.q.span, format!("this is {q}"))
            .help("heads must be as long in q as in the cache, and the key/value heads must divide the query heads"));
        }
        let scale = match &self.scale {
            Some(written) => {
                let scale = scope.symbols.real(written)? as f32;
                // Kernels take powers of two: the factor grows by log2 e.
                if !(scale * std::f32::consts::LOG2_E).is_finite() {
                    return Err(Diagnostic::new(
                        "invalid-value",
                        written.span,
                        format!("scale is {scale}"),
                    )
                    .help("scale is usually 1 / sqrt(head_dim); leave it out for that"));
                }
                scale
            }
            None => (1.0 / (head_dim as f64).sqrt()) as f32,
        };
        let op = TypedAttention {
            heads,
            kv_heads,
            head_dim,
            scale,
        };
        Ok(Inferred {
            op: TypedOp::Attention(op),
            weight: None,
        })
    }
}

impl TypedAttention {
    /// Attends from one position to all of the cache.
    pub fn run(&self, q: &[f32], cache: &KvCache) -> Vec<f32> {
        let group = self.heads / self.kv_heads;
        let head = |index: usize, query: &[f32]| {
            let at = |all: &[f32], position: usize| {
                let start = (position * self.kv_heads + index / group) * self.head_dim;
                start..(start + self.head_dim).min(all.len())
            };
            let positions = cache.keys.len() / (self.kv_heads * self.head_dim);
            let scores: Vec<f32> = (0..positions)
                .map(|p| self.scale * dot(query, &cache.keys[at(&cache.keys, p)]))
                .collect();
            let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total: f32 = weights.iter().sum();
            let mut output = vec![0.0; self.head_dim];
            for (position, weight) in weights.iter().enumerate() {
                for (out, value) in output
                    .iter_mut()
                    .zip(&cache.values[at(&cache.values, position)])
                {
                    *out += weight / total * value;
                }
            }
            output
        };
        q.chunks_exact(self.head_dim)
            .enumerate()
            .flat_map(|(index, query)| head(index, query))
            .collect()
    }

    /// Reads the cache of every sequence once; two multiply-adds for each query element and position.
    pub(super) fn cost(&self, load: Load) -> Cost {
        let positions = load.tokens * load.context;
        Cost {
            cache_bytes: 2 * 2 * product(&[self.kv_heads, self.head_dim]) * positions,
            flops: 4 * product(&[self.heads, self.head_dim]) * positions,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_a_head_and_weights_sum_to_one() {
        let op = TypedAttention {
            heads: 4,
            kv_heads: 2,
            head_dim: 2,
            scale: 1.0,
        };
        // Two positions; keys are zero, so every position weighs the same.
        let cache = KvCache {
            keys: vec![0.0; 8],
            values: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        };
        assert_eq!(
            op.run(&[1.0; 8], &cache),
            [3.0, 4.0, 3.0, 4.0, 5.0, 6.0, 5.0, 6.0]
        );
    }

    #[test]
    fn the_nearest_key_wins() {
        let op = TypedAttention {
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
        };
        let cache = KvCache {
            keys: vec![-50.0, 50.0],
            values: vec![1.0, 9.0],
        };
        assert_eq!(op.run(&[1.0], &cache), [9.0]);
    }
}
