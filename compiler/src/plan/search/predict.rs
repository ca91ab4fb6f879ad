//! What the search predicts of a plan: bytes and counts go into the cost model's formulas (`cost.rs`), step by step.

use super::{Frame, Search};
use crate::cost::{Prediction, StepCost};
use crate::fuse::{Epilogue, FusedLinear, FusedOp};
use crate::mesh::{Placement, Split};
use crate::plan::{Plan, StepPlan, StreamForm, Transport};
use crate::program::{CONSUMER_WARPS, Linear, Program, STRIPE, TILE, TILE_BYTES, VALUES_PER_WORD};

impl Search<'_> {
    pub(super) fn weight_bytes(&self) -> u64 {
        let bytes = |linear: &FusedLinear| -> u64 {
            linear
                .parts
                .iter()
                .map(|w| {
                    self.graph.weights[w.0 as usize]
                        .shape
                        .iter()
                        .product::<usize>() as u64
                        * 2
                })
                .sum()
        };
        let layer: u64 = self
            .graph
            .layer
            .iter()
            .map(|node| {
                if let FusedOp::Linear(linear) = &node.op {
                    bytes(linear)
                } else {
                    0
                }
            })
            .sum();
        layer * self.graph.layers as u64 + bytes(&self.graph.head)
    }

    pub(super) fn cost(&self, frame: &Frame<'_>, step: &StepPlan, decode: bool) -> StepCost {
        let (mesh, costs) = (&frame.mesh, &self.costs);
        let threads = CONSUMER_WARPS * 32;
        let (mut tiles, mut chain) = (0, 0.0);
        for (i, node) in self.graph.layer.iter().enumerate() {
            let (linear, placement) = match (&node.op, frame.placements[i]) {
                (FusedOp::Linear(linear), Some(placement)) => (linear, placement),
                _ => {
                    chain += self.attention_cost(frame, step);
                    continue;
                }
            };
            let rows: usize = linear
                .parts
                .iter()
                .map(|w| self.graph.weights[w.0 as usize].shape[0])
                .sum();
            let columns = self.graph.columns(linear);
            // The largest slice decides.
            let over = |size: usize, split: Split| {
                let groups = if placement.groups == split {
                    mesh.groups
                } else {
                    1
                };
                let members = if placement.members == split {
                    mesh.members
                } else {
                    1
                };
                (size / TILE).div_ceil(groups).div_ceil(members)
            };
            let (row_tiles, k_tiles) = (over(rows, Split::Rows), over(columns, Split::Columns));
            tiles += row_tiles * k_tiles;
            chain += costs.linear + costs.pass * row_tiles.div_ceil(4).saturating_sub(1) as f64;
            let outputs = if linear.epilogue == Epilogue::SwiGlu {
                rows / 2
            } else {
                rows
            };
            chain += self.exchange_cost(frame, step, linear, placement, outputs, threads);
        }
        let positions = if decode {
            self.target.batch * self.target.depth()
        } else {
            self.target.depth()
        };
        let kv_bytes = positions * 2 * self.attention.kv_heads * self.attention.head_dim * 2;
        let layer_stream =
            (tiles * TILE_BYTES * mesh.workers() + kv_bytes) as f64 / self.machine.stream_rate();
        let layer = costs.overlap(layer_stream, chain);
        let head = if decode {
            let head_tiles =
                (self.graph.vocab / TILE).div_ceil(mesh.ctas) * self.graph.hidden / TILE;
            (head_tiles * TILE_BYTES * mesh.ctas) as f64 / self.machine.stream_rate()
                + 2.0 * costs.hop
        } else {
            costs.hop
        };
        let total = layer * self.graph.layers as f64 + head;
        StepCost {
            layer_stream,
            layer_chain: chain,
            layer,
            head,
            total,
        }
    }

    /// Adds to the prediction what the program's ring costs: small pages keep too few bytes in flight, and each is some
    /// work to use up.
    pub(super) fn add_ring(&self, plan: &mut Plan, program: &Program) {
        let (costs, ring, mesh) = (&self.costs, &program.ring, &plan.mesh);
        let whole = self.machine.stream_rate();
        let pages = |linear: &Linear| {
            let t = &linear.tiling;
            t.passes * t.k.div_ceil(t.page_k)
        };
        let stretched = |stream: f64, ctas: usize, pages: usize, in_flight: usize| {
            let rate = costs.ring_rate(whole, in_flight * ring.page_bytes, ctas);
            (stream * whole / rate).max(pages as f64 * costs.page)
        };
        let of_layer: usize = program.linears.iter().map(pages).sum();
        let [prefill, decode] =
            [&program.prefill, &program.decode].map(|step| program.exchanges(step));
        for (step, exchanges, with_head) in [
            (&mut plan.prefill, prefill, false),
            (&mut plan.decode, decode, true),
        ] {
            let cost = &mut step.cost;
            cost.layer_stream =
                stretched(cost.layer_stream, mesh.workers(), of_layer, ring.in_flight)
                    + costs.stalls(whole, ring, exchanges, mesh.workers());
            cost.layer = costs.overlap(cost.layer_stream, cost.layer_chain);
            if with_head {
                cost.head = stretched(
                    cost.head,
                    mesh.ctas,
                    pages(&program.head),
                    ring.head_in_flight,
                );
            }
            cost.total = cost.layer * self.graph.layers as f64 + cost.head;
        }
    }

    /// Replaces what the plan was chosen by with what the phases of its program are predicted to take.
    pub(super) fn predict(&self, plan: &mut Plan, program: &Program) {
        for (step, decode) in [(&mut plan.prefill, false), (&mut plan.decode, true)] {
            let predicted = Prediction::new(program, &self.machine, decode, self.target.depth());
            step.cost.layer = predicted.phases.iter().sum();
            step.cost.head = predicted.head;
            step.cost.total = predicted.total;
        }
    }

    /// What it takes to bring a linear's output to its reader.
    fn exchange_cost(
        &self,
        frame: &Frame<'_>,
        step: &StepPlan,
        linear: &FusedLinear,
        placement: Placement,
        outputs: usize,
        threads: usize,
    ) -> f64 {
        let (mesh, costs) = (&frame.mesh, &self.costs);
        let partials = |split: Split, size: usize| if split == Split::Columns { size } else { 1 };
        let sums =
            partials(placement.groups, mesh.groups) * partials(placement.members, mesh.members);
        let words = step.columns * outputs.div_ceil(VALUES_PER_WORD);
        let bytes = step.columns * outputs * 2;
        match linear.epilogue {
            Epilogue::AddResidual => match (step.transport, step.stream) {
                (Transport::Rows, _) => {
                    costs.exchange_of_rows((bytes * sums).div_ceil(mesh.workers()))
                        + costs.exchange_of_rows(bytes)
                }
                (Transport::Words, StreamForm::Replicated) => costs.exchange(words * sums, threads),
                (Transport::Words, StreamForm::Scattered) => {
                    costs.exchange((words * sums).div_ceil(mesh.workers()), threads)
                        + costs.exchange(words, threads)
                }
            },
            // Read by the group, or by all where the next linear does not split its columns over the groups.
            Epilogue::SwiGlu | Epilogue::Store => {
                let reader = self.stream_placement(frame);
                let all = linear.epilogue == Epilogue::SwiGlu && reader.groups == Split::Rows;
                let parts = if all { 1 } else { mesh.groups };
                match step.transport {
                    Transport::Rows => costs.exchange_of_rows(bytes.div_ceil(parts)),
                    Transport::Words => costs.exchange(words.div_ceil(parts) * sums, threads),
                }
            }
        }
    }

    fn attention_cost(&self, frame: &Frame<'_>, step: &StepPlan) -> f64 {
        let (mesh, costs, a) = (&frame.mesh, &self.costs, self.attention);
        let heads = a.heads / mesh.groups;
        let tasks = step.columns * heads / frame.heads_per_task * step.kv_splits;
        let stripes = self.target.depth().div_ceil(STRIPE);
        let active = stripes.min(step.kv_splits);
        let of_batch = costs.kv_batch + costs.kv_head * frame.heads_per_task as f64;
        let task = stripes.div_ceil(active) as f64 * of_batch;
        let heads_of_reader = if self.stream_placement(frame).groups == Split::Rows {
            a.heads
        } else {
            heads
        };
        let copies = if step.kv_splits > 1 { 2 * active } else { 1 };
        let words = step.columns * heads_of_reader * a.head_dim.div_ceil(VALUES_PER_WORD) * copies;
        let exchange = match step.transport {
            Transport::Rows => {
                costs.exchange_of_rows(step.columns * heads_of_reader * a.head_dim * 2)
            }
            Transport::Words => costs.exchange(words, CONSUMER_WARPS * 32),
        };
        costs.attention * tasks.div_ceil(mesh.members) as f64
            + task * tasks.div_ceil(mesh.members) as f64
            + exchange
    }
}
