//! A fused graph as text, one node a line.

use std::fmt;

use super::{Epilogue, FusedGraph, FusedLinear, FusedNorm, FusedOp, Input, Rope, WeightId};
use crate::ops::join;

impl fmt::Display for FusedGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "fused graph {}, {} layers, hidden {}, vocab {}",
            self.name, self.layers, self.hidden, self.vocab
        )?;
        writeln!(f, "embedding {}", self.weight_text(self.embedding))?;
        writeln!(f, "layer:")?;
        for node in &self.layer {
            write!(f, "  {} = ", node.name)?;
            match &node.op {
                FusedOp::Linear(linear) => self.write_linear(f, linear)?,
                FusedOp::Attention(attention) => {
                    let norm = |which: &str, norm: &Option<FusedNorm>| {
                        norm.map_or_else(String::new, |norm| {
                            format!(", {which} {}", self.norm_text(norm))
                        })
                    };
                    writeln!(
                        f,
                        "attention({}) {} heads over {} of {}{}{}, {}, scale {:?}",
                        self.node_name(attention.qkv),
                        attention.heads,
                        attention.kv_heads,
                        attention.head_dim,
                        norm("q", &attention.q_norm),
                        norm("k", &attention.k_norm),
                        rope_text(&attention.rope),
                        attention.scale,
                    )?;
                }
            }
            writeln!(f, "    from {}", node.sources.join(", "))?;
        }
        write!(f, "head: ")?;
        self.write_linear(f, &self.head)
    }
}

impl FusedGraph {
    fn weight_text(&self, id: WeightId) -> String {
        match self.weights.get(id.0 as usize) {
            Some(weight) => format!("{} [{}]", weight.name, join(&weight.shape)),
            None => format!("weight {}, which there is not", id.0),
        }
    }

    fn node_name(&self, index: usize) -> &str {
        self.layer.get(index).map_or("no node", |node| &node.name)
    }

    fn norm_text(&self, norm: FusedNorm) -> String {
        format!("norm {} eps {:?}", self.weight_text(norm.gamma), norm.eps)
    }

    fn write_linear(&self, f: &mut fmt::Formatter<'_>, linear: &FusedLinear) -> fmt::Result {
        let input = match linear.input {
            Input::Residual => "residual",
            Input::Node(index) => self.node_name(index),
        };
        let epilogue = match linear.epilogue {
            Epilogue::Store => "store",
            Epilogue::SwiGlu => "swiglu",
            Epilogue::AddResidual => "add to residual",
        };
        writeln!(f, "linear({input}), {epilogue}")?;
        if let Some(norm) = linear.norm {
            writeln!(f, "    {}", self.norm_text(norm))?;
        }
        for part in &linear.parts {
            writeln!(f, "    part {}", self.weight_text(*part))?;
        }
        Ok(())
    }
}

fn rope_text(rope: &Rope) -> String {
    let scaling = rope.scaling.map_or_else(String::new, |s| {
        format!(
            " llama3(factor {}, low {}, high {}, context {})",
            s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context
        )
    });
    format!("rope theta {}{scaling}", rope.theta)
}
