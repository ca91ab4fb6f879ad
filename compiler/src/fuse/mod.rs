//! The fused graph: what one layer of a decoder is once its operators are grouped into the units the mesh executes.
//!
//! Owns the types of the stage and their meaning. The rewrites that make it from a `TypedGraph` are one file each.
//! It must not know a GPU, a mesh or a batch size: those come with the plan.
//!
//! Rules of a well-formed fused graph (checked by [`FusedGraph::verify`]):
//! 1. The first node of a layer reads the residual stream; every [`Input::Node`] names an earlier node of the layer.
//! 2. Exactly the linears with [`Epilogue::AddResidual`] write the residual stream, none of them reads it, and the last
//!    node of a layer is one.
//! 3. A linear's parts all have the same number of columns; SwiGLU has exactly two parts of equal shape.
//! 4. An attention node reads a linear whose parts are q, k and v, in that order, of `heads`, `kv_heads` and `kv_heads`
//!    times `head_dim` rows, and `kv_heads` divides `heads`.
//! 5. The head reads the residual stream and has one part of `vocab` rows.
//! 6. Names of nodes are identifiers, unique in the layer, and every node has a source. Weight ids are those of weights that
//!    there are, of the shape that their place asks for; weights of the layer, and only they, have `{layer}` in their name.

mod assemble;
mod attention;
mod display;
mod draft;
mod fold_norm;
mod merge_siblings;
mod residual;
mod swiglu;
#[cfg(test)]
mod testing;
mod verify;

use serde::{Deserialize, Serialize};

use crate::diagnostics::{Diagnostics, Span};
pub use crate::ops::rope::{Llama3Scaling, Rope};
use crate::typed::TypedGraph;
use draft::Draft;

/// Index of a [`Weight`] in [`FusedGraph::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WeightId(pub u32);

/// One tensor of the checkpoint, or one per layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weight {
    /// Name in the checkpoint; `{layer}` stands for the layer's index.
    pub name: String,
    /// `[rows, columns]` of a matrix (`[out, in]` as PyTorch stores a linear), `[length]` of a vector.
    pub shape: Vec<usize>,
}

/// A decoder whose layer is a short list of fused nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusedGraph {
    /// The graph's name, an identifier.
    pub name: String,
    /// How many times [`FusedGraph::layer`] runs.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of tokens.
    pub vocab: usize,
    /// All weights; nodes refer to them by [`WeightId`].
    pub weights: Vec<Weight>,
    /// The embedding table, `[vocab, hidden]`. The same id as the head's part where they are tied.
    pub embedding: WeightId,
    /// One layer, in order of execution.
    pub layer: Vec<FusedNode>,
    /// Final norm and LM head; its output goes to the sampler.
    pub head: FusedLinear,
}

/// A named local change of a layer under fusion; its file says what it looks for.
struct Rewrite {
    /// Name for people.
    name: &'static str,
    /// What it takes together, for those whose graph it does not fit.
    fuses: &'static str,
    /// Applies it wherever it fits.
    apply: fn(&mut Draft),
}

/// All rewrites in the order in which they are applied. Each relies on those before it.
const REWRITES: [&Rewrite; 5] = [
    &fold_norm::REWRITE,
    &merge_siblings::REWRITE,
    &swiglu::REWRITE,
    &attention::REWRITE,
    &residual::REWRITE,
];

impl FusedGraph {
    /// Fuses a typed graph.
    ///
    /// # Errors
    /// Operators that no rewrite takes in: which, why, and what would be fused.
    pub fn new(graph: &TypedGraph) -> Result<Self, Diagnostics> {
        let mut layer = Draft::new(&graph.layer, Some(graph.next));
        let mut head = Draft::new(&graph.after, None);
        for rewrite in REWRITES {
            (rewrite.apply)(&mut layer);
            (rewrite.apply)(&mut head);
        }
        assemble::assemble(graph, &layer, &head)
    }

    /// Elements of a linear's input.
    pub fn columns(&self, linear: &FusedLinear) -> usize {
        self.weights[linear.parts[0].0 as usize].shape[1]
    }
}

/// One fused node of the layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusedNode {
    /// Name for people and for the generated code, an identifier unique in the layer (`qkv`, `attention`, `o`, …).
    pub name: String,
    /// Ids of the graph's operators that became this node.
    pub sources: Vec<String>,
    /// Where the first of them stands in the graph file.
    pub span: Span,
    /// What it computes.
    pub op: FusedOp,
}

/// What a fused node computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FusedOp {
    /// Matrix product with prologue and epilogue.
    Linear(FusedLinear),
    /// Causal grouped-query attention with its KV cache.
    Attention(FusedAttention),
}

/// Where a node's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// The residual stream.
    Residual,
    /// The output of an earlier node of the layer.
    Node(usize),
}

/// `epilogue(W · prologue(input))`, where W is the parts' rows one under the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusedLinear {
    /// What is multiplied.
    pub input: Input,
    /// RMSNorm of the input over its whole width.
    pub norm: Option<FusedNorm>,
    /// The matrices, `[rows, columns]` each.
    pub parts: Vec<WeightId>,
    /// What happens to the product.
    pub epilogue: Epilogue,
}

/// RMSNorm: `x * gamma / sqrt(mean(x²) + eps)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusedNorm {
    /// Scale, one per element.
    pub gamma: WeightId,
    /// Added to the mean square.
    pub eps: f32,
}

/// What a linear does with its product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Epilogue {
    /// Hands it on as it is.
    Store,
    /// `silu(first part) * second part`: half as many outputs as rows.
    SwiGlu,
    /// Adds it to the residual stream.
    AddResidual,
}

/// Causal grouped-query attention over the KV cache of the layer, to which it appends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FusedAttention {
    /// Index of the node that makes q, k and v.
    pub qkv: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// RMSNorm of every query head before RoPE.
    pub q_norm: Option<FusedNorm>,
    /// RMSNorm of every key head before RoPE.
    pub k_norm: Option<FusedNorm>,
    /// Rotary position embedding of q and k (rotate-half form).
    pub rope: Rope,
    /// Factor of the scores, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
}
