//! A section of the graph while it is being fused: operators that are still as written beside nodes that are fused already.
//!
//! Owns the working form that the rewrites change and the questions they ask of it. A rewrite must leave it with the same
//! meaning: whatever is not taken in stays as it was.

use std::fmt;

use super::{Epilogue, FusedNorm, Rope, WeightId};
use crate::diagnostics::Span;
use crate::ops::TypedOp;
use crate::typed::{TypedNode, ValueRef};

/// A section under fusion, in order of execution.
pub(super) struct Draft {
    pub(super) items: Vec<Item>,
    /// The value that goes on to the next layer.
    pub(super) result: Option<Value>,
}

/// An operator or a fused node.
#[derive(Clone)]
pub(super) struct Item {
    /// Names the item for as long as the draft lives, wherever it stands.
    pub(super) key: usize,
    pub(super) name: String,
    pub(super) sources: Vec<String>,
    pub(super) span: Span,
    pub(super) inputs: Vec<Value>,
    pub(super) kind: Kind,
}

/// A value of the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// The token ids.
    Tokens,
    /// The residual stream after so many additions.
    Stream(usize),
    /// What an item makes; a linear of several parts makes one value for each.
    Out { key: usize, part: usize },
}

/// What an item is.
#[derive(Clone)]
pub(super) enum Kind {
    /// Not fused.
    Op(TypedOp, Option<WeightId>),
    /// Inputs: what is multiplied; with [`Epilogue::AddResidual`] also the stream it adds to.
    Linear {
        norm: Option<FusedNorm>,
        parts: Vec<WeightId>,
        epilogue: Epilogue,
    },
    /// Input: part 0 of the linear that makes q, k and v.
    Attention(Heads),
}

/// An attention node without its place.
#[derive(Clone)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) q_norm: Option<FusedNorm>,
    pub(super) k_norm: Option<FusedNorm>,
    pub(super) rope: Rope,
    pub(super) scale: f32,
}

impl Draft {
    /// Nothing fused yet, but that every matrix product is a linear of one part.
    pub(super) fn new(nodes: &[TypedNode], result: Option<usize>) -> Self {
        let value = |input: &ValueRef| match input {
            ValueRef::Tokens => Value::Tokens,
            ValueRef::State => Value::Stream(0),
            ValueRef::Node(at) => Value::Out { key: *at, part: 0 },
        };
        let item = |(key, node): (usize, &TypedNode)| {
            let weight = node.weight.map(|index| WeightId(index as u32));
            let kind = match (&node.op, weight) {
                (TypedOp::Linear(_) | TypedOp::LmHead(_), Some(weight)) => Kind::Linear {
                    norm: None,
                    parts: vec![weight],
                    epilogue: Epilogue::Store,
                },
                (op, weight) => Kind::Op(op.clone(), weight),
            };
            Item {
                key,
                name: node.id.clone(),
                sources: vec![node.id.clone()],
                span: node.span,
                inputs: node.inputs.iter().map(value).collect(),
                kind,
            }
        };
        Self {
            items: nodes.iter().enumerate().map(item).collect(),
            result: result.map(|key| Value::Out { key, part: 0 }),
        }
    }

    /// The item that makes a value; none for what enters the section.
    pub(super) fn maker(&self, value: Value) -> Option<&Item> {
        match value {
            Value::Out { key, .. } => self.items.iter().find(|item| item.key == key),
            Value::Tokens | Value::Stream(_) => None,
        }
    }

    /// All items that read a value.
    pub(super) fn users(&self, value: Value) -> impl Iterator<Item = &Item> {
        self.items
            .iter()
            .filter(move |item| item.inputs.contains(&value))
    }

    /// Why `value` is not read by one item only; nothing if it is.
    pub(super) fn shared(&self, value: Value) -> Option<String> {
        let maker = self.maker(value).map_or("the state", |item| &item.name);
        let users: Vec<_> = self
            .users(value)
            .map(|item| format!("`{}`", item.name))
            .collect();
        if self.result == Some(value) {
            return Some(format!("`{maker}` also goes on to the next layer"));
        }
        (users.len() != 1).then(|| format!("`{maker}` is read by {}", users.join(" and ")))
    }

    /// Where an item stands in the order of execution.
    pub(super) fn position(&self, key: usize) -> usize {
        self.items
            .iter()
            .position(|item| item.key == key)
            .unwrap_or(self.items.len())
    }

    /// The item with this key, to be changed.
    pub(super) fn item_mut(&mut self, key: usize) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| item.key == key)
    }

    /// Makes all that read `old` read `new`.
    pub(super) fn replace(&mut self, old: Value, new: Value) {
        let inputs = self.items.iter_mut().flat_map(|item| &mut item.inputs);
        for value in inputs
            .chain(&mut self.result)
            .filter(|value| **value == old)
        {
            *value = new;
        }
    }

    /// Removes items, whose results nothing reads any more.
    pub(super) fn remove(&mut self, keys: &[usize]) {
        self.items.retain(|item| !keys.contains(&item.key));
    }
}

impl Item {
    /// What it makes, where that is one value.
    pub(super) fn output(&self) -> Value {
        Value::Out {
            key: self.key,
            part: 0,
        }
    }

    /// How many values it makes.
    pub(super) fn outputs(&self) -> usize {
        match &self.kind {
            Kind::Op(..) | Kind::Attention(_) => 1,
            Kind::Linear {
                parts,
                epilogue: Epilogue::Store,
                ..
            } => parts.len(),
            Kind::Linear {
                epilogue: Epilogue::SwiGlu | Epilogue::AddResidual,
                ..
            } => 1,
        }
    }

    /// Takes over what another item was made from. `first` says which of them was first.
    pub(super) fn absorb(&mut self, other: &Item, first: bool) {
        let new: Vec<_> = other
            .sources
            .iter()
            .filter(|source| !self.sources.contains(source))
            .cloned()
            .collect();
        if first {
            self.sources.splice(0..0, new);
        } else {
            self.sources.extend(new);
        }
        if other.span.start < self.span.start {
            self.span = other.span;
        }
    }
}

/// One item a line, as the rewrites' tests compare it.
impl fmt::Display for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for item in &self.items {
            let inputs: Vec<_> = item.inputs.iter().map(|input| self.name(*input)).collect();
            let what = match &item.kind {
                Kind::Op(op, _) => op.name().to_owned(),
                Kind::Linear {
                    norm,
                    parts,
                    epilogue,
                } => {
                    let norm = if norm.is_some() { "norm, " } else { "" };
                    format!("linear[{norm}{} parts, {epilogue:?}]", parts.len())
                }
                Kind::Attention(heads) => {
                    let norms = heads.q_norm.iter().chain(&heads.k_norm).count();
                    format!("attention[{} heads, {norms} norms]", heads.heads)
                }
            };
            writeln!(f, "{} = {what}({})", item.name, inputs.join(", "))?;
        }
        Ok(())
    }
}

impl Draft {
    fn name(&self, value: Value) -> String {
        match (value, self.maker(value)) {
            (Value::Stream(version), _) => format!("stream {version}"),
            (Value::Out { part, .. }, Some(item)) if item.outputs() > 1 => {
                format!("{}.{part}", item.name)
            }
            (_, Some(item)) => item.name.clone(),
            (Value::Tokens | Value::Out { .. }, None) => "tokens".to_owned(),
        }
    }
}
