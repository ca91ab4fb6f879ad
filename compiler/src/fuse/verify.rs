//! The rules of a well-formed fused graph.

use std::collections::BTreeSet;

use super::{
    Epilogue, FusedAttention, FusedGraph, FusedLinear, FusedNorm, FusedOp, Input, WeightId,
};
use crate::diagnostics::Violation;
use crate::graph::{LAYER, is_identifier};

fn ensure(holds: bool, place: &str, rule: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation {
            stage: "fused graph",
            place: place.to_owned(),
            rule: rule(),
        })
    }
}

impl FusedGraph {
    /// Checks the rules at the head of the module.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn verify(&self) -> Result<(), Violation> {
        ensure(is_identifier(&self.name), &self.name, || {
            "the graph's name is an identifier (rule 6)".to_owned()
        })?;
        ensure(self.layers > 0, "layers", || {
            "there is at least one (rule 6)".to_owned()
        })?;
        self.verify_weight(
            "embedding",
            self.embedding,
            &[self.vocab, self.hidden],
            false,
        )?;
        let mut names = BTreeSet::new();
        let mut widths = Vec::new();
        for (at, node) in self.layer.iter().enumerate() {
            let name = &node.name;
            ensure(is_identifier(name) && names.insert(name), name, || {
                "names are identifiers and unique (rule 6)".to_owned()
            })?;
            ensure(!node.sources.is_empty(), name, || {
                "a node has a source (rule 6)".to_owned()
            })?;
            widths.push(match &node.op {
                FusedOp::Linear(linear) => {
                    ensure(at > 0 || linear.input == Input::Residual, name, || {
                        "the first node reads the residual stream (rule 1)".to_owned()
                    })?;
                    self.verify_linear(name, linear, &widths, true)?
                }
                FusedOp::Attention(attention) => self.verify_attention(name, attention, at)?,
            });
        }
        let last = self.layer.last().map(|node| &node.op);
        ensure(
            matches!(last, Some(FusedOp::Linear(linear)) if linear.epilogue == Epilogue::AddResidual),
            "layer",
            || "the last node adds to the residual stream (rule 2)".to_owned(),
        )?;
        let head = &self.head;
        ensure(
            head.input == Input::Residual
                && head.parts.len() == 1
                && head.epilogue == Epilogue::Store,
            "head",
            || "it reads the residual stream, has one part and stores (rule 5)".to_owned(),
        )?;
        let width = self.verify_linear("head", head, &[], false)?;
        ensure(width == self.vocab, "head", || {
            format!("it has {width} rows, not {} (rule 5)", self.vocab)
        })
    }

    /// Checks a linear and gives the width of its output.
    fn verify_linear(
        &self,
        name: &str,
        linear: &FusedLinear,
        widths: &[usize],
        in_layer: bool,
    ) -> Result<usize, Violation> {
        let columns = match linear.input {
            Input::Residual => Some(self.hidden),
            Input::Node(index) => widths.get(index).copied(),
        };
        let Some(columns) = columns else {
            return ensure(false, name, || {
                "its input is an earlier node (rule 1)".to_owned()
            })
            .map(|()| 0);
        };
        if let Some(norm) = linear.norm {
            self.verify_norm(name, norm, columns, in_layer)?;
        }
        let mut rows = Vec::new();
        for part in &linear.parts {
            let shape = self.shape(*part).unwrap_or_default();
            ensure(shape.len() == 2, name, || {
                format!("weight {} is a matrix (rule 6)", part.0)
            })?;
            ensure(shape[1] == columns, name, || {
                format!(
                    "a part has {} columns for an input of {columns} (rule 3)",
                    shape[1]
                )
            })?;
            self.verify_weight(name, *part, shape, in_layer)?;
            rows.push(shape[0]);
        }
        ensure(!rows.is_empty(), name, || {
            "a linear has a part (rule 3)".to_owned()
        })?;
        match linear.epilogue {
            Epilogue::Store => Ok(rows.iter().sum()),
            Epilogue::SwiGlu => {
                ensure(rows.len() == 2 && rows[0] == rows[1], name, || {
                    format!("SwiGLU has two equal parts, not {rows:?} (rule 3)")
                })?;
                Ok(rows[0])
            }
            Epilogue::AddResidual => {
                let sum: usize = rows.iter().sum();
                ensure(sum == self.hidden, name, || {
                    format!("it adds {sum} rows to {} (rule 2)", self.hidden)
                })?;
                ensure(linear.input != Input::Residual, name, || {
                    "it reads what it adds to (rule 2)".to_owned()
                })?;
                Ok(sum)
            }
        }
    }

    /// Checks an attention node and gives the width of its output.
    fn verify_attention(
        &self,
        name: &str,
        attention: &FusedAttention,
        at: usize,
    ) -> Result<usize, Violation> {
        let FusedAttention {
            qkv,
            heads,
            kv_heads,
            head_dim,
            ..
        } = *attention;
        let parts = match self.layer.get(qkv).map(|node| &node.op) {
            Some(FusedOp::Linear(linear)) if qkv < at && linear.epilogue == Epilogue::Store => {
                linear.parts.as_slice()
            }
            _ => &[],
        };
        let rows: Vec<_> = parts
            .iter()
            .map(|part| self.shape(*part).map_or(0, |shape| shape[0]))
            .collect();
        let wanted = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        ensure(rows == wanted, name, || {
            format!("it reads q, k and v of {wanted:?} rows, not {rows:?} (rule 4)")
        })?;
        ensure(
            kv_heads > 0 && heads % kv_heads == 0 && head_dim % 2 == 0,
            name,
            || format!("{kv_heads} divides {heads}, and {head_dim} is even (rule 4)"),
        )?;
        for norm in attention.q_norm.iter().chain(&attention.k_norm) {
            self.verify_norm(name, *norm, head_dim, true)?;
        }
        Ok(heads * head_dim)
    }

    fn verify_norm(
        &self,
        name: &str,
        norm: FusedNorm,
        width: usize,
        in_layer: bool,
    ) -> Result<(), Violation> {
        self.verify_weight(name, norm.gamma, &[width], in_layer)?;
        ensure(norm.eps.is_finite() && norm.eps >= 0.0, name, || {
            format!("eps is {} (rule 6)", norm.eps)
        })
    }

    fn verify_weight(
        &self,
        place: &str,
        id: WeightId,
        shape: &[usize],
        in_layer: bool,
    ) -> Result<(), Violation> {
        ensure(self.shape(id) == Some(shape), place, || {
            format!("weight {} has the shape {shape:?} (rule 6)", id.0)
        })?;
        let name = &self.weights[id.0 as usize].name;
        ensure(name.contains(LAYER) == in_layer, place, || {
            format!("`{name}` has {LAYER} in it exactly if it is a layer's (rule 6)")
        })
    }

    fn shape(&self, id: WeightId) -> Option<&[usize]> {
        self.weights
            .get(id.0 as usize)
            .map(|weight| weight.shape.as_slice())
    }
}
