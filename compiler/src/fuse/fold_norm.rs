//! fold-norm: an RMSNorm that only linears read becomes their prologue. A linear then reads the un-normed value, and the
//! mesh applies the one scalar of the norm after the product instead of in a step of its own.

use super::draft::{Draft, Item, Kind, Value};
use super::{FusedNorm, Rewrite};
use crate::ops::TypedOp;

pub(super) const REWRITE: Rewrite = Rewrite {
    name: "fold-norm",
    fuses: "an RmsNorm of one dimension that only Linears (or the LmHead) read",
    apply,
};

/// A norm and the linears that read it.
struct Found {
    norm: FusedNorm,
    input: Value,
    readers: Vec<usize>,
}

fn find(draft: &Draft, item: &Item) -> Result<Found, String> {
    let (Kind::Op(TypedOp::RmsNorm(op), Some(gamma)), [input]) =
        (&item.kind, item.inputs.as_slice())
    else {
        return Err("it is not an RmsNorm".to_owned());
    };
    if op.dims.len() != 1 {
        return Err("it norms every head on its own".to_owned());
    }
    if draft.result == Some(item.output()) {
        return Err("it goes on to the next layer".to_owned());
    }
    let mut readers = Vec::new();
    for user in draft.users(item.output()) {
        match user.kind {
            Kind::Linear { norm: None, .. } => readers.push(user.key),
            _ => return Err(format!("`{}`, which reads it, is not a Linear", user.name)),
        }
    }
    Ok(Found {
        norm: FusedNorm {
            gamma: *gamma,
            eps: op.eps,
        },
        input: *input,
        readers,
    })
}

/// Why it does not fit an RmsNorm.
pub(super) fn reason(draft: &Draft, item: &Item) -> Option<String> {
    find(draft, item).err()
}

fn apply(draft: &mut Draft) {
    for item in draft.items.clone() {
        let Ok(found) = find(draft, &item) else {
            continue;
        };
        for reader in found.readers {
            let Some(reader) = draft.item_mut(reader) else {
                continue;
            };
            if let Kind::Linear { norm, .. } = &mut reader.kind {
                *norm = Some(found.norm);
            }
            reader.inputs[0] = found.input;
            reader.absorb(&item, true);
        }
        draft.remove(&[item.key]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    #[test]
    fn folds_into_every_reader() {
        check(
            "fold-norm",
            r#""n": RmsNorm(input: "x", weight: "{layer}.n", eps: "eps"),
               "a": Linear(input: "n", weight: "{layer}.a", out: ["hidden"]),
               "b": Linear(input: "n", weight: "{layer}.b", out: ["hidden"]),
               "y": Add(a: "a", b: "b"),"#,
            "a = linear[norm, 1 parts, Store](stream 0)\n\
             b = linear[norm, 1 parts, Store](stream 0)\n\
             y = Add(a, b)\n",
        );
    }

    #[test]
    fn keeps_a_norm_that_others_read() {
        check(
            "fold-norm",
            r#""n": RmsNorm(input: "x", weight: "{layer}.n", eps: "eps"),
               "a": Linear(input: "n", weight: "{layer}.a", out: ["hidden"]),
               "y": Add(a: "a", b: "n"),"#,
            "n = RmsNorm(stream 0)\n\
             a = linear[1 parts, Store](n)\n\
             y = Add(a, n)\n",
        );
    }
}
