//! A graph as text, one operator a line, in order of execution.

use std::fmt;

use super::{Expr, Graph, Node, Spanned, Symbol};
use crate::ops::Op;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {}", self.name.value)?;
        for expectation in &self.expect {
            let values: Vec<_> = expectation.values.iter().map(ToString::to_string).collect();
            writeln!(
                f,
                "expect {} = {}",
                list(&expectation.keys),
                values.join(" or ")
            )?;
        }
        self.dims
            .iter()
            .try_for_each(|symbol| write_symbol(f, "dim", symbol))?;
        self.params
            .iter()
            .try_for_each(|symbol| write_symbol(f, "param", symbol))?;
        writeln!(f, "before:")?;
        self.before
            .iter()
            .try_for_each(|node| write_node(f, node))?;
        let layers = &self.layers;
        writeln!(
            f,
            "layers, {} times, {} = {}, then {}:",
            layers.repeat.value, layers.state.value, layers.first.value, layers.next.value
        )?;
        layers
            .nodes
            .iter()
            .try_for_each(|node| write_node(f, node))?;
        writeln!(f, "after:")?;
        self.after.iter().try_for_each(|node| write_node(f, node))
    }
}

fn list(items: &[Spanned<String>]) -> String {
    items
        .iter()
        .map(|item| item.as_str())
        .collect::<Vec<_>>()
        .join(" | ")
}

fn write_symbol(f: &mut fmt::Formatter<'_>, kind: &str, symbol: &Symbol) -> fmt::Result {
    let origin = &symbol.origin;
    write!(
        f,
        "{kind} {} = config {}",
        symbol.name.value,
        list(&origin.keys)
    )?;
    if let Some(absent) = &origin.absent {
        write!(f, ", if absent {}", absent.value)?;
    }
    writeln!(f, "; without config {}", origin.default.value)
}

fn write_node(f: &mut fmt::Formatter<'_>, node: &Node) -> fmt::Result {
    let inputs: Vec<_> = node
        .op
        .inputs()
        .into_iter()
        .map(|input| input.as_str())
        .collect();
    writeln!(
        f,
        "  {} = {}({}){}",
        node.id.value,
        node.op.name(),
        inputs.join(", "),
        details(&node.op)
    )
}

/// What an operator is given besides its inputs.
fn details(op: &Op) -> String {
    let text = |expr: &Spanned<Expr>| expr.value.to_string();
    match op {
        Op::Embedding(op) => format!(
            " {} [{}, {}]",
            op.weight.value,
            text(&op.rows),
            text(&op.columns)
        ),
        Op::RmsNorm(op) => format!(" {} eps {}", op.weight.value, text(&op.eps)),
        Op::Linear(op) => {
            let out: Vec<_> = op.out.iter().map(text).collect();
            format!(" {} to [{}]", op.weight.value, out.join(", "))
        }
        Op::Rope(op) => {
            let scaling = op.llama3.as_ref().map_or_else(String::new, |s| {
                format!(
                    " llama3(factor {}, low {}, high {}, context {})",
                    text(&s.factor),
                    text(&s.low_freq_factor),
                    text(&s.high_freq_factor),
                    text(&s.original_context)
                )
            });
            format!(" theta {}{scaling}", text(&op.theta))
        }
        Op::Attention(op) => op
            .scale
            .as_ref()
            .map_or_else(String::new, |scale| format!(" scale {}", text(scale))),
        Op::LmHead(op) => format!(
            " {} to [{}], if {} {}",
            op.weight.value,
            text(&op.rows),
            text(&op.tied),
            op.tied_weight.value
        ),
        Op::KvAppend(_) | Op::Silu(_) | Op::Mul(_) | Op::Add(_) | Op::Sample(_) => String::new(),
    }
}
