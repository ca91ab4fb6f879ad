//! The unfused graph as a list of launches: every operator of every layer with the addresses it reads and writes.
//!
//! Owns which operator becomes which launch, and where values lie. It must not touch a GPU: addresses come from a
//! [`Memory`]. Operators are neither fused nor reordered; that is what makes it the baseline.
//!
//! A value has one buffer for all layers, except the one that the state goes on as, which has two, so that a layer never
//! overwrites the state it reads.

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

#[cfg(test)]
mod tests {
    use mirage_compiler::graph::Graph;
    use mirage_compiler::typed::ModelConfig;

    use super::*;

    /// Hands out addresses one after the other, with the elements that each stands for.
    #[derive(Default)]
    struct Addresses {
        given: u64,
        caches: usize,
        tables: Vec<(String, u64)>,
    }

    impl Addresses {
        fn next(&mut self) -> Result<u64, BaselineError> {
            self.given += 16;
            Ok(self.given)
        }
    }

    /// Weights lie apart from everything else.
    const WEIGHTS: u64 = 1 << 32;

    impl Memory for Addresses {
        fn value(&mut self, _width: usize) -> Result<u64, BaselineError> {
            self.next()
        }
        fn logits(&mut self, _width: usize) -> Result<u64, BaselineError> {
            self.next()
        }
        fn cache(&mut self, _width: usize) -> Result<u64, BaselineError> {
            self.caches += 1;
            self.next()
        }
        fn turns(&mut self, rope: &Rope, head_dim: usize) -> Result<u64, BaselineError> {
            let key = format!("{rope:?} {head_dim}");
            if let Some((_, table)) = self.tables.iter().find(|(known, _)| *known == key) {
                return Ok(*table);
            }
            let table = self.next()?;
            self.tables.push((key, table));
            Ok(table)
        }
        fn weight(&self, index: usize, layer: usize) -> u64 {
            WEIGHTS + 16 * (1000 * index + layer) as u64
        }
    }

    fn typed(text: &str, config: &str) -> TypedGraph {
        let graph = Graph::parse(text, "graph.ron").unwrap();
        TypedGraph::new(&graph, &ModelConfig::parse(config, "config.json").unwrap()).unwrap()
    }

    const QWEN3: &str = include_str!("../../../graphs/qwen3.ron");
    const LLAMA3: &str = include_str!("../../../graphs/llama3.ron");

    fn check(graph: &TypedGraph, layer: usize) -> (Program, Addresses) {
        let mut memory = Addresses::default();
        let program = Program::new(graph, &mut memory).unwrap();
        assert_eq!(program.body.len(), 1 + graph.layers * layer);
        // Final norm, logits, sample.
        assert_eq!((program.head.len(), program.gathered_head.len()), (3, 3));
        assert_eq!(memory.caches, 2 * graph.layers);
        (program, memory)
    }

    #[test]
    fn every_operator_is_one_launch() {
        let graph = Graph::parse(QWEN3, "qwen3.ron").unwrap();
        let graph = TypedGraph::new(&graph, &ModelConfig::none()).unwrap();
        let (program, memory) = check(&graph, 19);
        assert_eq!(memory.tables.len(), 1, "q and k turn alike");
        let shapes: Vec<_> = products(&program.body)
            .iter()
            .map(|(s, all)| (s.outputs, s.inputs, all.len()))
            .collect();
        assert_eq!(
            shapes,
            [
                (1024, 1024, 56),
                (1024, 2048, 28),
                (1024, 3072, 28),
                (2048, 1024, 28),
                (3072, 1024, 56)
            ]
        );

        let graph = Graph::parse(LLAMA3, "llama3.ron").unwrap();
        check(&TypedGraph::new(&graph, &ModelConfig::none()).unwrap(), 17);
    }

    /// The addresses a launch reads values from, and the one it writes.
    fn values(launch: &Launch) -> (Vec<u64>, Option<u64>) {
        match *launch {
            Launch::Embedding { out, .. } => (vec![], Some(out)),
            Launch::RmsNorm { input, out, .. }
            | Launch::Matmul { input, out, .. }
            | Launch::Rope { input, out, .. } => (vec![input], Some(out)),
            Launch::KvAppend { k, v, .. } => (vec![k, v], None),
            Launch::Attention { q, out, .. } => (vec![q], Some(out)),
            Launch::Silu { input, out, .. } => (vec![input], Some(out)),
            Launch::Mul { a, b, out, .. } | Launch::Add { a, b, out, .. } => {
                (vec![a, b], Some(out))
            }
            Launch::Sample { logits, .. } => (vec![logits], None),
        }
    }

    #[test]
    fn values_are_written_before_they_are_read_and_the_state_passes_on() {
        let config = r#"{"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "rms_norm_eps": 1e-6, "rope_theta": 10000,
            "tie_word_embeddings": true}"#;
        let (program, _) = check(&typed(QWEN3, config), 19);
        let mut written = std::collections::BTreeSet::new();
        for step in program.body.iter().chain(&program.head) {
            let (reads, writes) = values(&step.launch);
            for address in &reads {
                assert!(
                    written.contains(address),
                    "{step:?} reads what nobody wrote"
                );
            }
            assert!(
                writes.is_none_or(|out| !reads.contains(&out)),
                "{step:?} overwrites its input"
            );
            written.extend(writes);
        }
        // Each layer's first norm reads what the layer before wrote last.
        let norms: Vec<_> = program
            .body
            .iter()
            .enumerate()
            .filter(|(_, step)| step.value == "attention_norm")
            .collect();
        assert_eq!(norms.len(), 3);
        for (at, step) in norms {
            let (_, before) = values(&program.body[at - 1].launch);
            assert_eq!(values(&step.launch).0, [before.unwrap()]);
        }
        assert_eq!(values(&program.head[0].launch).0, [program.state]);
        assert_eq!(
            values(&program.gathered_head[0].launch).0,
            [program.gathered]
        );
    }

    #[test]
    fn every_layer_has_its_weights_and_caches() {
        let graph = TypedGraph::new(
            &Graph::parse(QWEN3, "qwen3.ron").unwrap(),
            &ModelConfig::none(),
        )
        .unwrap();
        let (program, _) = check(&graph, 19);
        let mut seen = std::collections::BTreeSet::new();
        for step in &program.body {
            let place = match step.launch {
                Launch::Matmul { matrix, .. } => matrix,
                Launch::RmsNorm { gamma, .. } => gamma,
                Launch::KvAppend { keys, .. } => keys,
                _ => continue,
            };
            assert!(seen.insert(place), "{step:?} shares its weight or cache");
        }
    }

    #[test]
    fn shapes_without_a_kernel_are_named() {
        let config = r#"{"num_hidden_layers": 1, "hidden_size": 60, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "rms_norm_eps": 1e-6, "rope_theta": 10000}"#;
        let error = Program::new(&typed(QWEN3, config), &mut Addresses::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`embedded`") && error.contains("60 elements"),
            "{error}"
        );
    }
}
