//! `KvAppend`: appends this position's keys and values to the layer's cache, which attention then reads.

use serde::Deserialize;

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, heads, product, same};
use crate::diagnostics::Diagnostic;
use crate::graph::Spanned;

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvAppend {
    /// Keys, `[kv_heads, head_dim]`.
    pub k: Spanned<String>,
    /// Values, of the same shape.
    pub v: Spanned<String>,
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedKvAppend {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// Keys and values of one layer, position after position, `[kv_heads, head_dim]` each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvCache {
    /// All keys.
    pub keys: Vec<f32>,
    /// All values.
    pub values: Vec<f32>,
}

impl KvAppend {
    /// Two of `[kv_heads, head_dim]` to the cache.
    pub(super) fn infer(
        &self,
        _scope: &Scope<'_>,
        k: &Type,
        v: &Type,
    ) -> Result<Inferred, Diagnostic> {
        let (kv_heads, head_dim) = heads("KvAppend", self.k.span, k)?;
        same("KvAppend", (self.k.span, k), (self.v.span, v))?;
        Ok(Inferred {
            op: TypedOp::KvAppend(TypedKvAppend { kv_heads, head_dim }),
            weight: None,
        })
    }
}

impl TypedKvAppend {
    /// Appends one position.
    pub fn run(&self, cache: &mut KvCache, k: &[f32], v: &[f32]) {
        cache.keys.extend_from_slice(k);
        cache.values.extend_from_slice(v);
    }

    /// Writes one position.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            cache_bytes: 2 * 2 * product(&[self.kv_heads, self.head_dim]) * load.tokens,
            ..Cost::default()
        }
    }
}
