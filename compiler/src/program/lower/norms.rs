//! Where the gammas of the norms lie: those of a layer side by side, layer after layer, the last norm's behind them.

use crate::fuse::{FusedGraph, FusedNorm, WeightId};
use crate::program::{Attention, Linear, Norm, Norms};

/// Collects the gammas; offsets are known once all of a layer's are.
pub(super) struct NormTable {
    layer: Vec<(WeightId, usize)>,
    stride: usize,
    last: Option<WeightId>,
    lengths: Vec<usize>,
}

impl NormTable {
    pub(super) fn new(graph: &FusedGraph) -> NormTable {
        let lengths = graph
            .weights
            .iter()
            .map(|weight| weight.shape.iter().product())
            .collect();
        NormTable {
            layer: Vec::new(),
            stride: 0,
            last: None,
            lengths,
        }
    }

    pub(super) fn add(&mut self, norm: FusedNorm) -> Norm {
        let at = self.stride;
        self.layer.push((norm.gamma, at));
        self.stride += self.lengths[norm.gamma.0 as usize].next_multiple_of(8);
        Norm {
            gamma: norm.gamma,
            gamma_at: at,
            gamma_stride: 0,
            eps: norm.eps,
        }
    }

    pub(super) fn add_last(&mut self, norm: FusedNorm) -> Norm {
        self.last = Some(norm.gamma);
        Norm {
            gamma: norm.gamma,
            gamma_at: 0,
            gamma_stride: 0,
            eps: norm.eps,
        }
    }

    pub(super) fn finish(
        self,
        graph: &FusedGraph,
        linears: &mut [Linear],
        head: &mut Linear,
        attention: &mut Attention,
    ) -> Norms {
        let of_layer = linears.iter_mut().filter_map(|linear| linear.norm.as_mut());
        for norm in of_layer
            .chain(attention.q_norm.as_mut())
            .chain(attention.k_norm.as_mut())
        {
            norm.gamma_stride = self.stride;
        }
        let last_at = graph.layers * self.stride;
        if let Some(norm) = &mut head.norm {
            norm.gamma_at = last_at;
        }
        let last = self
            .last
            .map_or(0, |weight| self.lengths[weight.0 as usize]);
        Norms {
            layer: self.layer,
            layer_stride: self.stride,
            last: self.last,
            len: last_at + last,
        }
    }
}
