//! The plain reference: a [`TypedGraph`] run operator by operator on the CPU, in f32, one token at a time.
//!
//! Owns nothing but the walk over the graph and the sequences' caches; what an operator does stands in its own file of
//! [`crate::ops`]. It is an oracle for everything that is compiled, so it must stay simple rather than become fast, and it
//! must never look at a fused graph or a plan.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;

use crate::diagnostics::Violation;
use crate::ops::TypedOp;
use crate::ops::kv_append::KvCache;
use crate::typed::{TypedGraph, TypedNode, TypedWeight, ValueRef};

/// One tensor of a checkpoint, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<'a> {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements, the last dimension running fastest.
    pub data: Cow<'a, [f32]>,
}

/// Where weights come from.
pub trait WeightSource {
    /// The tensor of that name, without `{layer}`.
    ///
    /// # Errors
    /// Whatever keeps it from being read.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, Box<dyn Error + Send + Sync>>;
}

/// Why the reference cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The checkpoint does not give a weight.
    #[error("the weight `{name}` cannot be read: {cause}")]
    Weight {
        /// Its name in the checkpoint.
        name: String,
        /// What the source said.
        cause: Box<dyn Error + Send + Sync>,
    },
    /// A weight of another shape.
    #[error("the weight `{name}` has the shape {found:?}, but the graph asks for {wanted:?}")]
    Shape {
        /// Its name in the checkpoint.
        name: String,
        /// What the graph asks for.
        wanted: Vec<usize>,
        /// What the checkpoint has.
        found: Vec<usize>,
    },
    /// A token that there is not.
    #[error("there is no token {0}: it lies outside of the embedding")]
    Token(u32),
    /// Nothing to go on from.
    #[error("a prompt has at least one token")]
    EmptyPrompt,
    /// A graph that was changed by hand.
    #[error(transparent)]
    Graph(#[from] Violation),
}

/// A graph and its weights, ready to run.
pub struct Reference<'a> {
    graph: &'a TypedGraph,
    /// For each weight of the graph the tensor of every layer, or the one tensor.
    weights: Vec<Vec<Cow<'a, [f32]>>>,
}

/// A sequence under way: its position and its caches.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    position: usize,
    /// By layer and by the KvAppend's index in it.
    caches: BTreeMap<(usize, usize), KvCache>,
}

/// What an operator makes for one token.
enum Value {
    Token(u32),
    Row(Vec<f32>),
    /// The cache stays in the [`Sequence`]; this is its key.
    Cache((usize, usize)),
}

impl<'a> Reference<'a> {
    /// Reads all weights of the graph.
    ///
    /// # Errors
    /// A weight that is missing or of another shape.
    pub fn new(
        graph: &'a TypedGraph,
        source: &'a dyn WeightSource,
    ) -> Result<Self, ReferenceError> {
        graph.verify()?;
        let read = |weight: &TypedWeight| {
            let copies = if weight.per_layer() { graph.layers } else { 1 };
            (0..copies)
                .map(|layer| read_weight(source, &weight.name_in(layer), &weight.shape))
                .collect()
        };
        let weights = graph.weights.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Self { graph, weights })
    }

    /// Takes one token and gives the logits of the token after it, one for each token of the vocabulary.
    ///
    /// # Errors
    /// A token outside of the embedding.
    pub fn step(&self, sequence: &mut Sequence, token: u32) -> Result<Vec<f32>, ReferenceError> {
        let graph = self.graph;
        let mut before = self.run(&graph.before, 0, &Value::Token(token), sequence)?;
        let mut state = before.swap_remove(graph.first);
        for layer in 0..graph.layers {
            let mut values = self.run(&graph.layer, layer, &state, sequence)?;
            state = values.swap_remove(graph.next);
        }
        let mut after = self.run(&graph.after, 0, &state, sequence)?;
        sequence.position += 1;
        match (
            graph.after.last().map(|sample| sample.inputs.as_slice()),
            state,
        ) {
            (Some([ValueRef::Node(logits)]), _) => match after.swap_remove(*logits) {
                Value::Row(logits) => Ok(logits),
                Value::Token(_) | Value::Cache(_) => Err(malformed("logits")),
            },
            (Some([ValueRef::State]), Value::Row(logits)) => Ok(logits),
            _ => Err(malformed("Sample")),
        }
    }

    /// The logits after every token of a sequence, from its start.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, ReferenceError> {
        let mut sequence = Sequence::default();
        tokens
            .iter()
            .map(|token| self.step(&mut sequence, *token))
            .collect()
    }

    /// Goes on from a prompt by `count` tokens, each the most likely one.
    ///
    /// # Errors
    /// As [`step`](Self::step), and an empty prompt.
    pub fn greedy(&self, prompt: &[u32], count: usize) -> Result<Vec<u32>, ReferenceError> {
        let Some(TypedOp::Sample(sample)) = self.graph.after.last().map(|node| &node.op) else {
            return Err(malformed("Sample"));
        };
        let mut sequence = Sequence::default();
        let mut logits = None;
        for token in prompt {
            logits = Some(self.step(&mut sequence, *token)?);
        }
        let mut logits = logits.ok_or(ReferenceError::EmptyPrompt)?;
        let mut tokens = Vec::with_capacity(count);
        while tokens.len() < count {
            let next = sample.run(&logits);
            tokens.push(next);
            if tokens.len() < count {
                logits = self.step(&mut sequence, next)?;
            }
        }
        Ok(tokens)
    }

    /// Runs a section on one token; gives the values of its nodes.
    fn run(
        &self,
        nodes: &[TypedNode],
        layer: usize,
        given: &Value,
        sequence: &mut Sequence,
    ) -> Result<Vec<Value>, ReferenceError> {
        let mut values: Vec<Value> = Vec::with_capacity(nodes.len());
        for (at, node) in nodes.iter().enumerate() {
            let inputs: Vec<&Value> = node
                .inputs
                .iter()
                .map(|input| match input {
                    ValueRef::Node(index) => &values[*index],
                    ValueRef::Tokens | ValueRef::State => given,
                })
                .collect();
            let value = self.run_node(node, (layer, at), &inputs, sequence)?;
            values.push(value);
        }
        Ok(values)
    }

    fn run_node(
        &self,
        node: &TypedNode,
        at: (usize, usize),
        inputs: &[&Value],
        sequence: &mut Sequence,
    ) -> Result<Value, ReferenceError> {
        let weight: &[f32] = match node.weight.map(|index| &self.weights[index]) {
            Some(layers) => layers
                .get(at.0)
                .or(layers.first())
                .map_or(&[], |tensor| tensor.as_ref()),
            None => &[],
        };
        Ok(Value::Row(match (&node.op, inputs) {
            (TypedOp::Embedding(op), [Value::Token(token)]) => op
                .run(*token, weight)
                .ok_or(ReferenceError::Token(*token))?,
            (TypedOp::RmsNorm(op), [Value::Row(x)]) => op.run(x, weight),
            (TypedOp::Linear(op), [Value::Row(x)]) => op.run(x, weight),
            (TypedOp::Rope(op), [Value::Row(x)]) => op.run(x, sequence.position),
            (TypedOp::KvAppend(op), [Value::Row(k), Value::Row(v)]) => {
                op.run(sequence.caches.entry(at).or_default(), k, v);
                return Ok(Value::Cache(at));
            }
            (TypedOp::Attention(op), [Value::Row(q), Value::Cache(key)]) => {
                op.run(q, sequence.caches.entry(*key).or_default())
            }
            (TypedOp::Silu(op), [Value::Row(x)]) => op.run(x),
            (TypedOp::Mul(op), [Value::Row(a), Value::Row(b)]) => op.run(a, b),
            (TypedOp::Add(op), [Value::Row(a), Value::Row(b)]) => op.run(a, b),
            (TypedOp::LmHead(op), [Value::Row(x)]) => op.run(x, weight),
            (TypedOp::Sample(op), [Value::Row(logits)]) => return Ok(Value::Token(op.run(logits))),
            (op, _) => return Err(malformed(op.name())),
        }))
    }
}

fn read_weight<'a>(
    source: &'a dyn WeightSource,
    name: &str,
    wanted: &[usize],
) -> Result<Cow<'a, [f32]>, ReferenceError> {
    let name = name.to_owned();
    let tensor = source
        .tensor(&name)
        .map_err(|cause| ReferenceError::Weight {
            name: name.clone(),
            cause,
        })?;
    let elements: usize = wanted.iter().product();
    if tensor.shape != wanted || tensor.data.len() != elements {
        return Err(ReferenceError::Shape {
            name,
            wanted: wanted.to_vec(),
            found: tensor.shape,
        });
    }
    Ok(tensor.data)
}

/// A graph that passed [`TypedGraph::verify`] does not come here.
fn malformed(place: &str) -> ReferenceError {
    let rule = "an operator reads values of the kinds it takes".to_owned();
    ReferenceError::Graph(Violation {
        stage: "typed graph",
        place: place.to_owned(),
        rule,
    })
}
