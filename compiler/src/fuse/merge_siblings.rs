//! merge-siblings: linears that multiply the same value become one linear of several parts, so that the value is fetched
//! once and their rows can be dealt to the mesh together.

use super::draft::{Draft, Item, Kind, Value};
use super::{Epilogue, Rewrite};
use crate::graph::is_identifier;

pub(super) const REWRITE: Rewrite = Rewrite {
    name: "merge-siblings",
    fuses: "Linears that read the same value through the same norm",
    apply,
};

fn are_siblings(a: &Item, b: &Item) -> bool {
    match (&a.kind, &b.kind) {
        (
            Kind::Linear {
                norm: a_norm,
                epilogue: Epilogue::Store,
                ..
            },
            Kind::Linear {
                norm: b_norm,
                epilogue: Epilogue::Store,
                ..
            },
        ) => a.inputs == b.inputs && a_norm == b_norm,
        _ => false,
    }
}

fn apply(draft: &mut Draft) {
    for key in draft.items.iter().map(|item| item.key).collect::<Vec<_>>() {
        let Some(first) = draft.items.iter().find(|item| item.key == key).cloned() else {
            continue;
        };
        let (_, later) = draft.items.split_at(draft.position(key) + 1);
        let siblings: Vec<Item> = later
            .iter()
            .filter(|item| are_siblings(&first, item))
            .cloned()
            .collect();
        for sibling in &siblings {
            let Kind::Linear { parts: more, .. } = &sibling.kind else {
                continue;
            };
            let Some(merged) = draft.item_mut(key) else {
                continue;
            };
            let Kind::Linear { parts, .. } = &mut merged.kind else {
                continue;
            };
            let offset = parts.len();
            parts.extend(more);
            merged.absorb(sibling, false);
            for part in 0..more.len() {
                let old = Value::Out {
                    key: sibling.key,
                    part,
                };
                draft.replace(
                    old,
                    Value::Out {
                        key,
                        part: offset + part,
                    },
                );
            }
        }
        draft.remove(&siblings.iter().map(|item| item.key).collect::<Vec<_>>());
        let names: Vec<&str> = [&first]
            .into_iter()
            .chain(&siblings)
            .map(|item| item.name.as_str())
            .collect();
        let name = join_names(&names);
        // A name that is too long, or another's, is no name: then the first one's stands for all.
        let free = is_identifier(&name) && draft.items.iter().all(|item| item.name != name);
        if let Some(merged) = draft.item_mut(key).filter(|_| free) {
            merged.name = name;
        }
    }
}

/// `q`, `k`, `v` make `qkv`; `gate`, `up` make `gate_up`.
fn join_names(names: &[&str]) -> String {
    let separator = if names.iter().all(|name| name.len() == 1) {
        ""
    } else {
        "_"
    };
    names.join(separator)
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    #[test]
    fn merges_what_reads_one_value() {
        check(
            "merge-siblings",
            r#""a": Linear(input: "x", weight: "{layer}.a", out: ["hidden"]),
               "s": Silu(input: "a"),
               "b": Linear(input: "x", weight: "{layer}.b", out: ["hidden"]),
               "c": Linear(input: "s", weight: "{layer}.c", out: ["hidden"]),
               "t": Add(a: "b", b: "c"),
               "y": Add(a: "t", b: "x"),"#,
            "ab = linear[2 parts, Store](stream 0)\n\
             s = Silu(ab.0)\n\
             c = linear[1 parts, Store](s)\n\
             t = Add(ab.1, c)\n\
             y = Add(t, stream 0)\n",
        );
    }

    #[test]
    fn merged_names_stay_names() {
        check(
            "merge-siblings",
            r#""a": Linear(input: "x", weight: "{layer}.a", out: ["hidden"]),
               "b": Linear(input: "x", weight: "{layer}.b", out: ["hidden"]),
               "ab": Add(a: "a", b: "b"),
               "y": Add(a: "ab", b: "x"),"#,
            "a = linear[2 parts, Store](stream 0)\n\
             ab = Add(a.0, a.1)\n\
             y = Add(ab, stream 0)\n",
        );
    }

    #[test]
    fn keeps_apart_what_is_normed_differently() {
        check(
            "merge-siblings",
            r#""n": RmsNorm(input: "x", weight: "{layer}.n", eps: "eps"),
               "gate": Linear(input: "n", weight: "{layer}.a", out: ["hidden"]),
               "up": Linear(input: "x", weight: "{layer}.b", out: ["hidden"]),
               "y": Add(a: "gate", b: "up"),"#,
            "gate = linear[norm, 1 parts, Store](stream 0)\n\
             up = linear[1 parts, Store](stream 0)\n\
             y = Add(gate, up)\n",
        );
    }
}
