//! The unfused graph as a list of launches: every operator of every layer with the addresses it reads and writes.
//!
//! Owns which operator becomes which launch, and where values lie. It must not touch a GPU: addresses come from a
//! [`Memory`]. Operators are neither fused nor reordered; that is what makes it the baseline.
//!
//! A value has one buffer for all layers, except the one that the state goes on as, which has two, so that a layer never
//! overwrites the state it reads.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use mirage_compiler::ops::rope::Rope;
use mirage_compiler::ops::{Type, TypedOp};
use mirage_compiler::typed::{TypedGraph, TypedNode, ValueRef};

use super::BaselineError;
use super::kernels::{AttentionShape, VECTOR};

/// Where values, caches and weights lie. Addresses are the device's; each is a multiple of 16.
pub(super) trait Memory {
    /// A bf16 value of `width` elements for every row of a pass.
    fn value(&mut self, width: usize) -> Result<u64, BaselineError>;
    /// An f32 value of `width` elements for every row that gets logits. Asked for once.
    fn logits(&mut self, width: usize) -> Result<u64, BaselineError>;
    /// Keys, or values, of one layer: bf16, `width` elements for every position of every sequence.
    fn cache(&mut self, width: usize) -> Result<u64, BaselineError>;
    /// `{cos, sin}` f32 for every position and pair. Asked for again, the same address.
    fn turns(&mut self, rope: &Rope, head_dim: usize) -> Result<u64, BaselineError>;
    /// A weight of the graph, in a layer if it is one per layer.
    fn weight(&self, index: usize, layer: usize) -> u64;
}

/// A matrix product's sizes: `out[rows, outputs] = in[rows, inputs] · matrix[outputs, inputs]ᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MatmulShape {
    /// Rows of the matrix.
    pub(super) outputs: usize,
    /// Columns of the matrix.
    pub(super) inputs: usize,
    /// Whether the result is f32 (logits) instead of bf16.
    pub(super) full_precision: bool,
}

/// A product to be done: addresses of `matrix[outputs, inputs]`, `input[rows, inputs]` and `out[rows, outputs]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Operands {
    pub(super) matrix: u64,
    pub(super) input: u64,
    pub(super) out: u64,
}

/// One launch. Widths count elements of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Launch {
    Embedding {
        table: u64,
        out: u64,
        width: usize,
    },
    RmsNorm {
        input: u64,
        gamma: u64,
        out: u64,
        groups: usize,
        width: usize,
        eps: f32,
    },
    Matmul {
        matrix: u64,
        input: u64,
        out: u64,
        shape: MatmulShape,
    },
    Rope {
        input: u64,
        out: u64,
        turns: u64,
        heads: usize,
        head_dim: usize,
    },
    KvAppend {
        k: u64,
        v: u64,
        keys: u64,
        values: u64,
        kv_heads: usize,
        head_dim: usize,
    },
    Attention {
        q: u64,
        keys: u64,
        values: u64,
        out: u64,
        kernel: usize,
        scale: f32,
    },
    Silu {
        input: u64,
        out: u64,
        width: usize,
    },
    Mul {
        a: u64,
        b: u64,
        out: u64,
        width: usize,
    },
    Add {
        a: u64,
        b: u64,
        out: u64,
        width: usize,
    },
    Sample {
        logits: u64,
        vocab: usize,
    },
}

/// A launch and the operator it comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Step {
    /// Name of the operator's result in the graph.
    pub(super) value: String,
    /// What runs.
    pub(super) launch: Launch,
}

impl Step {
    /// Whether it is a matrix product of that shape.
    pub(super) fn is_product_of(&self, shape: MatmulShape) -> bool {
        matches!(self.launch, Launch::Matmul { shape: mine, .. } if mine == shape)
    }
}

/// All launches of a pass.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// From tokens to the last state: `before` and all layers.
    pub(super) body: Vec<Step>,
    /// From the last state of all rows to their tokens.
    pub(super) head: Vec<Step>,
    /// The same from [`Program::gathered`]: for some rows of a prefill.
    pub(super) gathered_head: Vec<Step>,
    /// The last state.
    pub(super) state: u64,
    /// Room for chosen rows of the last state.
    pub(super) gathered: u64,
    /// Elements of the state.
    pub(super) width: usize,
    /// Tokens there are.
    pub(super) vocab: usize,
    /// The attention kernels, by `kernel`.
    pub(super) attention: Vec<AttentionShape>,
}

/// Where a value of the graph lies.
#[derive(Clone, Copy, Debug)]
enum Place {
    Token,
    Value(u64),
    Logits(u64),
    Cache { keys: u64, values: u64 },
}

impl Program {
    /// Lays out `graph`.
    ///
    /// # Errors
    /// [`BaselineError::Unsupported`] for shapes the kernels are not made for, and those of `memory`.
    pub(super) fn new(graph: &TypedGraph, memory: &mut dyn Memory) -> Result<Self, BaselineError> {
        let mut lowering = Lowering {
            memory,
            attention: Vec::new(),
            has_logits: false,
        };
        let outputs = lowering.outputs(&graph.before)?;
        let mut body = lowering.section(&graph.before, &outputs, Place::Token, 0)?;
        let mut state = outputs[graph.first];

        let mut outputs = lowering.outputs(&graph.layer)?;
        let width = width(&graph.layer[graph.next].op.output());
        let turns = [
            outputs[graph.next],
            Place::Value(lowering.memory.value(width)?),
        ];
        for layer in 0..graph.layers {
            outputs[graph.next] = turns[layer % 2];
            for (node, output) in graph.layer.iter().zip(&mut outputs) {
                if let TypedOp::KvAppend(op) = &node.op {
                    let width = op.kv_heads * op.head_dim;
                    *output = Place::Cache {
                        keys: lowering.memory.cache(width)?,
                        values: lowering.memory.cache(width)?,
                    };
                }
            }
            body.extend(lowering.section(&graph.layer, &outputs, state, layer)?);
            state = outputs[graph.next];
        }

        let outputs = lowering.outputs(&graph.after)?;
        let gathered = lowering.memory.value(width)?;
        let head = lowering.section(&graph.after, &outputs, state, 0)?;
        let gathered_head = lowering.section(&graph.after, &outputs, Place::Value(gathered), 0)?;
        let sample = graph.after.last().map(|node| (&node.op, node.id.clone()));
        let Some((TypedOp::Sample(sample), value)) = sample else {
            return Err(unsupported("the graph", "it does not end with a Sample"));
        };
        let attention = lowering.attention;
        let state = address(state, &value)?;
        Ok(Self {
            body,
            head,
            gathered_head,
            state,
            gathered,
            width,
            vocab: sample.vocab,
            attention,
        })
    }
}

/// Every matrix product of `steps` by shape, in the order of use.
pub(super) fn products(steps: &[Step]) -> BTreeMap<MatmulShape, Vec<Operands>> {
    let mut all = BTreeMap::<_, Vec<_>>::new();
    for step in steps {
        if let Launch::Matmul {
            matrix,
            input,
            out,
            shape,
        } = step.launch
        {
            all.entry(shape)
                .or_default()
                .push(Operands { matrix, input, out });
        }
    }
    all
}

struct Lowering<'a> {
    memory: &'a mut dyn Memory,
    attention: Vec<AttentionShape>,
    has_logits: bool,
}

impl Lowering<'_> {
    /// A place for every node's result; caches get theirs per layer.
    fn outputs(&mut self, nodes: &[TypedNode]) -> Result<Vec<Place>, BaselineError> {
        let place = |node: &TypedNode| -> Result<Place, BaselineError> {
            let ty = node.op.output();
            match (&node.op, &ty) {
                (TypedOp::LmHead(op), _) => {
                    if std::mem::replace(&mut self.has_logits, true) {
                        return Err(unsupported(&node.id, "it is the second LmHead"));
                    }
                    let logits = self.memory.logits(op.rows)?;
                    Ok(Place::Logits(logits))
                }
                (_, Type::Token) => Ok(Place::Token),
                (_, Type::Cache { .. }) => Ok(Place::Cache { keys: 0, values: 0 }),
                (_, Type::Tensor(_)) => {
                    let width = width(&ty);
                    if !width.is_multiple_of(VECTOR) {
                        let rule = format!("its {width} elements are not a multiple of {VECTOR}");
                        return Err(unsupported(&node.id, &rule));
                    }
                    Ok(Place::Value(self.memory.value(width)?))
                }
            }
        };
        nodes.iter().map(place).collect()
    }

    fn section(
        &mut self,
        nodes: &[TypedNode],
        outputs: &[Place],
        given: Place,
        layer: usize,
    ) -> Result<Vec<Step>, BaselineError> {
        let step = |(node, output): (&TypedNode, &Place)| -> Result<Step, BaselineError> {
            let launch = self.launch(node, *output, outputs, given, layer)?;
            Ok(Step {
                value: node.id.clone(),
                launch,
            })
        };
        nodes.iter().zip(outputs).map(step).collect()
    }

    fn launch(
        &mut self,
        node: &TypedNode,
        output: Place,
        outputs: &[Place],
        given: Place,
        layer: usize,
    ) -> Result<Launch, BaselineError> {
        let place = |input: usize| match node.inputs.get(input) {
            Some(ValueRef::Node(index)) => outputs[*index],
            Some(ValueRef::Tokens | ValueRef::State) | None => given,
        };
        let input = |index: usize| address(place(index), &node.id);
        let cache = |index: Place| match index {
            Place::Cache { keys, values } => Ok((keys, values)),
            _ => Err(unsupported(&node.id, "it reads a cache that is none")),
        };
        let weight = node
            .weight
            .map_or(0, |index| self.memory.weight(index, layer));
        let width = width(&node.op.output());
        Ok(match &node.op {
            TypedOp::Embedding(_) => Launch::Embedding {
                table: weight,
                out: address(output, &node.id)?,
                width,
            },
            TypedOp::RmsNorm(op) => Launch::RmsNorm {
                input: input(0)?,
                gamma: weight,
                out: address(output, &node.id)?,
                groups: width / op.width(),
                width: multiple(&node.id, op.width(), VECTOR)?,
                eps: op.eps,
            },
            TypedOp::Linear(op) => Launch::Matmul {
                matrix: weight,
                input: input(0)?,
                out: address(output, &node.id)?,
                shape: MatmulShape {
                    outputs: op.rows(),
                    inputs: op.columns(),
                    full_precision: false,
                },
            },
            TypedOp::LmHead(op) => {
                let Place::Logits(out) = output else {
                    return Err(unsupported(&node.id, "an LmHead belongs after the layers"));
                };
                let shape = MatmulShape {
                    outputs: op.rows,
                    inputs: op.columns,
                    full_precision: true,
                };
                Launch::Matmul {
                    matrix: weight,
                    input: input(0)?,
                    out,
                    shape,
                }
            }
            TypedOp::Rope(op) => Launch::Rope {
                input: input(0)?,
                out: address(output, &node.id)?,
                turns: self.memory.turns(&op.rope, op.head_dim)?,
                heads: op.heads,
                head_dim: multiple(&node.id, op.head_dim, 2 * VECTOR)?,
            },
            TypedOp::KvAppend(op) => {
                let (keys, values) = cache(output)?;
                let (k, v) = (input(0)?, input(1)?);
                Launch::KvAppend {
                    k,
                    v,
                    keys,
                    values,
                    kv_heads: op.kv_heads,
                    head_dim: op.head_dim,
                }
            }
            TypedOp::Attention(op) => {
                let shape = AttentionShape {
                    heads: op.heads,
                    kv_heads: op.kv_heads,
                    head_dim: op.head_dim,
                };
                shape.check().map_err(|rule| unsupported(&node.id, &rule))?;
                let known = self.attention.iter().position(|known| *known == shape);
                let kernel = known.unwrap_or_else(|| {
                    self.attention.push(shape);
                    self.attention.len() - 1
                });
                let (keys, values) = cache(place(1))?;
                let out = address(output, &node.id)?;
                Launch::Attention {
                    q: input(0)?,
                    keys,
                    values,
                    out,
                    kernel,
                    scale: op.scale,
                }
            }
            TypedOp::Silu(_) => Launch::Silu {
                input: input(0)?,
                out: address(output, &node.id)?,
                width,
            },
            TypedOp::Mul(_) => Launch::Mul {
                a: input(0)?,
                b: input(1)?,
                out: address(output, &node.id)?,
                width,
            },
            TypedOp::Add(_) => Launch::Add {
                a: input(0)?,
                b: input(1)?,
                out: address(output, &node.id)?,
                width,
            },
            TypedOp::Sample(op) => {
                let Place::Logits(logits) = place(0) else {
                    return Err(unsupported(
                        &node.id,
                        "it samples from something else than an LmHead",
                    ));
                };
                Launch::Sample {
                    logits,
                    vocab: op.vocab,
                }
            }
        })
    }
}

/// The address of a bf16 value.
fn address(place: Place, value: &str) -> Result<u64, BaselineError> {
    match place {
        Place::Value(address) => Ok(address),
        // The embedding's input is no address: the tokens come with the pass.
        Place::Token => Ok(0),
        Place::Logits(_) => Err(unsupported(
            value,
            "it reads logits, which only Sample does here",
        )),
        Place::Cache { .. } => Err(unsupported(value, "it reads a cache as a value")),
    }
}

/// Elements of a value for one row.
fn width(ty: &Type) -> usize {
    match ty {
        Type::Tensor(dims) => dims.iter().product(),
        Type::Token | Type::Cache { .. } => 1,
    }
}

fn multiple(value: &str, size: usize, of: usize) -> Result<usize, BaselineError> {
    if size.is_multiple_of(of) {
        return Ok(size);
    }
    Err(unsupported(
        value,
        &format!("{size} is not a multiple of {of}"),
    ))
}

fn unsupported(value: &str, rule: &str) -> BaselineError {
    BaselineError::Unsupported {
        value: value.to_owned(),
        rule: rule.to_owned(),
    }
}
