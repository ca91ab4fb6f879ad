//! The phases of a layer in order: the linears and the attention, and the exchanges that bring each its input.

use super::{ProgramError, dataflow};
use crate::fuse::{Epilogue, FusedGraph, FusedLinear, FusedOp, Input};
use crate::mesh::{Mesh, Split};
use crate::plan::StreamForm;
use crate::program::{Along, Exchange, Linear, Next, Phase};

/// How many coordinates' words a reader takes side by side.
pub(super) fn side_by_side(exchange: &Exchange, mesh: &Mesh) -> usize {
    let along = |a: Along, size: usize| if a == Along::Concat { size } else { 1 };
    along(exchange.groups, mesh.groups) * along(exchange.members, mesh.members)
}

fn along(split: Split, everything: bool) -> Along {
    match (split, everything) {
        (Split::Columns, _) => Along::Sum,
        (Split::Rows, true) => Along::Concat,
        (Split::Rows, false) => Along::Own,
    }
}

/// A linear's output as a whole.
pub(super) fn stream_exchange(source: usize, linear: &Linear) -> Exchange {
    Exchange {
        source,
        groups: along(linear.placement.groups, true),
        members: along(linear.placement.members, true),
    }
}

/// A layer whose nodes are lowered, and what connects them.
pub(super) struct LayerShape<'a> {
    pub(super) graph: &'a FusedGraph,
    pub(super) linears: &'a [Linear],
    /// Index in `linears` of each linear node of the layer.
    pub(super) index_of: &'a [Option<usize>],
    pub(super) attention_node: usize,
}

impl LayerShape<'_> {
    /// The phases of a step, the residual stream in this form. `gathered`: where each of its writers, an index in
    /// `linears`, gathers the words of the scattered form.
    pub(super) fn phases(
        &self,
        form: StreamForm,
        gathered: &[(usize, usize)],
    ) -> Result<Vec<Phase>, ProgramError> {
        let mut phases = Vec::new();
        let mut stream_is_ready = true;
        for (i, node) in self.graph.layer.iter().enumerate() {
            let linear = match &node.op {
                FusedOp::Attention(a) => {
                    let qkv = self.index_of[a.qkv].ok_or_else(|| {
                        dataflow(&node.name, "q, k and v do not come from a linear")
                    })?;
                    let placement = self.linears[qkv].placement;
                    if placement.groups != Split::Rows {
                        return Err(dataflow(
                            &node.name,
                            "q, k and v are partial sums over groups",
                        ));
                    }
                    phases.push(Phase::Attention {
                        exchange: Exchange {
                            source: qkv,
                            groups: Along::Own,
                            members: along(placement.members, true),
                        },
                        next: self.reader_of_heads(&node.name)?,
                    });
                    continue;
                }
                FusedOp::Linear(linear) => linear,
            };
            let Some(index) = self.index_of[i] else {
                return Err(dataflow(&node.name, "not lowered"));
            };
            match linear.input {
                Input::Residual if !stream_is_ready => {
                    return Err(dataflow(
                        &node.name,
                        "it reads the residual stream, but not right after a node that writes it; such a layer is not supported yet",
                    ));
                }
                Input::Residual => stream_is_ready = false,
                Input::Node(from) if from == self.attention_node => {
                    phases.push(Phase::CollectHeads {
                        next: index,
                        all_groups: self.linears[index].placement.groups == Split::Rows,
                    })
                }
                Input::Node(from) => {
                    let source = self.index_of[from]
                        .ok_or_else(|| dataflow(&node.name, "its input is no linear"))?;
                    let (from, to) = (&self.linears[source], &self.linears[index]);
                    let exchange = Exchange {
                        source,
                        groups: along(from.placement.groups, to.placement.groups == Split::Rows),
                        members: along(from.placement.members, true),
                    };
                    phases.push(Phase::Collect {
                        exchange,
                        next: index,
                    });
                }
            }
            phases.push(Phase::Linear(index));
            if linear.epilogue == Epilogue::AddResidual {
                let exchange = stream_exchange(index, &self.linears[index]);
                let next = self.reader_after(i);
                match form {
                    StreamForm::Replicated => phases.push(Phase::AddToStream { exchange, next }),
                    StreamForm::Scattered => {
                        let words_at = gathered
                            .iter()
                            .find(|(l, _)| *l == index)
                            .map_or(0, |&(_, at)| at);
                        phases.push(Phase::ReduceScatter {
                            exchange,
                            words_at,
                            next,
                        });
                        phases.push(Phase::GatherStream {
                            exchange,
                            words_at,
                            next,
                        });
                    }
                }
                stream_is_ready = true;
            }
        }
        Ok(phases)
    }

    /// The next linear that reads the residual stream.
    /// The linear that multiplies attention's heads.
    fn reader_of_heads(&self, name: &str) -> Result<usize, ProgramError> {
        self.graph
            .layer
            .iter()
            .zip(self.index_of)
            .find_map(|(n, index)| match &n.op {
                FusedOp::Linear(FusedLinear {
                    input: Input::Node(from),
                    ..
                }) if *from == self.attention_node => *index,
                _ => None,
            })
            .ok_or_else(|| dataflow(name, "no linear reads its heads"))
    }

    fn reader_after(&self, node: usize) -> Next {
        self.graph.layer[node + 1..]
            .iter()
            .zip(&self.index_of[node + 1..])
            .find_map(|(n, index)| match &n.op {
                FusedOp::Linear(FusedLinear {
                    input: Input::Residual,
                    ..
                }) => *index,
                _ => None,
            })
            .map_or(Next::NextLayer, Next::SameLayer)
    }
}
