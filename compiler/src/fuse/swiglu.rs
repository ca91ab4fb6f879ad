//! swiglu: `Silu` of one part of a linear times its other part becomes the linear's epilogue (Shazeer, arXiv:2002.05202).

use super::draft::{Draft, Item, Kind, Value};
use super::{Epilogue, Rewrite};
use crate::ops::TypedOp;

pub(super) const REWRITE: Rewrite = Rewrite {
    name: "swiglu",
    fuses: "`Mul(Silu(gate), up)` where gate and up are Linears of one value that nothing else reads",
    apply,
};

/// The linear, which of its parts is the gate, and the Silu.
struct Found {
    linear: usize,
    gate: usize,
    silu: Item,
}

fn find(draft: &Draft, mul: &Item) -> Result<Found, String> {
    let (Kind::Op(TypedOp::Mul(_), _), [a, b]) = (&mul.kind, mul.inputs.as_slice()) else {
        return Err("it is not a Mul".to_owned());
    };
    let is_silu = |item: &&Item| matches!(item.kind, Kind::Op(TypedOp::Silu(_), _));
    let (silu, up) = match (
        draft.maker(*a).filter(is_silu),
        draft.maker(*b).filter(is_silu),
    ) {
        (Some(silu), _) => (silu, *b),
        (None, Some(silu)) => (silu, *a),
        (None, None) => return Err("neither side is a Silu".to_owned()),
    };
    let gate = silu.inputs[0];
    let (Value::Out { key, part }, Value::Out { key: up_key, .. }) = (gate, up) else {
        return Err("gate and up must be results of Linears".to_owned());
    };
    let Some(linear) = draft.maker(gate).filter(|item| {
        key == up_key
            && gate != up
            && matches!(
                &item.kind,
                Kind::Linear {
                    epilogue: Epilogue::Store,
                    ..
                }
            )
    }) else {
        return Err("its two sides do not come from two Linears that read one value".to_owned());
    };
    if linear.outputs() != 2 {
        return Err(format!(
            "{} Linears read the value that gate and up read",
            linear.outputs()
        ));
    }
    match [gate, up, silu.output()]
        .into_iter()
        .find_map(|value| draft.shared(value))
    {
        Some(shared) => Err(shared),
        None => Ok(Found {
            linear: key,
            gate: part,
            silu: silu.clone(),
        }),
    }
}

/// Why it does not fit a Mul.
pub(super) fn reason(draft: &Draft, item: &Item) -> Option<String> {
    find(draft, item).err()
}

fn apply(draft: &mut Draft) {
    for mul in draft.items.clone() {
        let Ok(found) = find(draft, &mul) else {
            continue;
        };
        let Some(linear) = draft.item_mut(found.linear) else {
            continue;
        };
        if let Kind::Linear {
            parts, epilogue, ..
        } = &mut linear.kind
        {
            // The gate is the first part.
            parts.rotate_left(found.gate);
            *epilogue = Epilogue::SwiGlu;
        }
        linear.absorb(&found.silu, false);
        linear.absorb(&mul, false);
        let output = linear.output();
        draft.replace(mul.output(), output);
        draft.remove(&[found.silu.key, mul.key]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    const LINEARS: &str = r#""gate": Linear(input: "x", weight: "{layer}.a", out: ["ffn"]),
        "up": Linear(input: "x", weight: "{layer}.b", out: ["ffn"]),
        "y": Linear(input: "m", weight: "{layer}.c", out: ["hidden"]),"#;

    #[test]
    fn fuses_either_order() {
        for (a, b) in [("s", "up"), ("up", "s")] {
            check(
                "swiglu",
                &format!(r#"{LINEARS} "s": Silu(input: "gate"), "m": Mul(a: "{a}", b: "{b}"),"#),
                "gate_up = linear[2 parts, SwiGlu](stream 0)\n\
                 y = linear[1 parts, Store](gate_up)\n",
            );
        }
    }

    #[test]
    fn keeps_a_gate_that_gates_itself() {
        check(
            "swiglu",
            r#""a": Linear(input: "x", weight: "{layer}.a", out: ["hidden"]),
               "s": Silu(input: "a"),
               "y": Mul(a: "s", b: "a"),"#,
            "a = linear[1 parts, Store](stream 0)\ns = Silu(a)\ny = Mul(s, a)\n",
        );
    }
}
