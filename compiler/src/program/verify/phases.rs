//! The phases of a layer one after the other: what each finds in the activation, and what becomes of what it publishes.

use std::ops::Range;

use super::views::{self, covered};
use super::{Rule, Violation, ensure, rows};
use crate::fuse::Epilogue;
use crate::mesh::Split;
use crate::plan::{StreamForm, Target, Transport};
use crate::program::{Exchange, Linear, MOST_HEADS, Next, Phase, Program, RowOrder, Step, TILE};

pub(super) fn check(program: &Program) -> Result<(), Violation> {
    let mut views: Vec<Exchange> = Vec::new();
    for (name, step) in program.steps() {
        check_sizes(program, name, step)?;
        for (at, phase) in step.layer.iter().enumerate() {
            let place = program.place(name, at, phase);
            let known = linears_of(phase)
                .into_iter()
                .flatten()
                .all(|index| index < program.linears.len());
            ensure(known, Rule::Steps, &place, || {
                "it names a linear that is not there".to_owned()
            })?;
            if let Some(exchange) = exchange_of(phase) {
                let same = views
                    .iter()
                    .all(|view| view.source != exchange.source || view == exchange);
                ensure(same, Rule::Views, &place, || {
                    format!(
                        "{} is read in another way elsewhere",
                        program.linears[exchange.source].name
                    )
                })?;
                views.push(*exchange);
            }
        }
    }
    check_attention(program)?;
    check_head(program)?;
    for (name, step) in program.steps() {
        Walk::new(program, name, step).layer()?;
    }
    Ok(())
}

/// The linears that a phase names.
pub(super) fn linears_of(phase: &Phase) -> [Option<usize>; 2] {
    let of_next = |next: &Next| match next {
        Next::SameLayer(index) => *index,
        Next::NextLayer => 0,
    };
    match phase {
        Phase::Linear(index) => [Some(*index), None],
        Phase::Attention { exchange, next } => [Some(exchange.source), Some(*next)],
        Phase::CollectHeads { next, .. } => [Some(*next), None],
        Phase::Collect { exchange, next } => [Some(exchange.source), Some(*next)],
        Phase::AddToStream { exchange, next } => [Some(exchange.source), Some(of_next(next))],
        Phase::ReduceScatter { exchange, next, .. } => [Some(exchange.source), Some(of_next(next))],
        Phase::GatherStream { exchange, next, .. } => [Some(exchange.source), Some(of_next(next))],
    }
}

fn exchange_of(phase: &Phase) -> Option<&Exchange> {
    match phase {
        Phase::Attention { exchange, .. }
        | Phase::Collect { exchange, .. }
        | Phase::AddToStream { exchange, .. }
        | Phase::ReduceScatter { exchange, .. }
        | Phase::GatherStream { exchange, .. } => Some(exchange),
        Phase::Linear(_) | Phase::CollectHeads { .. } => None,
    }
}

fn check_sizes(program: &Program, name: &str, step: &Step) -> Result<(), Violation> {
    let columns = step.columns;
    ensure(
        columns.is_power_of_two() && columns <= Target::MAX_COLUMNS,
        Rule::Steps,
        name,
        || {
            format!(
                "{columns} columns; powers of two up to {} are possible",
                Target::MAX_COLUMNS
            )
        },
    )?;
    ensure(columns >= program.slots, Rule::Steps, name, || {
        format!("{columns} columns for {} sequences", program.slots)
    })?;
    ensure(columns >= program.decode.columns, Rule::Steps, name, || {
        format!(
            "{columns} columns do not hold the {} that decode steps go on with",
            program.decode.columns
        )
    })?;
    ensure(step.kv_splits > 0, Rule::Steps, name, || {
        "attention in no splits".to_owned()
    })?;
    match step.transport {
        Transport::Words => {
            let most = Target::MAX_WORD_COLUMNS;
            ensure(columns <= most, Rule::Steps, name, || {
                format!("{columns} columns; words are for up to {most}")
            })
        }
        Transport::Rows => rows::check(program, name, step),
    }
}

fn check_attention(program: &Program) -> Result<(), Violation> {
    let a = &program.attention;
    let steps =
        |holds: bool, message: &dyn Fn() -> String| ensure(holds, Rule::Steps, &a.name, message);
    steps([64, 128, 256].contains(&a.head_dim), &|| {
        format!("heads of {} elements", a.head_dim)
    })?;
    steps(
        a.kv_heads > 0 && a.heads > 0 && a.heads.is_multiple_of(a.kv_heads),
        &|| format!("{} query heads on {} KV heads", a.heads, a.kv_heads),
    )?;
    let shared = a.heads / a.kv_heads;
    steps(
        a.heads_per_task > 0
            && shared.is_multiple_of(a.heads_per_task)
            && a.heads_per_task <= MOST_HEADS,
        &|| {
            format!(
                "{} heads a task where {shared} query heads share a KV head",
                a.heads_per_task
            )
        },
    )?;
    let Some(qkv) = program.linears.get(a.qkv) else {
        return steps(false, &|| {
            "q, k and v come from a linear that is not there".to_owned()
        });
    };
    let rows: Vec<usize> = qkv
        .parts
        .iter()
        .map(|(_, rows)| rows / program.mesh.groups)
        .collect();
    let of_heads = [a.heads, a.kv_heads, a.kv_heads].map(|heads| heads * a.head_dim);
    steps(
        rows == of_heads && matches!(qkv.order, RowOrder::ByGroup { .. }),
        &|| {
            format!(
                "{} gives a group {rows:?} rows of q, k and v, not {of_heads:?}",
                qkv.name
            )
        },
    )
}

/// The head's input is prepared as if it were the first linear's.
fn check_head(program: &Program) -> Result<(), Violation> {
    let (head, first) = (&program.head, &program.linears[0]);
    ensure(
        head.columns == program.hidden && head.tiling.k == head.k_tiles,
        Rule::Inputs,
        &head.name,
        || {
            format!(
                "{} columns for a residual stream of {}",
                head.columns, program.hidden
            )
        },
    )?;
    ensure(
        head.norm.is_some() == first.norm.is_some(),
        Rule::Inputs,
        &head.name,
        || format!("only one of it and {} has a norm", first.name),
    )
}

/// What the activation holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Nothing a linear could multiply.
    Nothing,
    /// The residual stream as the operand of a linear; with `next_layer`, of the next layer's.
    Stream { linear: usize, next_layer: bool },
    /// Another value as the operand of a linear.
    Value { linear: usize },
}

struct Walk<'a> {
    program: &'a Program,
    name: &'a str,
    step: &'a Step,
    held: Held,
    /// Linears that have published in this layer, and how often each was read.
    published: usize,
    read: Vec<usize>,
    /// The linear for which attention has published, or kept, its heads.
    heads_for: Option<usize>,
    heads_read: bool,
    /// Linear whose scattered sums were published last, where, and as whose input.
    scattered: Option<(usize, usize, Next)>,
}

impl<'a> Walk<'a> {
    fn new(program: &'a Program, name: &'a str, step: &'a Step) -> Self {
        Walk {
            program,
            name,
            step,
            held: Held::Stream {
                linear: 0,
                next_layer: false,
            },
            published: 0,
            read: vec![0; program.linears.len()],
            heads_for: None,
            heads_read: false,
            scattered: None,
        }
    }

    fn layer(mut self) -> Result<(), Violation> {
        self.reads_stream(0, self.name)?;
        for (at, phase) in self.step.layer.iter().enumerate() {
            let place = self.program.place(self.name, at, phase);
            self.phase(phase, &place)?;
        }
        let linears = &self.program.linears;
        ensure(
            self.published == linears.len(),
            Rule::Ring,
            self.name,
            || {
                format!(
                    "{} of {} linears are multiplied, all are streamed",
                    self.published,
                    linears.len()
                )
            },
        )?;
        ensure(
            self.held
                == Held::Stream {
                    linear: 0,
                    next_layer: true,
                },
            Rule::Inputs,
            self.name,
            || "the layer ends without preparing the next one's input".to_owned(),
        )?;
        for (linear, reads) in linears.iter().zip(&self.read) {
            let adds = linear.epilogue == Epilogue::AddResidual;
            ensure(
                *reads == 1 || *reads > 1 && !adds,
                Rule::Outputs,
                self.name,
                || format!("the output of {} is read {reads} times", linear.name),
            )?;
        }
        ensure(self.heads_read, Rule::Outputs, self.name, || {
            "attention's heads are not read".to_owned()
        })
    }

    fn phase(&mut self, phase: &Phase, place: &str) -> Result<(), Violation> {
        let program = self.program;
        match phase {
            Phase::Linear(index) => self.linear(*index, place),
            Phase::Attention { exchange, next } => {
                let a = &program.attention;
                ensure(exchange.source == a.qkv, Rule::Views, place, || {
                    "it does not read q, k and v".to_owned()
                })?;
                self.read_linear(exchange, place)?;
                for group in 0..program.mesh.groups {
                    let (rows, _) = program.linears[a.qkv].slice(&program.mesh, group, 0);
                    let first = rows.begin * TILE;
                    let rows = first..first + a.width();
                    self.each_member(exchange, group, place, |covered| {
                        (*covered == rows)
                            .then_some(())
                            .ok_or_else(|| format!("rows {rows:?} of q, k and v"))
                    })?;
                }
                self.held = Held::Nothing;
                self.heads_for = Some(*next);
                Ok(())
            }
            Phase::CollectHeads { next, all_groups } => {
                self.collect_heads(*next, *all_groups, place)
            }
            Phase::Collect { exchange, next } => {
                self.read_linear(exchange, place)?;
                let (source, to) = (&program.linears[exchange.source], &program.linears[*next]);
                ensure(to.columns == source.outputs(), Rule::Inputs, place, || {
                    format!(
                        "{} has {} outputs, {} columns",
                        source.name,
                        source.outputs(),
                        to.columns
                    )
                })?;
                self.holds_slices(exchange, to, place)?;
                self.held = Held::Value { linear: *next };
                Ok(())
            }
            Phase::AddToStream { exchange, next } => {
                self.form(StreamForm::Replicated, place)?;
                self.add(exchange, place)?;
                self.prepare(next, place)
            }
            Phase::ReduceScatter {
                exchange,
                words_at,
                next,
            } => {
                self.form(StreamForm::Scattered, place)?;
                self.add(exchange, place)?;
                if self.step.transport == Transport::Rows {
                    self.scattered = Some((exchange.source, *words_at, *next));
                    return Ok(());
                }
                let linear = &program.linears[exchange.source];
                let runs = views::producers(program, exchange, (0, 0)).len()
                    * self.step.columns
                    * linear.tiling.passes;
                let share = runs.div_ceil(program.mesh.workers());
                let slots = linear.run_slots();
                ensure(share <= slots, Rule::Steps, place, || {
                    format!("{share} runs of the stream a worker; its warps have room for {slots}")
                })?;
                self.scattered = Some((exchange.source, *words_at, *next));
                Ok(())
            }
            Phase::GatherStream {
                exchange,
                words_at,
                next,
            } => {
                self.form(StreamForm::Scattered, place)?;
                let given = self.scattered.take();
                ensure(
                    given == Some((exchange.source, *words_at, *next)),
                    Rule::Waits,
                    place,
                    || {
                        format!(
                            "it waits for words at {words_at}, published were {given:?} (linear, words, what is prepared)"
                        )
                    },
                )?;
                self.prepare(next, place)
            }
        }
    }

    fn linear(&mut self, index: usize, place: &str) -> Result<(), Violation> {
        let linear = &self.program.linears[index];
        ensure(index == self.published, Rule::Ring, place, || {
            format!("the ring holds the pages of linear {}", self.published)
        })?;
        let (fits, normed) = match self.held {
            Held::Nothing => (false, false),
            Held::Stream { linear, next_layer } => (linear == index && !next_layer, true),
            Held::Value { linear } => (linear == index, false),
        };
        ensure(fits, Rule::Inputs, place, || {
            format!("the activation holds {:?}", self.held)
        })?;
        ensure(normed || linear.norm.is_none(), Rule::Inputs, place, || {
            "it has a norm, but only the residual stream's squares are summed".to_owned()
        })?;
        self.held = Held::Nothing;
        self.published += 1;
        Ok(())
    }

    fn form(&self, form: StreamForm, place: &str) -> Result<(), Violation> {
        ensure(self.step.stream == form, Rule::Steps, place, || {
            format!("the step's residual stream is {}", self.step.stream)
        })
    }

    /// Counts a read of what a linear has published.
    fn read_linear(&mut self, exchange: &Exchange, place: &str) -> Result<(), Violation> {
        let source = exchange.source;
        ensure(source < self.published, Rule::Waits, place, || {
            format!(
                "{} has not published yet",
                self.program.linears[source].name
            )
        })?;
        self.read[source] += 1;
        Ok(())
    }

    /// Adding to the stream: all of it, from a linear that is there for it.
    fn add(&mut self, exchange: &Exchange, place: &str) -> Result<(), Violation> {
        self.read_linear(exchange, place)?;
        let source = &self.program.linears[exchange.source];
        ensure(
            source.epilogue == Epilogue::AddResidual,
            Rule::Outputs,
            place,
            || format!("{} is not added to the residual stream", source.name),
        )?;
        let hidden = self.program.hidden;
        for group in 0..self.program.mesh.groups {
            self.each_member(exchange, group, place, |covered| {
                (*covered == (0..hidden))
                    .then_some(())
                    .ok_or_else(|| format!("the stream's {hidden} elements"))
            })?;
        }
        Ok(())
    }

    fn prepare(&mut self, next: &Next, place: &str) -> Result<(), Violation> {
        let (linear, next_layer) = match next {
            Next::SameLayer(index) => (*index, false),
            Next::NextLayer => (0, true),
        };
        self.reads_stream(linear, place)?;
        self.held = Held::Stream { linear, next_layer };
        Ok(())
    }

    /// A linear that multiplies the stream multiplies all of it: its rows are split, its columns are not.
    fn reads_stream(&self, index: usize, place: &str) -> Result<(), Violation> {
        let linear = &self.program.linears[index];
        let rows_only =
            linear.placement.groups == Split::Rows && linear.placement.members == Split::Rows;
        ensure(
            rows_only && linear.columns == self.program.hidden,
            Rule::Inputs,
            place,
            || {
                format!(
                    "{} does not take the whole residual stream on every worker",
                    linear.name
                )
            },
        )
    }

    fn collect_heads(
        &mut self,
        next: usize,
        all_groups: bool,
        place: &str,
    ) -> Result<(), Violation> {
        let program = self.program;
        let (a, mesh, to) = (&program.attention, &program.mesh, &program.linears[next]);
        ensure(self.heads_for == Some(next), Rule::Waits, place, || {
            format!("attention has not published for {}", to.name)
        })?;
        ensure(
            self.step.replicate_below == 0 || !all_groups && self.name == "decode",
            Rule::Steps,
            place,
            || "only decode steps whose heads stay in their group replicate attention".to_owned(),
        )?;
        let of_group = a.heads * a.head_dim;
        ensure(
            to.columns == of_group * mesh.groups,
            Rule::Inputs,
            place,
            || {
                format!(
                    "{} elements of heads, {} columns",
                    of_group * mesh.groups,
                    to.columns
                )
            },
        )?;
        for cta in 0..mesh.workers() {
            let (group, member) = mesh.coordinates(cta);
            let held = if all_groups {
                0..to.columns
            } else {
                group * of_group..(group + 1) * of_group
            };
            holds_slice(to, program, (group, member), &held, place)?;
        }
        self.held = Held::Value { linear: next };
        self.heads_read = true;
        Ok(())
    }

    /// Runs a check on what each member of a group reads; `f` says what it should have been.
    fn each_member(
        &self,
        exchange: &Exchange,
        group: usize,
        place: &str,
        f: impl Fn(&Range<usize>) -> Result<(), String>,
    ) -> Result<(), Violation> {
        let mut last = None;
        for member in 0..self.program.mesh.members {
            let key = views::key(exchange, (group, member));
            if last.replace(key) == Some(key) || key.0.is_none() && group > 0 {
                continue;
            }
            let range = covered(self.program, exchange, (group, member), place)?;
            if let Err(expected) = f(&range) {
                return ensure(false, Rule::Views, place, || {
                    format!("it reads {range:?}, not {expected}")
                });
            }
        }
        Ok(())
    }

    /// Every worker's slice of the next linear's columns is among the outputs it collects.
    fn holds_slices(&self, exchange: &Exchange, to: &Linear, place: &str) -> Result<(), Violation> {
        let mesh = &self.program.mesh;
        let mut last = None;
        for cta in 0..mesh.workers() {
            let at = mesh.coordinates(cta);
            let key = views::key(exchange, at);
            let range = match last.take() {
                Some((seen, range)) if seen == key => range,
                _ => covered(self.program, exchange, at, place)?,
            };
            holds_slice(to, self.program, at, &range, place)?;
            last = Some((key, range));
        }
        Ok(())
    }
}

fn holds_slice(
    to: &Linear,
    program: &Program,
    (group, member): (usize, usize),
    held: &Range<usize>,
    place: &str,
) -> Result<(), Violation> {
    let (_, k) = to.slice(&program.mesh, group, member);
    let needs = k.begin * TILE..(k.begin + k.count) * TILE;
    ensure(
        needs.is_empty() || held.start <= needs.start && needs.end <= held.end,
        Rule::Inputs,
        place,
        || format!("worker ({group}, {member}) multiplies elements {needs:?}, but holds {held:?}"),
    )
}
