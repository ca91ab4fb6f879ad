//! The typed graph: a [`Graph`] with concrete sizes. Every value has a shape and a dtype, every weight a shape.
//!
//! Owns binding symbols to a config.json and running the operators' shape rules. Must not group or reorder operators.
//!
//! Rules of a well-formed typed graph (checked by [`TypedGraph::verify`]):
//! 1. A [`ValueRef::Node`] names an earlier node of the same section; only `before` reads [`ValueRef::Tokens`], only the
//!    layer and `after` read [`ValueRef::State`].
//! 2. The type of every input is the one its operator takes; the layer's result has the type of the state.
//! 3. A node has a weight exactly if its operator takes one, of that shape. Weight names are unique.
//! 4. The last node of `after` is a Sample.

mod config;
mod display;
mod symbols;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use config::ModelConfig;
pub use symbols::{MAX_DIM, MAX_LAYERS, MAX_PARAMETERS, Symbols};

use crate::diagnostics::{Diagnostic, Diagnostics, Source, Span};
use crate::graph::{Graph, LAYER, Node, Spanned, TOKENS};
use crate::ops::{Cost, Inferred, Load, Scope, Type, TypedOp};

/// A graph with concrete sizes.
#[derive(Clone, Debug)]
pub struct TypedGraph {
    /// The file that the graph was read from.
    pub source: Arc<Source>,
    /// The graph's name, an identifier.
    pub name: String,
    /// How many times the layer runs.
    pub layers: usize,
    /// Values of the graph's symbols.
    pub symbols: Symbols,
    /// All weights; nodes refer to them by index.
    pub weights: Vec<TypedWeight>,
    /// From token ids to the first state, in order of execution.
    pub before: Vec<TypedNode>,
    /// The layer, in order of execution.
    pub layer: Vec<TypedNode>,
    /// From the last state to the next token, in order of execution.
    pub after: Vec<TypedNode>,
    /// Type of the value that passes from layer to layer.
    pub state: Type,
    /// The node of `before` that the state starts as.
    pub first: usize,
    /// The node of the layer that the state goes on as.
    pub next: usize,
}

/// One tensor of the checkpoint, or one per layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedWeight {
    /// Name in the checkpoint; `{layer}` stands for the layer's index.
    pub name: String,
    /// `[rows, columns]` of a matrix (`[out, in]` as PyTorch stores a linear), `[length]` of a vector.
    pub shape: Vec<usize>,
    /// Where its name stands in the graph file.
    pub span: Span,
}

impl TypedWeight {
    /// Whether there is one in every layer.
    pub fn per_layer(&self) -> bool {
        self.name.contains(LAYER)
    }

    /// The name in one layer.
    pub fn name_in(&self, layer: usize) -> String {
        self.name.replace(LAYER, &layer.to_string())
    }
}

/// An operator with concrete sizes and the value it makes.
#[derive(Clone, Debug, PartialEq)]
pub struct TypedNode {
    /// The value's name.
    pub id: String,
    /// Where the operator stands in the graph file.
    pub span: Span,
    /// The operator.
    pub op: TypedOp,
    /// What it reads.
    pub inputs: Vec<ValueRef>,
    /// Its weight, an index of [`TypedGraph::weights`].
    pub weight: Option<usize>,
}

/// What an operator reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueRef {
    /// The token id.
    Tokens,
    /// The value that passes from layer to layer.
    State,
    /// The result of an earlier node of the section.
    Node(usize),
}

impl TypedGraph {
    /// Gives a graph its sizes.
    ///
    /// # Errors
    /// A config.json of another model, a missing key, a value outside of its limits, shapes that do not fit.
    pub fn new(graph: &Graph, config: &ModelConfig) -> Result<Self, Diagnostics> {
        let source = &graph.source;
        let mut errors = Vec::new();
        check_expectations(graph, config, &mut errors);
        // A config.json of another model would only lead to errors that mislead.
        Diagnostics::check(source, std::mem::take(&mut errors), ())?;
        let symbols = Symbols::bind(graph, config, &mut errors);
        Diagnostics::check(source, std::mem::take(&mut errors), ())?;
        Self::infer(graph, symbols).map_err(|error| Diagnostics::one(source, error))
    }

    fn infer(graph: &Graph, symbols: Symbols) -> Result<Self, Diagnostic> {
        let mut weights = Weights::default();
        let layers = &graph.layers;
        let repeat = symbols.layers(&layers.repeat)?;
        let before = infer_section(
            &graph.before,
            (TOKENS, ValueRef::Tokens, &Type::Token),
            &symbols,
            &mut weights,
        )?;
        let first = position(&before, &layers.first)?;
        let state = before[first].op.output();
        let given = (layers.state.as_str(), ValueRef::State, &state);
        let layer = infer_section(&layers.nodes, given, &symbols, &mut weights)?;
        let next = position(&layer, &layers.next)?;
        let becomes = layer[next].op.output();
        if becomes != state {
            return Err(Diagnostic::new(
                "shape-mismatch",
                layers.next.span,
                format!("the state starts as {state} but goes on as {becomes}"),
            )
            .related(layers.first.span, format!("this is {state}"))
            .help("the layer must end with the shape it starts from"));
        }
        let after = infer_section(&graph.after, given, &symbols, &mut weights)?;
        check_vocabulary(&before, &after, &weights.list)?;
        check_parameters(&weights.list, repeat)?;
        Ok(Self {
            source: Arc::clone(&graph.source),
            name: graph.name.value.clone(),
            layers: repeat,
            symbols,
            weights: weights.list,
            before,
            layer,
            after,
            state,
            first,
            next,
        })
    }

    /// Parameters of the checkpoint.
    pub fn parameters(&self) -> u64 {
        let copies = |weight: &TypedWeight| {
            if weight.per_layer() {
                self.layers as u64
            } else {
                1
            }
        };
        self.weights
            .iter()
            .map(|weight| copies(weight) * crate::ops::product(&weight.shape))
            .sum()
    }

    /// Cost of one step of all operators, each on its own.
    pub fn cost(&self, load: Load) -> Cost {
        let mut total = Cost::default();
        let mut add = |nodes: &[TypedNode], times: usize| {
            for node in nodes {
                let cost = node.op.cost(load);
                (0..times).for_each(|_| total += cost);
            }
        };
        add(&self.before, 1);
        add(&self.layer, self.layers);
        add(&self.after, 1);
        total
    }
}

/// Refuses a config.json of another model.
fn check_expectations(graph: &Graph, config: &ModelConfig, errors: &mut Vec<Diagnostic>) {
    for expectation in &graph.expect {
        for key in &expectation.keys {
            let Some(value) = config
                .get(key)
                .filter(|value| !expectation.values.contains(value))
            else {
                continue;
            };
            let wanted: Vec<_> = expectation.values.iter().map(symbols::shorten).collect();
            let file = config.file_name().unwrap_or("config.json");
            errors.push(
                Diagnostic::new(
                    "other-model",
                    expectation.values.span,
                    format!("`{}` of {file} is {}, which is not the model of this graph", key.value, symbols::shorten(value)),
                )
                .label(format!("this graph is right for {}", wanted.join(" or ")))
                .help("compile the graph file of that model, or write one: graphs/qwen3.ron shows how"),
            );
        }
    }
}

fn position(nodes: &[TypedNode], name: &Spanned<String>) -> Result<usize, Diagnostic> {
    nodes
        .iter()
        .position(|node| node.id == name.value)
        .ok_or_else(|| {
            Diagnostic::new(
                "undefined-value",
                name.span,
                format!("there is no value `{}`", name.value),
            )
        })
}

/// A token that the head can choose must have an embedding.
fn check_vocabulary(
    before: &[TypedNode],
    after: &[TypedNode],
    weights: &[TypedWeight],
) -> Result<(), Diagnostic> {
    let weight_of = |nodes: &[TypedNode], is_it: fn(&TypedOp) -> bool| {
        let node = nodes.iter().find(|node| is_it(&node.op))?;
        node.weight.map(|index| &weights[index])
    };
    let table = weight_of(before, |op| matches!(op, TypedOp::Embedding(_)));
    let head = weight_of(after, |op| matches!(op, TypedOp::LmHead(_)));
    let (Some(table), Some(head)) = (table, head) else {
        return Ok(());
    };
    let (rows, tokens) = (head.shape[0], table.shape[0]);
    if rows == tokens {
        return Ok(());
    }
    let message = format!("the head has {rows} tokens but the embedding has {tokens}");
    Err(Diagnostic::new("shape-mismatch", head.span, message)
        .label(format!("this has {rows} rows"))
        .related(table.span, format!("this has {tokens} rows"))
        .help("give both the same number of rows"))
}

/// Refuses models so large that the sums of later stages would overflow.
fn check_parameters(weights: &[TypedWeight], layers: usize) -> Result<(), Diagnostic> {
    let mut total = 0u64;
    for weight in weights {
        let copies = if weight.per_layer() { layers } else { 1 };
        // Two sides of 2^24 at most, in 2^10 layers.
        total = total.saturating_add(crate::ops::product(&weight.shape) * copies as u64);
        if total > MAX_PARAMETERS {
            let message = format!("with this weight the model has {total} parameters");
            return Err(
                Diagnostic::new("model-limit", weight.span, message).help(format!(
                    "a model has at most {MAX_PARAMETERS}; check the sizes in config.json"
                )),
            );
        }
    }
    Ok(())
}

fn infer_section(
    nodes: &[Node],
    (given, given_ref, given_type): (&str, ValueRef, &Type),
    symbols: &Symbols,
    weights: &mut Weights,
) -> Result<Vec<TypedNode>, Diagnostic> {
    let mut typed: Vec<TypedNode> = Vec::new();
    for node in nodes {
        let mut inputs = Vec::new();
        let mut types = Vec::new();
        for name in node.op.inputs() {
            if name.as_str() == given {
                inputs.push(given_ref);
                types.push(given_type.clone());
            } else {
                let at = position(&typed, name)?;
                inputs.push(ValueRef::Node(at));
                types.push(typed[at].op.output());
            }
        }
        let scope = Scope {
            symbols,
            span: node.op.span,
        };
        let Inferred { op, weight } = node.op.infer(&scope, &types)?;
        // A weight shape's factors are limited each, but those of a Linear are products of two.
        if let Some(dim) = op
            .weight_shape()
            .into_iter()
            .flatten()
            .find(|dim| *dim > MAX_DIM)
        {
            return Err(Diagnostic::new(
                "dim-limit",
                node.op.span,
                format!("a weight would have a side of {dim} elements"),
            )
            .help(format!("a size is at most {MAX_DIM}")));
        }
        let weight = weight.map(|weight| weights.add(weight)).transpose()?;
        typed.push(TypedNode {
            id: node.id.value.clone(),
            span: node.op.span,
            op,
            inputs,
            weight,
        });
    }
    Ok(typed)
}

#[derive(Default)]
struct Weights {
    list: Vec<TypedWeight>,
    index: BTreeMap<String, usize>,
}

impl Weights {
    /// The weight's index; a name used twice is one weight, which must have one shape.
    fn add(&mut self, weight: crate::ops::WeightUse) -> Result<usize, Diagnostic> {
        let name = weight.name.value;
        if let Some(index) = self.index.get(&name) {
            let known = &self.list[*index];
            if known.shape == weight.shape {
                return Ok(*index);
            }
            let (a, b) = (
                crate::ops::join(&known.shape),
                crate::ops::join(&weight.shape),
            );
            return Err(Diagnostic::new(
                "shape-mismatch",
                weight.name.span,
                format!("the weight `{name}` would be [{a}] in one place and [{b}] in another"),
            )
            .label(format!("here [{b}]"))
            .related(known.span, format!("here [{a}]"))
            .help("let both places have one shape, or name two weights"));
        }
        let index = self.list.len();
        self.index.insert(name.clone(), index);
        self.list.push(TypedWeight {
            name,
            shape: weight.shape,
            span: weight.name.span,
        });
        Ok(index)
    }
}
