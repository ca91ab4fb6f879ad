//! A typed graph as text, one value a line.

use std::fmt;

use super::{TypedGraph, TypedNode, ValueRef};
use crate::ops::{TypedOp, join};

impl fmt::Display for TypedGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "typed graph {}, {} parameters",
            self.name,
            self.parameters()
        )?;
        for (name, value) in self.symbols.iter() {
            writeln!(f, "{name} = {value}")?;
        }
        writeln!(f, "before:")?;
        self.write_section(f, &self.before)?;
        let (first, next) = (&self.before[self.first].id, &self.layer[self.next].id);
        writeln!(
            f,
            "layers, {} times, state {} = {first}, then {next}:",
            self.layers, self.state
        )?;
        self.write_section(f, &self.layer)?;
        writeln!(f, "after:")?;
        self.write_section(f, &self.after)
    }
}

impl TypedGraph {
    fn write_section(&self, f: &mut fmt::Formatter<'_>, nodes: &[TypedNode]) -> fmt::Result {
        for node in nodes {
            let inputs: Vec<_> = node
                .inputs
                .iter()
                .map(|input| name(nodes, *input))
                .collect();
            write!(
                f,
                "  {}: {} = {}({})",
                node.id,
                node.op.output(),
                node.op.name(),
                inputs.join(", ")
            )?;
            if let Some(weight) = node.weight.map(|index| &self.weights[index]) {
                write!(f, " {} bf16[{}]", weight.name, join(&weight.shape))?;
            }
            writeln!(f, "{}", details(&node.op))?;
        }
        Ok(())
    }
}

fn name(nodes: &[TypedNode], input: ValueRef) -> &str {
    match input {
        ValueRef::Tokens => "tokens",
        ValueRef::State => "state",
        ValueRef::Node(at) => &nodes[at].id,
    }
}

/// Numbers of an operator that no shape shows.
fn details(op: &TypedOp) -> String {
    match op {
        TypedOp::RmsNorm(op) => format!(" eps {:?}", op.eps),
        TypedOp::Rope(op) => {
            let scaling = op.rope.scaling.map_or_else(String::new, |s| {
                format!(
                    " llama3(factor {}, low {}, high {}, context {})",
                    s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context
                )
            });
            format!(" theta {}{scaling}", op.rope.theta)
        }
        TypedOp::Attention(op) => format!(" scale {:?}", op.scale),
        TypedOp::Embedding(_)
        | TypedOp::Linear(_)
        | TypedOp::KvAppend(_)
        | TypedOp::Silu(_)
        | TypedOp::Mul(_)
        | TypedOp::Add(_)
        | TypedOp::LmHead(_)
        | TypedOp::Sample(_) => String::new(),
    }
}
