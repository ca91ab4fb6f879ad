//! A program and its phases in words.

use std::fmt;

use super::{Along, Exchange, Next, Phase, Program, WORD_BYTES, Wide};

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "program {}: {} layers on {}",
            self.name, self.layers, self.mesh
        )?;
        for linear in self.linears.iter().chain([&self.head]) {
            let t = &linear.tiling;
            writeln!(
                f,
                "  {}: {} x {} tiles of a CTA in {} passes of {}, {} a warp, pages of {} x {} tiles ({} B)",
                linear.name,
                t.rows,
                t.k,
                t.passes,
                t.pass_tiles,
                t.tiles_per_warp,
                t.pass_tiles,
                t.page_k,
                t.page_bytes()
            )?;
        }
        writeln!(
            f,
            "  ring: {} pages of {} B, {} in flight, {} in the head",
            self.ring.pages, self.ring.page_bytes, self.ring.in_flight, self.ring.head_in_flight
        )?;
        write!(f, "{}", self.shared)?;
        if let Some(Wide { ring, shared, .. }) = &self.wide {
            writeln!(
                f,
                "  wide: ring of {} pages of {} B, {} in flight",
                ring.pages, ring.page_bytes, ring.in_flight
            )?;
            write!(f, "{shared}")?;
        }
        for (name, step) in self.steps() {
            writeln!(
                f,
                "{name} layer, {} columns, exchange of {}:",
                step.columns, step.transport
            )?;
            for phase in &step.layer {
                writeln!(f, "  {}", self.describe(phase))?;
            }
        }
        writeln!(
            f,
            "exchange area: {} words ({} KB)",
            self.exchange.words,
            self.exchange.words * WORD_BYTES / 1024
        )
    }
}

impl Program {
    /// A phase in words.
    pub fn describe(&self, phase: &Phase) -> String {
        let name = |index: usize| self.linears[index].name.as_str();
        let along = |a: Along, axis: &str| match a {
            Along::Own => format!("own {axis}"),
            Along::Concat => format!("all {axis}s"),
            Along::Sum => format!("sum over {axis}s"),
        };
        let view = |e: &Exchange| {
            format!(
                "{} ({}, {})",
                name(e.source),
                along(e.groups, "group"),
                along(e.members, "member")
            )
        };
        let next = |next: &Next| match next {
            Next::SameLayer(index) => name(*index).to_owned(),
            Next::NextLayer => format!("the next layer's {}", name(0)),
        };
        match phase {
            Phase::Linear(index) => format!("linear {}", name(*index)),
            Phase::Attention { exchange, .. } => format!("attention on {}", view(exchange)),
            Phase::CollectHeads { next, all_groups } => {
                let whose = if *all_groups {
                    "all groups'"
                } else {
                    "the group's"
                };
                format!("collect {whose} heads for {}", name(*next))
            }
            Phase::Collect { exchange, next } => {
                format!("collect {} for {}", view(exchange), name(*next))
            }
            Phase::AddToStream { exchange, next: n } => {
                format!("add {} to the stream, prepare {}", view(exchange), next(n))
            }
            Phase::ReduceScatter { exchange, .. } => {
                format!("reduce-scatter {} into the stream", view(exchange))
            }
            Phase::GatherStream { next: n, .. } => {
                format!("all-gather the stream, prepare {}", next(n))
            }
        }
    }
}
