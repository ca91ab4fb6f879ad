//! The text of a step's layers: which phases run in which order, and with what.

use std::fmt::Write;

use super::{Emitter, comment, node_type};
use crate::plan::{StreamForm, Transport};
use crate::program::{Along, Exchange, Next, Phase, Step};

impl Emitter<'_> {
    /// One kind of step: all layers, from the tokens' embeddings to the head's input.
    pub(super) fn layers(&mut self, name: &str, step: &Step) {
        let first = self.linear_name(0);
        let columns = step.columns;
        line!(self);
        line!(self, "  // {columns} columns: {}", step.stream);
        line!(self, "  template <class R>");
        line!(
            self,
            "  MIRAGE_DEVICE static void {name}_layers(Context<R>& x, uint32_t epoch) {{"
        );
        line!(self, "    constexpr int C = {columns};");
        if let Some(gather) = self.gather_of_others(step, "epoch + kLayers") {
            line!(self, "    if (x.at.cta >= Mesh::kWorkers) {{");
            line!(
                self,
                "      // No part of the layers: only the head's input."
            );
            line!(self, "      {gather}");
            line!(self, "      return;");
            line!(self, "    }}");
        }
        self.declare_stream("    ", step);
        line!(
            self,
            "    embed<{first}>(x, stream, gamma_of<{first}>(x.params, 0));"
        );
        line!(self, "#pragma unroll 1");
        line!(self, "    for (int layer = 0; layer < kLayers; layer++) {{");
        line!(self, "      const uint32_t now = epoch + layer + 1;");
        line!(self, "      const bf16* gamma_after =");
        line!(
            self,
            "          layer + 1 < kLayers ? gamma_of<{first}>(x.params, layer + 1) : gamma_of<Head>(x.params, 0);"
        );
        for phase in &step.layer {
            self.phase(step, phase);
        }
        line!(self, "    }}");
        self.hand_on_to_others("    ", step, "epoch + kLayers");
        line!(self, "  }}");
    }

    /// The variable that holds a worker's part of the stream.
    pub(super) fn declare_stream(&mut self, indent: &str, step: &Step) {
        let Some(shared) = self.shared_view(step) else {
            return;
        };
        match (step.transport, step.stream) {
            (Transport::Rows, _) => line!(
                self,
                "{indent}[[maybe_unused]] {} stream = {{}};",
                self.share_type(step)
            ),
            (Transport::Words, StreamForm::Replicated) => {
                line!(self, "{indent}Replicated<{shared}, Mesh, C> stream(x);")
            }
            (Transport::Words, StreamForm::Scattered) => {
                line!(self, "{indent}Scattered<{shared}, Mesh, C> stream(x.at);")
            }
        }
    }

    /// The type of a worker's share of the stream where it is exchanged in rows.
    fn share_type(&self, step: &Step) -> String {
        let writer = self
            .writer(step)
            .map_or(String::new(), |i| self.linear_name(i));
        let of_rows = self.program.steps();
        let of_rows = of_rows.filter(|(_, step)| step.transport == Transport::Rows);
        let widest = of_rows.map(|(_, step)| step.columns).max().unwrap_or(0);
        format!("StreamRows<{writer}, Mesh, C, {widest}>")
    }

    /// The linear that writes the stream last.
    fn writer(&self, step: &Step) -> Option<usize> {
        step.layer.iter().rev().find_map(|phase| match phase {
            Phase::AddToStream { exchange, .. } | Phase::ReduceScatter { exchange, .. } => {
                Some(exchange.source)
            }
            _ => None,
        })
    }

    /// How the stream is read by those who keep it: its owner and units follow the linears that write it.
    fn shared_view(&self, step: &Step) -> Option<String> {
        step.layer.iter().rev().find_map(|phase| match phase {
            Phase::AddToStream { exchange, .. } | Phase::ReduceScatter { exchange, .. } => {
                Some(self.view(exchange))
            }
            _ => None,
        })
    }

    fn has_others(&self) -> bool {
        self.program.mesh.ctas > self.program.mesh.workers()
    }

    /// How the CTAs without a part of the layers, where there are any, take in the head's input.
    pub(super) fn gather_of_others(&self, step: &Step, epoch: &str) -> Option<String> {
        let shared = self.shared_view(step).filter(|_| self.has_others())?;
        if step.transport == Transport::Rows {
            let writer = self.linear_name(self.writer(step)?);
            let share = self.share_type(step);
            return Some(format!(
                "gather_rows<Head, {writer}, {share}, Mesh, C>(x, {epoch});"
            ));
        }
        let gathered = step.layer.iter().rev().find_map(|phase| match phase {
            Phase::GatherStream { words_at, .. } => Some(*words_at),
            _ => None,
        });
        let at = gathered.map_or("Model::kStreamAt".to_owned(), |at| at.to_string());
        Some(format!(
            "gather_stream<Head, {shared}, Mesh, C>(x, x.params.exchange + {at}, {epoch});"
        ))
    }

    /// Gives the head's input to the CTAs without a part of the layers, where they do not see it anyway.
    pub(super) fn hand_on_to_others(&mut self, indent: &str, step: &Step, epoch: &str) {
        let replicated = self.has_others() && step.stream == StreamForm::Replicated;
        if let Some(shared) = self.shared_view(step).filter(|_| replicated) {
            line!(
                self,
                "{indent}if (x.at.cta == 0) publish_stream<Head, {shared}, Mesh, C>(x, x.params.exchange + Model::kStreamAt, {epoch});"
            );
        }
    }

    /// `contexts`: a last template argument, if not all columns are worked on.
    pub(super) fn attention_phase(
        &mut self,
        step: &Step,
        exchange: &Exchange,
        next: usize,
        contexts: &str,
    ) {
        let p = self.program;
        line!(
            self,
            "      attention<{}, {}, {}, Mesh, C, {}, {}, {}{contexts}>(x, layer, now);",
            node_type(&p.attention.name),
            self.view(exchange),
            self.linear_name(next),
            step.kv_splits,
            step.replicate_below,
            std::ptr::eq(step, &p.decode)
        );
    }

    pub(super) fn phase(&mut self, step: &Step, phase: &Phase) {
        let p = self.program;
        let attention = node_type(&p.attention.name);
        let (splits, replicate_below) = (step.kv_splits, step.replicate_below);
        let next_of = |e: &Emitter<'_>, next: &Next| match next {
            Next::SameLayer(i) => {
                let name = e.linear_name(*i);
                let gamma = format!("gamma_of<{name}>(x.params, layer)");
                (name, gamma)
            }
            Next::NextLayer => (e.linear_name(0), "gamma_after".to_owned()),
        };
        line!(self, "      // {}", comment(&[p.describe(phase)]));
        if step.transport == Transport::Rows {
            return self.phase_of_rows(step, phase, next_of);
        }
        match phase {
            Phase::Linear(i) => line!(
                self,
                "      linear<{}, C, Mesh>(x, now);",
                self.linear_name(*i)
            ),
            Phase::Attention { exchange, next } => self.attention_phase(step, exchange, *next, ""),
            Phase::CollectHeads { next, all_groups } => line!(
                self,
                "      collect_heads<{attention}, {}, {all_groups}, Mesh, C, {splits}, {replicate_below}>(x, now);",
                self.linear_name(*next)
            ),
            Phase::Collect { exchange, next } => line!(
                self,
                "      collect_activation<{}, {}, Mesh, C>(x, now);",
                self.view(exchange),
                self.linear_name(*next)
            ),
            Phase::AddToStream { exchange, next } => {
                let (name, gamma) = next_of(self, next);
                line!(
                    self,
                    "      add_to_stream<{name}, {}>(x, stream, {gamma}, now);",
                    self.view(exchange)
                );
            }
            Phase::ReduceScatter {
                exchange,
                words_at,
                next,
            } => {
                let (name, gamma) = next_of(self, next);
                line!(
                    self,
                    "      reduce_scatter<{name}, {}>(x, stream, x.params.exchange + {words_at}, {gamma}, now);",
                    self.view(exchange)
                );
            }
            Phase::GatherStream {
                exchange,
                words_at,
                next,
            } => {
                let (name, _) = next_of(self, next);
                line!(
                    self,
                    "      gather_stream<{name}, {}, Mesh, C>(x, x.params.exchange + {words_at}, now);",
                    self.view(exchange)
                );
            }
        }
    }
}

impl Emitter<'_> {
    /// A phase of a step that exchanges rows.
    fn phase_of_rows(
        &mut self,
        step: &Step,
        phase: &Phase,
        next_of: impl Fn(&Self, &Next) -> (String, String),
    ) {
        let p = self.program;
        let attention = node_type(&p.attention.name);
        let all_groups = |exchange: &Exchange| exchange.groups != Along::Own;
        let call = match phase {
            Phase::Linear(i) => format!("linear_rows<{}, C, Mesh>(x, now);", self.linear_name(*i)),
            Phase::Attention { exchange, .. } => format!(
                "attention_rows<{attention}, {}, Mesh, C, {}>(x, layer, now);",
                self.linear_name(exchange.source),
                std::ptr::eq(step, &p.decode)
            ),
            Phase::CollectHeads { next, all_groups } => format!(
                "collect_rows<{attention}, {}, {all_groups}, Mesh, C>(x, now);",
                self.linear_name(*next)
            ),
            Phase::Collect { exchange, next } => format!(
                "collect_rows<{}, {}, {}, Mesh, C>(x, now);",
                self.linear_name(exchange.source),
                self.linear_name(*next),
                all_groups(exchange)
            ),
            Phase::ReduceScatter { exchange, next, .. } => {
                let (name, gamma) = next_of(self, next);
                let writer = self.linear_name(exchange.source);
                format!("reduce_rows<{name}, {writer}>(x, stream, {gamma}, now);")
            }
            Phase::GatherStream { exchange, next, .. } => {
                let (name, _) = next_of(self, next);
                let writer = self.linear_name(exchange.source);
                let share = self.share_type(step);
                format!("gather_rows<{name}, {writer}, {share}, Mesh, C>(x, now);")
            }
            // Rows are of a scattered stream (rule Steps).
            Phase::AddToStream { .. } => String::new(),
        };
        line!(self, "      {call}");
    }
}
