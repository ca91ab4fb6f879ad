//! attention: norm and RoPE of q and k, the cache and the attention itself become one node that reads the linear of q, k
//! and v. A KV-head group then does all of it on its own members.

use super::draft::{Draft, Heads, Item, Kind, Value};
use super::{Epilogue, FusedNorm, Rewrite, Rope, WeightId};
use crate::ops::TypedOp;

pub(super) const REWRITE: Rewrite = Rewrite {
    name: "attention",
    fuses: "`Attention(q: Rope(q), cache: KvAppend(k: Rope(k), v: v))` where q, k and v are Linears of one value, q and k \
            perhaps with an RmsNorm of every head before the Rope",
    apply,
};

/// What leads from a part of the linear to the attention or the cache.
struct Chain {
    rope: Rope,
    norm: Option<FusedNorm>,
    start: Value,
    /// In order of execution.
    items: Vec<Item>,
}

struct Found {
    linear: usize,
    /// Parts of the linear: q, k, v.
    parts: [WeightId; 3],
    heads: Heads,
    items: Vec<Item>,
}

fn find(draft: &Draft, attention: &Item) -> Result<Found, String> {
    let (Kind::Op(TypedOp::Attention(op), _), [q, cache]) =
        (&attention.kind, attention.inputs.as_slice())
    else {
        return Err("it is not an Attention".to_owned());
    };
    let append = draft
        .maker(*cache)
        .ok_or("its cache does not come from a KvAppend of the layer")?;
    let [k, v] = append.inputs.as_slice() else {
        return Err("its cache does not come from a KvAppend of the layer".to_owned());
    };
    let (q, k) = (chain(draft, "q", *q)?, chain(draft, "k", *k)?);
    if q.rope != k.rope {
        return Err("q and k have different Ropes".to_owned());
    }
    let linear = draft.maker(*v).filter(|item| {
        matches!(
            item.kind,
            Kind::Linear {
                epilogue: Epilogue::Store,
                ..
            }
        )
    });
    let linear = linear.ok_or("v is not a Linear")?;
    let Kind::Linear { parts, .. } = &linear.kind else {
        return Err("v is not a Linear".to_owned());
    };
    if parts.len() != 3 {
        return Err(format!(
            "{} Linears read the value that v reads; q, k and v must be all of them",
            parts.len()
        ));
    }
    let starts = [q.start, k.start, *v];
    let weights = starts.map(|start| match start {
        Value::Out { key, part } if key == linear.key => parts.get(part).copied(),
        _ => None,
    });
    let [Some(q_part), Some(k_part), Some(v_part)] = weights else {
        return Err("q, k and v are not Linears of one value".to_owned());
    };
    let made = q
        .items
        .iter()
        .chain(&k.items)
        .chain([append])
        .map(Item::output);
    if let Some(shared) = made.chain(starts).find_map(|value| draft.shared(value)) {
        return Err(shared);
    }
    Ok(Found {
        linear: linear.key,
        parts: [q_part, k_part, v_part],
        heads: Heads {
            heads: op.heads,
            kv_heads: op.kv_heads,
            head_dim: op.head_dim,
            q_norm: q.norm,
            k_norm: k.norm,
            rope: q.rope,
            scale: op.scale,
        },
        items: q
            .items
            .into_iter()
            .chain(k.items)
            .chain([append.clone()])
            .collect(),
    })
}

/// Follows `Rope(value)` or `Rope(RmsNorm(value))` back to the value.
fn chain(draft: &Draft, what: &str, end: Value) -> Result<Chain, String> {
    let last = draft.maker(end).ok_or(format!("{what} has no Rope"))?;
    let Kind::Op(TypedOp::Rope(rope), _) = &last.kind else {
        return Err(format!(
            "{what} has no Rope: it comes straight from `{}`",
            last.name
        ));
    };
    let before = last.inputs[0];
    let (norm, start, first) = match draft.maker(before) {
        Some(item) => match &item.kind {
            Kind::Op(TypedOp::RmsNorm(op), Some(gamma)) => (
                Some(FusedNorm {
                    gamma: *gamma,
                    eps: op.eps,
                }),
                item.inputs[0],
                Some(item),
            ),
            _ => (None, before, None),
        },
        None => (None, before, None),
    };
    let items = first.into_iter().chain([last]).cloned().collect();
    Ok(Chain {
        rope: rope.rope,
        norm,
        start,
        items,
    })
}

/// Why it does not fit an Attention.
pub(super) fn reason(draft: &Draft, item: &Item) -> Option<String> {
    find(draft, item).err()
}

fn apply(draft: &mut Draft) {
    for attention in draft.items.clone() {
        let Ok(found) = find(draft, &attention) else {
            continue;
        };
        if let Some(Item {
            kind: Kind::Linear { parts, .. },
            ..
        }) = draft.item_mut(found.linear)
        {
            *parts = found.parts.to_vec();
        }
        if let Some(fused) = draft.item_mut(attention.key) {
            fused.kind = Kind::Attention(found.heads);
            fused.inputs = vec![Value::Out {
                key: found.linear,
                part: 0,
            }];
            for item in found.items.iter().rev() {
                fused.absorb(item, true);
            }
        }
        draft.remove(&found.items.iter().map(|item| item.key).collect::<Vec<_>>());
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    /// `v` and `k` stand before `q`, to see that the parts are put in order.
    const LINEARS: &str = r#""v": Linear(input: "x", weight: "{layer}.v", out: [2, 8]),
        "k": Linear(input: "x", weight: "{layer}.k", out: [2, 8]),
        "q": Linear(input: "x", weight: "{layer}.q", out: [4, 8]),
        "a": Attention(q: "qr", cache: "c"),
        "y": Linear(input: "a", weight: "{layer}.o", out: ["hidden"]),"#;

    #[test]
    fn fuses_with_and_without_norms() {
        check(
            "attention",
            &format!(
                r#"{LINEARS} "qr": Rope(input: "q", theta: 10000), "kr": Rope(input: "k", theta: 10000),
                   "c": KvAppend(k: "kr", v: "v"),"#
            ),
            "vkq = linear[3 parts, Store](stream 0)\n\
             a = attention[4 heads, 0 norms](vkq.0)\n\
             y = linear[1 parts, Store](a)\n",
        );
        check(
            "attention",
            &format!(
                r#"{LINEARS} "qn": RmsNorm(input: "q", weight: "{{layer}}.qn", eps: "eps"),
                   "kn": RmsNorm(input: "k", weight: "{{layer}}.kn", eps: "eps"),
                   "qr": Rope(input: "qn", theta: 10000), "kr": Rope(input: "kn", theta: 10000),
                   "c": KvAppend(k: "kr", v: "v"),"#
            ),
            "vkq = linear[3 parts, Store](stream 0)\n\
             a = attention[4 heads, 2 norms](vkq.0)\n\
             y = linear[1 parts, Store](a)\n",
        );
    }

    #[test]
    fn keeps_ropes_that_differ() {
        check(
            "attention",
            &format!(
                r#"{LINEARS} "qr": Rope(input: "q", theta: 10000), "kr": Rope(input: "k", theta: 20000),
                   "c": KvAppend(k: "kr", v: "v"),"#
            ),
            "vkq = linear[3 parts, Store](stream 0)\n\
             qr = Rope(vkq.2)\n\
             kr = Rope(vkq.1)\n\
             c = KvAppend(kr, vkq.0)\n\
             a = Attention(qr, c)\n\
             y = linear[1 parts, Store](a)\n",
        );
    }
}
