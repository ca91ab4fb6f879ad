//! From rewritten drafts to the fused graph, or to the reasons why there is none.
//!
//! Owns the last step of fusion: nodes get indices, and every operator that is left over gets a diagnostic that says which
//! rewrite would take it in and what kept it from doing so.

use super::draft::{Draft, Item, Kind, Value};
use super::{
    Epilogue, FusedAttention, FusedGraph, FusedLinear, FusedNode, FusedOp, Input, Rewrite, Weight,
    WeightId, attention, fold_norm, merge_siblings, residual, swiglu,
};
use crate::diagnostics::{Diagnostic, Diagnostics, Span};
use crate::ops::TypedOp;
use crate::typed::TypedGraph;

pub(super) fn assemble(
    graph: &TypedGraph,
    layer: &Draft,
    head: &Draft,
) -> Result<FusedGraph, Diagnostics> {
    let mut errors = Vec::new();
    let embedding = embedding(graph, &mut errors);
    let nodes = layer_nodes(layer, &mut errors);
    let head = head_linear(head, &mut errors);
    Diagnostics::check(&graph.source, errors, ())?;
    // Each of the three reported an error where it gives nothing.
    let (Some((embedding, vocab, hidden)), Some(head)) = (embedding, head) else {
        return Err(Diagnostics::one(
            &graph.source,
            internal("a part of the graph is missing"),
        ));
    };
    let fused = FusedGraph {
        name: graph.name.clone(),
        layers: graph.layers,
        hidden,
        vocab,
        weights: graph
            .weights
            .iter()
            .map(|w| Weight {
                name: w.name.clone(),
                shape: w.shape.clone(),
            })
            .collect(),
        embedding,
        layer: nodes,
        head,
    };
    match fused.verify() {
        Ok(()) => Ok(fused),
        Err(violation) => Err(Diagnostics::one(
            &graph.source,
            internal(&violation.to_string()),
        )),
    }
}

fn internal(message: &str) -> Diagnostic {
    Diagnostic::new("fused-graph", Span::default(), message)
        .help("the rewrites of compiler/src/fuse let this pass: please report it")
}

/// The table, its rows and its columns.
fn embedding(graph: &TypedGraph, errors: &mut Vec<Diagnostic>) -> Option<(WeightId, usize, usize)> {
    if let [node] = graph.before.as_slice()
        && let (TypedOp::Embedding(op), Some(weight)) = (&node.op, node.weight)
    {
        return Some((WeightId(weight as u32), op.rows, op.columns));
    }
    let extra = graph
        .before
        .iter()
        .find(|node| !matches!(node.op, TypedOp::Embedding(_)));
    let span = extra
        .or(graph.before.last())
        .map_or_else(Span::default, |node| node.span);
    errors.push(
        Diagnostic::new("not-fused", span, "`before` must be one Embedding")
            .help("the state starts as the embedding's row; move other operators into the layer"),
    );
    None
}

fn layer_nodes(draft: &Draft, errors: &mut Vec<Diagnostic>) -> Vec<FusedNode> {
    explain_leftovers(draft, errors, |_| false);
    if !errors.is_empty() {
        return Vec::new();
    }
    let mut nodes = Vec::new();
    let mut version = 0;
    for item in &draft.items {
        match node(draft, item, version) {
            Ok(op) => {
                if matches!(&op, FusedOp::Linear(linear) if linear.epilogue == Epilogue::AddResidual)
                {
                    version += 1;
                }
                nodes.push(FusedNode {
                    name: item.name.clone(),
                    sources: item.sources.clone(),
                    span: item.span,
                    op,
                });
            }
            Err(error) => errors.push(error),
        }
    }
    let last_writes = draft.items.last().is_some_and(|item| {
        matches!(
            item.kind,
            Kind::Linear {
                epilogue: Epilogue::AddResidual,
                ..
            }
        )
    });
    if draft.result != Some(Value::Stream(version)) || !last_writes {
        let span = draft
            .items
            .last()
            .map_or_else(Span::default, |item| item.span);
        errors.push(
            Diagnostic::new(
                "not-fused",
                span,
                "the layer does not end by adding to its state",
            )
            .help(format!(
                "{} fuses {}; the last one must make the state that goes on",
                residual::REWRITE.name,
                residual::REWRITE.fuses
            )),
        );
    }
    nodes
}

fn node(draft: &Draft, item: &Item, version: usize) -> Result<FusedOp, Diagnostic> {
    match &item.kind {
        Kind::Linear {
            norm,
            parts,
            epilogue,
        } => Ok(FusedOp::Linear(FusedLinear {
            input: input(draft, item, version)?,
            norm: *norm,
            parts: parts.clone(),
            epilogue: *epilogue,
        })),
        Kind::Attention(heads) => Ok(FusedOp::Attention(FusedAttention {
            qkv: draft
                .maker(item.inputs[0])
                .map_or(usize::MAX, |linear| draft.position(linear.key)),
            heads: heads.heads,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            q_norm: heads.q_norm,
            k_norm: heads.k_norm,
            rope: heads.rope,
            scale: heads.scale,
        })),
        Kind::Op(op, _) => Err(left_over(
            item,
            op,
            merge_siblings::REWRITE.name,
            "it cannot be fused",
        )),
    }
}

/// What a linear multiplies.
fn input(draft: &Draft, item: &Item, version: usize) -> Result<Input, Diagnostic> {
    let value = item.inputs[0];
    match (value, draft.maker(value)) {
        (Value::Stream(read), _) if read == version => Ok(Input::Residual),
        (Value::Stream(_), _) => Err(Diagnostic::new(
            "not-fused",
            item.span,
            format!(
                "`{}` reads a state that the layer has already added to",
                item.name
            ),
        )
        .help("read the result of the last Add")),
        (Value::Out { .. }, Some(maker)) if maker.outputs() == 1 => {
            Ok(Input::Node(draft.position(maker.key)))
        }
        (_, maker) => {
            let message = match maker {
                Some(maker) => format!(
                    "`{}` reads one of the {} values of `{}`, which stay together",
                    item.name,
                    maker.outputs(),
                    maker.name
                ),
                None => format!("`{}` reads the token ids", item.name),
            };
            let help = format!(
                "{} takes together {}; let it read a value that is not one of several",
                merge_siblings::REWRITE.name,
                merge_siblings::REWRITE.fuses
            );
            Err(Diagnostic::new("not-fused", item.span, message).help(help))
        }
    }
}

fn head_linear(draft: &Draft, errors: &mut Vec<Diagnostic>) -> Option<FusedLinear> {
    let before = errors.len();
    explain_leftovers(draft, errors, |op| matches!(op, TypedOp::Sample(_)));
    if errors.len() > before {
        return None;
    }
    let span = draft
        .items
        .first()
        .map_or_else(Span::default, |item| item.span);
    let shape_error = |span, message: &str| {
        Diagnostic::new("not-fused", span, message)
            .help("`after` must be an LmHead of the state, perhaps with an RmsNorm before it, and a Sample")
    };
    let [linear, sample] = draft.items.as_slice() else {
        errors.push(shape_error(
            span,
            "`after` has more than one Linear or LmHead",
        ));
        return None;
    };
    let Kind::Linear {
        norm,
        parts,
        epilogue: Epilogue::Store,
    } = &linear.kind
    else {
        errors.push(shape_error(
            linear.span,
            "`after` does not begin with an LmHead",
        ));
        return None;
    };
    if linear.inputs != [Value::Stream(0)] || sample.inputs != [linear.output()] || parts.len() != 1
    {
        errors.push(shape_error(
            linear.span,
            "`after` is not an LmHead of the state and its Sample",
        ));
        return None;
    }
    Some(FusedLinear {
        input: Input::Residual,
        norm: *norm,
        parts: parts.clone(),
        epilogue: Epilogue::Store,
    })
}

/// One diagnostic for each place where a rewrite did not fit, however many operators are left over for it.
fn explain_leftovers(
    draft: &Draft,
    errors: &mut Vec<Diagnostic>,
    expected: impl Fn(&TypedOp) -> bool,
) {
    let mut explained: Vec<usize> = Vec::new();
    for item in &draft.items {
        let Kind::Op(op, _) = &item.kind else {
            continue;
        };
        if expected(op) {
            continue;
        }
        let (at, rewrite, reason) = explain(draft, item, op);
        if explained.contains(&at.key) {
            continue;
        }
        explained.push(at.key);
        let Kind::Op(op, _) = &at.kind else { continue };
        errors.push(match rewrite {
            Some(rewrite) => left_over(at, op, rewrite.name, &reason)
                .help(format!("{} fuses {}", rewrite.name, rewrite.fuses)),
            None => left_over(at, op, "", &reason),
        });
    }
}

fn left_over(item: &Item, op: &TypedOp, rewrite: &str, reason: &str) -> Diagnostic {
    let rule = if rewrite.is_empty() {
        "no rewrite takes it in".to_owned()
    } else {
        format!("the rewrite {rewrite} does not fit")
    };
    Diagnostic::new(
        "not-fused",
        item.span,
        format!("{} `{}` cannot be fused: {rule}", op.name(), item.name),
    )
    .label(reason)
}

/// The operator at which the rewrite for a left-over one should have fitted, that rewrite, and why it did not.
fn explain<'a>(
    draft: &'a Draft,
    item: &'a Item,
    op: &TypedOp,
) -> (&'a Item, Option<&'static Rewrite>, String) {
    let unknown = |reason: Option<String>| reason.unwrap_or_else(|| "it was left over".to_owned());
    // The operator further on that the pattern of a rewrite ends with.
    let end = |is_end: fn(&TypedOp) -> bool| {
        let mut reached = vec![item];
        let mut next = 0;
        while let Some(at) = reached.get(next).copied() {
            if matches!(&at.kind, Kind::Op(op, _) if is_end(op)) {
                return Some(at);
            }
            reached.extend(
                draft
                    .users(at.output())
                    .filter(|user| matches!(user.kind, Kind::Op(..))),
            );
            next += 1;
        }
        None
    };
    let attention = |missing: &str| match end(|op| matches!(op, TypedOp::Attention(_))) {
        Some(at) => (
            at,
            Some(&attention::REWRITE),
            unknown(attention::reason(draft, at)),
        ),
        None => (item, Some(&attention::REWRITE), missing.to_owned()),
    };
    match op {
        TypedOp::RmsNorm(norm) if norm.dims.len() > 1 => {
            attention("no Rope and Attention follow it")
        }
        TypedOp::RmsNorm(_) => (
            item,
            Some(&fold_norm::REWRITE),
            unknown(fold_norm::reason(draft, item)),
        ),
        TypedOp::Rope(_) | TypedOp::KvAppend(_) | TypedOp::Attention(_) => {
            attention("no Attention reads it")
        }
        TypedOp::Silu(_) => match end(|op| matches!(op, TypedOp::Mul(_))) {
            Some(mul) => (
                mul,
                Some(&swiglu::REWRITE),
                unknown(swiglu::reason(draft, mul)),
            ),
            None => (item, Some(&swiglu::REWRITE), "no Mul reads it".to_owned()),
        },
        TypedOp::Mul(_) => (
            item,
            Some(&swiglu::REWRITE),
            unknown(swiglu::reason(draft, item)),
        ),
        TypedOp::Add(_) => (
            item,
            Some(&residual::REWRITE),
            unknown(residual::reason(draft, item)),
        ),
        TypedOp::Embedding(_) => (item, None, "an Embedding stands in `before`".to_owned()),
        TypedOp::Sample(_) => (
            item,
            None,
            "a Sample stands at the end of `after`".to_owned(),
        ),
        TypedOp::Linear(_) | TypedOp::LmHead(_) => (item, None, "it has no weight".to_owned()),
    }
}
