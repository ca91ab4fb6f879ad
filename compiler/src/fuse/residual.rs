//! residual: a linear's result added to the state becomes a linear that adds to the residual stream in place. In place is
//! right only if nothing reads the old state any more, so the stream has versions here.

use super::draft::{Draft, Item, Kind, Value};
use super::{Epilogue, Rewrite};
use crate::ops::TypedOp;

pub(super) const REWRITE: Rewrite = Rewrite {
    name: "residual",
    fuses: "`Add` of the state and a Linear that nothing else reads, where nothing reads the old state later",
    apply,
};

struct Found {
    linear: usize,
    version: usize,
}

fn find(draft: &Draft, add: &Item) -> Result<Found, String> {
    let (Kind::Op(TypedOp::Add(_), _), [a, b]) = (&add.kind, add.inputs.as_slice()) else {
        return Err("it is not an Add".to_owned());
    };
    let (version, sum) = match (*a, *b) {
        (Value::Stream(version), sum) | (sum, Value::Stream(version)) => (version, sum),
        _ => return Err("neither side is the state".to_owned()),
    };
    let linear = draft.maker(sum).filter(|item| {
        matches!(&item.kind, Kind::Linear { parts, epilogue: Epilogue::Store, .. } if parts.len() == 1)
    });
    let linear =
        linear.ok_or("the side that is not the state does not come from a Linear of its own")?;
    if let Some(shared) = draft.shared(sum) {
        return Err(shared);
    }
    let old = Value::Stream(version);
    let after = draft.position(linear.key);
    if linear.inputs.contains(&old) {
        return Err(format!(
            "`{}` itself reads the state that it would add to",
            linear.name
        ));
    }
    if let Some(late) = draft
        .users(old)
        .find(|user| user.key != add.key && draft.position(user.key) >= after)
    {
        return Err(format!("`{}` reads the old state later", late.name));
    }
    if draft.result == Some(old) {
        return Err("the old state goes on to the next layer".to_owned());
    }
    Ok(Found {
        linear: linear.key,
        version,
    })
}

/// Why it does not fit an Add.
pub(super) fn reason(draft: &Draft, item: &Item) -> Option<String> {
    find(draft, item).err()
}

fn apply(draft: &mut Draft) {
    // The stream that a later Add adds to is known only after the earlier one is fused: in order of execution.
    for key in draft.items.iter().map(|item| item.key).collect::<Vec<_>>() {
        let Some(add) = draft.items.iter().find(|item| item.key == key).cloned() else {
            continue;
        };
        let Ok(found) = find(draft, &add) else {
            continue;
        };
        let Some(linear) = draft.item_mut(found.linear) else {
            continue;
        };
        if let Kind::Linear { epilogue, .. } = &mut linear.kind {
            *epilogue = Epilogue::AddResidual;
        }
        linear.inputs.push(Value::Stream(found.version));
        linear.absorb(&add, false);
        draft.replace(add.output(), Value::Stream(found.version + 1));
        draft.remove(&[add.key]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    #[test]
    fn adds_in_place_one_after_the_other() {
        check(
            "residual",
            r#""a": Linear(input: "x", weight: "{layer}.a", out: ["hidden"]),
               "b": Linear(input: "a", weight: "{layer}.b", out: ["hidden"]),
               "h": Add(a: "x", b: "b"),
               "c": Linear(input: "h", weight: "{layer}.c", out: ["hidden"]),
               "d": Linear(input: "c", weight: "{layer}.d", out: ["hidden"]),
               "y": Add(a: "d", b: "h"),"#,
            "a = linear[1 parts, Store](stream 0)\n\
             b = linear[1 parts, AddResidual](a, stream 0)\n\
             c = linear[1 parts, Store](stream 1)\n\
             d = linear[1 parts, AddResidual](c, stream 1)\n",
        );
    }

    #[test]
    fn keeps_an_add_to_a_state_that_is_read_later() {
        check(
            "residual",
            r#""a": Linear(input: "x", weight: "{layer}.a", out: ["hidden"]),
               "b": Linear(input: "a", weight: "{layer}.b", out: ["hidden"]),
               "h": Add(a: "x", b: "b"),
               "c": Linear(input: "h", weight: "{layer}.c", out: ["hidden"]),
               "y": Add(a: "c", b: "x"),"#,
            "a = linear[1 parts, Store](stream 0)\n\
             b = linear[1 parts, Store](a)\n\
             h = Add(stream 0, b)\n\
             c = linear[1 parts, AddResidual](h, stream 0)\n",
        );
    }
}
