//! The operators of the graph language, one file each.
//!
//! An operator's file holds everything about its meaning: the fields as a graph file writes them (`Linear`), the concrete
//! form once dimensions are known (`TypedLinear`), the shape rule that leads from one to the other (`infer`), the CPU
//! reference (`run`, plain f32, one token) and the cost. How operators are fused and run on a mesh is not known here.
//!
//! A new operator is a new file here, a variant of [`Op`] and of [`TypedOp`], and what the compiler then asks for: every
//! match over the two is exhaustive.

pub mod add;
pub mod attention;
pub mod embedding;
pub mod kv_append;
pub mod linear;
pub mod lm_head;
pub mod mul;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod silu;

use std::fmt;

use serde::Deserialize;

use crate::diagnostics::{Diagnostic, Span};
use crate::graph::Spanned;
use crate::typed::Symbols;

/// An operator as a graph file writes it: names and expressions.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub enum Op {
    /// Row of a table.
    Embedding(embedding::Embedding),
    /// Root-mean-square norm of the last dimension.
    RmsNorm(rms_norm::RmsNorm),
    /// Matrix product.
    Linear(linear::Linear),
    /// Rotary position embedding.
    Rope(rope::RotaryEmbedding),
    /// Appends keys and values to the layer's cache.
    KvAppend(kv_append::KvAppend),
    /// Causal grouped-query attention.
    Attention(attention::Attention),
    /// `x * sigmoid(x)`.
    Silu(silu::Silu),
    /// Product, element by element.
    Mul(mul::Mul),
    /// Sum, element by element.
    Add(add::Add),
    /// Matrix product with the vocabulary, tied to the embedding or not.
    LmHead(lm_head::LmHead),
    /// Picks the next token.
    Sample(sample::Sample),
}

/// An operator with concrete sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum TypedOp {
    /// Row of a table.
    Embedding(embedding::TypedEmbedding),
    /// Root-mean-square norm of the last dimension.
    RmsNorm(rms_norm::TypedRmsNorm),
    /// Matrix product.
    Linear(linear::TypedLinear),
    /// Rotary position embedding.
    Rope(rope::TypedRope),
    /// Appends keys and values to the layer's cache.
    KvAppend(kv_append::TypedKvAppend),
    /// Causal grouped-query attention.
    Attention(attention::TypedAttention),
    /// `x * sigmoid(x)`.
    Silu(silu::TypedSilu),
    /// Product, element by element.
    Mul(mul::TypedMul),
    /// Sum, element by element.
    Add(add::TypedAdd),
    /// Matrix product with the vocabulary.
    LmHead(lm_head::TypedLmHead),
    /// Picks the next token.
    Sample(sample::TypedSample),
}

/// What a value is, for one token. The dtype follows from the kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// A token id, u32.
    Token,
    /// An array of f32, outermost dimension first. Where a compiled program rounds it to bf16 is that program's business.
    Tensor(Vec<usize>),
    /// Keys and values of all positions so far, bf16: `[kv_heads, head_dim]` each for every position.
    Cache {
        /// Heads of the keys and of the values.
        kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
    },
}

impl Type {
    /// Bytes of the value for one token.
    pub fn bytes(&self) -> u64 {
        match self {
            Type::Token => 4,
            Type::Tensor(dims) => 4 * product(dims),
            Type::Cache { kv_heads, head_dim } => 2 * 2 * product(&[*kv_heads, *head_dim]),
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Token => f.write_str("u32"),
            Type::Tensor(dims) => write!(f, "f32[{}]", join(dims)),
            Type::Cache { kv_heads, head_dim } => {
                write!(f, "cache bf16[2, {kv_heads}, {head_dim}]")
            }
        }
    }
}

/// What an operator asks of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights read once, however many tokens there are; weights are bf16.
    pub weight_bytes: u64,
    /// Bytes of the KV cache read and written, bf16.
    pub cache_bytes: u64,
    /// Bytes of other values read and written.
    pub value_bytes: u64,
    /// Floating-point operations; a multiply-add counts as two.
    pub flops: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.weight_bytes += other.weight_bytes;
        self.cache_bytes += other.cache_bytes;
        self.value_bytes += other.value_bytes;
        self.flops += other.flops;
    }
}

/// The batch a cost is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Tokens worked on at once, one of each sequence.
    pub tokens: u64,
    /// Positions in the cache of each, with its own.
    pub context: u64,
}

/// A weight that an operator reads: its name as written and its shape.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightUse {
    /// Name in the checkpoint, perhaps with `{layer}`.
    pub name: Spanned<String>,
    /// `[rows, columns]` of a matrix, `[length]` of a vector.
    pub shape: Vec<usize>,
}

/// What a shape rule finds out.
#[derive(Clone, Debug, PartialEq)]
pub struct Inferred {
    /// The operator with concrete sizes.
    pub op: TypedOp,
    /// Its weight.
    pub weight: Option<WeightUse>,
}

/// All that a shape rule may look at.
pub struct Scope<'a> {
    /// Values of dims and params.
    pub symbols: &'a Symbols,
    /// Where the operator stands.
    pub span: Span,
}

/// The names of the values an operator reads, each with the field that names it.
pub type Inputs<'a> = Vec<&'a Spanned<String>>;

impl Op {
    /// Its name in graph files.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding(_) => "Embedding",
            Op::RmsNorm(_) => "RmsNorm",
            Op::Linear(_) => "Linear",
            Op::Rope(_) => "Rope",
            Op::KvAppend(_) => "KvAppend",
            Op::Attention(_) => "Attention",
            Op::Silu(_) => "Silu",
            Op::Mul(_) => "Mul",
            Op::Add(_) => "Add",
            Op::LmHead(_) => "LmHead",
            Op::Sample(_) => "Sample",
        }
    }

    /// The values it reads, in the order of [`TypedOp::inputs`].
    pub fn inputs(&self) -> Inputs<'_> {
        match self {
            Op::Embedding(op) => vec![&op.tokens],
            Op::RmsNorm(op) => vec![&op.input],
            Op::Linear(op) => vec![&op.input],
            Op::Rope(op) => vec![&op.input],
            Op::KvAppend(op) => vec![&op.k, &op.v],
            Op::Attention(op) => vec![&op.q, &op.cache],
            Op::Silu(op) => vec![&op.input],
            Op::Mul(op) => vec![&op.a, &op.b],
            Op::Add(op) => vec![&op.a, &op.b],
            Op::LmHead(op) => vec![&op.input],
            Op::Sample(op) => vec![&op.logits],
        }
    }

    /// The weight names it may read.
    pub fn weights(&self) -> Vec<&Spanned<String>> {
        match self {
            Op::Embedding(op) => vec![&op.weight],
            Op::RmsNorm(op) => vec![&op.weight],
            Op::Linear(op) => vec![&op.weight],
            Op::LmHead(op) => vec![&op.weight, &op.tied_weight],
            Op::Rope(_)
            | Op::KvAppend(_)
            | Op::Attention(_)
            | Op::Silu(_)
            | Op::Mul(_)
            | Op::Add(_)
            | Op::Sample(_) => Vec::new(),
        }
    }

    /// The shape rule: concrete sizes from the inputs' types and the symbols.
    pub fn infer(&self, scope: &Scope<'_>, inputs: &[Type]) -> Result<Inferred, Diagnostic> {
        match (self, inputs) {
            (Op::Embedding(op), [tokens]) => op.infer(scope, tokens),
            (Op::RmsNorm(op), [input]) => op.infer(scope, input),
            (Op::Linear(op), [input]) => op.infer(scope, input),
            (Op::Rope(op), [input]) => op.infer(scope, input),
            (Op::KvAppend(op), [k, v]) => op.infer(scope, k, v),
            (Op::Attention(op), [q, cache]) => op.infer(scope, q, cache),
            (Op::Silu(op), [input]) => op.infer(scope, input),
            (Op::Mul(op), [a, b]) => op.infer(scope, a, b),
            (Op::Add(op), [a, b]) => op.infer(scope, a, b),
            (Op::LmHead(op), [input]) => op.infer(scope, input),
            (Op::Sample(op), [logits]) => op.infer(scope, logits),
            // Kept as an error, not a panic, though `Op::inputs` fixes the number.
            (op, inputs) => Err(Diagnostic::new(
                "wrong-inputs",
                scope.span,
                format!("{} does not take {} inputs", op.name(), inputs.len()),
            )),
        }
    }
}

impl TypedOp {
    /// Its name in graph files.
    pub fn name(&self) -> &'static str {
        match self {
            TypedOp::Embedding(_) => "Embedding",
            TypedOp::RmsNorm(_) => "RmsNorm",
            TypedOp::Linear(_) => "Linear",
            TypedOp::Rope(_) => "Rope",
            TypedOp::KvAppend(_) => "KvAppend",
            TypedOp::Attention(_) => "Attention",
            TypedOp::Silu(_) => "Silu",
            TypedOp::Mul(_) => "Mul",
            TypedOp::Add(_) => "Add",
            TypedOp::LmHead(_) => "LmHead",
            TypedOp::Sample(_) => "Sample",
        }
    }

    /// The types of its inputs; they follow from its sizes.
    pub fn inputs(&self) -> Vec<Type> {
        match self {
            TypedOp::Embedding(_) => vec![Type::Token],
            TypedOp::RmsNorm(op) => vec![Type::Tensor(op.dims.clone())],
            TypedOp::Linear(op) => vec![Type::Tensor(op.input.clone())],
            TypedOp::Rope(op) => vec![Type::Tensor(vec![op.heads, op.head_dim])],
            TypedOp::KvAppend(op) => vec![Type::Tensor(vec![op.kv_heads, op.head_dim]); 2],
            TypedOp::Attention(op) => vec![
                Type::Tensor(vec![op.heads, op.head_dim]),
                Type::Cache {
                    kv_heads: op.kv_heads,
                    head_dim: op.head_dim,
                },
            ],
            TypedOp::Silu(op) => vec![Type::Tensor(op.dims.clone())],
            TypedOp::Mul(op) => vec![Type::Tensor(op.dims.clone()); 2],
            TypedOp::Add(op) => vec![Type::Tensor(op.dims.clone()); 2],
            TypedOp::LmHead(op) => vec![Type::Tensor(vec![op.columns])],
            TypedOp::Sample(op) => vec![Type::Tensor(vec![op.vocab])],
        }
    }

    /// The type of its output; it follows from its sizes.
    pub fn output(&self) -> Type {
        match self {
            TypedOp::Embedding(op) => Type::Tensor(vec![op.columns]),
            TypedOp::RmsNorm(op) => Type::Tensor(op.dims.clone()),
            TypedOp::Linear(op) => Type::Tensor(op.output.clone()),
            TypedOp::Rope(op) => Type::Tensor(vec![op.heads, op.head_dim]),
            TypedOp::KvAppend(op) => Type::Cache {
                kv_heads: op.kv_heads,
                head_dim: op.head_dim,
            },
            TypedOp::Attention(op) => Type::Tensor(vec![op.heads, op.head_dim]),
            TypedOp::Silu(op) => Type::Tensor(op.dims.clone()),
            TypedOp::Mul(op) => Type::Tensor(op.dims.clone()),
            TypedOp::Add(op) => Type::Tensor(op.dims.clone()),
            TypedOp::LmHead(op) => Type::Tensor(vec![op.rows]),
            TypedOp::Sample(_) => Type::Token,
        }
    }

    /// The shape of its weight, if it has one.
    pub fn weight_shape(&self) -> Option<Vec<usize>> {
        match self {
            TypedOp::Embedding(op) => Some(vec![op.rows, op.columns]),
            TypedOp::RmsNorm(op) => Some(vec![op.width()]),
            TypedOp::Linear(op) => Some(vec![op.rows(), op.columns()]),
            TypedOp::LmHead(op) => Some(vec![op.rows, op.columns]),
            TypedOp::Rope(_)
            | TypedOp::KvAppend(_)
            | TypedOp::Attention(_)
            | TypedOp::Silu(_)
            | TypedOp::Mul(_)
            | TypedOp::Add(_)
            | TypedOp::Sample(_) => None,
        }
    }

    /// What it costs, on its own, with its inputs read and its output written once.
    pub fn cost(&self, load: Load) -> Cost {
        let own = match self {
            TypedOp::Embedding(op) => op.cost(load),
            TypedOp::RmsNorm(op) => op.cost(load),
            TypedOp::Linear(op) => op.cost(load),
            TypedOp::Rope(op) => op.cost(load),
            TypedOp::KvAppend(op) => op.cost(load),
            TypedOp::Attention(op) => op.cost(load),
            TypedOp::Silu(op) => op.cost(load),
            TypedOp::Mul(op) => op.cost(load),
            TypedOp::Add(op) => op.cost(load),
            TypedOp::LmHead(op) => op.cost(load),
            TypedOp::Sample(op) => op.cost(load),
        };
        let values = self.inputs().into_iter().chain([self.output()]);
        let moved: u64 = values
            .filter(|ty| !matches!(ty, Type::Cache { .. }))
            .map(|ty| ty.bytes())
            .sum();
        Cost {
            value_bytes: moved * load.tokens,
            ..own
        }
    }
}

/// Elements of an array; sizes are limited when symbols are bound, so it does not overflow.
pub(crate) fn product(dims: &[usize]) -> u64 {
    dims.iter().map(|dim| *dim as u64).product()
}

/// `a, b, c`.
pub(crate) fn join(dims: &[usize]) -> String {
    dims.iter()
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The error of a shape rule: `expected` what the operator takes, `found` what it was given.
fn mismatch(span: Span, op: &str, expected: &str, found: &Type) -> Diagnostic {
    Diagnostic::new(
        "shape-mismatch",
        span,
        format!("{op} takes {expected}, but this value is {found}"),
    )
    .label(format!("this is {found}"))
}

/// The dimensions of a tensor, else the operator's error.
fn tensor<'a>(op: &str, span: Span, ty: &'a Type) -> Result<&'a [usize], Diagnostic> {
    match ty {
        Type::Tensor(dims) => Ok(dims),
        Type::Token | Type::Cache { .. } => Err(mismatch(span, op, "an array of numbers", ty)),
    }
}

/// The dimensions of a tensor `[heads, head_dim]`, else the operator's error.
fn heads(op: &str, span: Span, ty: &Type) -> Result<(usize, usize), Diagnostic> {
    match ty {
        Type::Tensor(dims) if dims.len() == 2 => Ok((dims[0], dims[1])),
        _ => Err(mismatch(span, op, "[heads, head_dim]", ty).help(
            "give the Linear that makes it two dimensions, as in `out: [\"heads\", \"head_dim\"]`",
        )),
    }
}

/// The common dimensions of two tensors, else the operator's error.
fn same(
    op: &str,
    (a, left): (Span, &Type),
    (b, right): (Span, &Type),
) -> Result<Vec<usize>, Diagnostic> {
    let dims = tensor(op, a, left)?;
    if tensor(op, b, right)? != dims {
        return Err(Diagnostic::new(
            "shape-mismatch",
            b,
            format!("{op} takes two values of one shape, but these are {left} and {right}"),
        )
        .label(format!("this is {right}"))
        .related(a, format!("this is {left}"))
        .help("change the `out` of the Linear that makes one of them"));
    }
    Ok(dims.to_vec())
}
