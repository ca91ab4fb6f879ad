//! The rules of a well-formed graph, and the order of execution.
//!
//! Owns name resolution inside the sections, dependency cycles and topological order (petgraph). Reports, never mends.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use petgraph::Direction;
use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

use super::{Expr, Graph, LAYER, Node, Spanned, Symbol, TOKENS, is_identifier};
use crate::diagnostics::{Diagnostic, Span, did_you_mean};
use crate::ops::Op;

/// Enough errors to mend: undefined symbols are not looked for beyond, because each is compared with all that there are.
const ENOUGH: usize = 100;

/// All broken rules of a graph, or the first [`ENOUGH`] and more.
pub(super) fn check(graph: &Graph) -> Vec<Diagnostic> {
    let mut errors = Vec::new();
    identifier("the graph's name", &graph.name, &mut errors);
    let symbols = check_symbols(graph, &mut errors);
    check_ids(graph, &mut errors);
    let layers = &graph.layers;
    let sections = [
        Section {
            name: "before",
            nodes: &graph.before,
            given: TOKENS,
            result: Some(&layers.first),
        },
        Section {
            name: "layers",
            nodes: &layers.nodes,
            given: &layers.state,
            result: Some(&layers.next),
        },
        Section {
            name: "after",
            nodes: &graph.after,
            given: &layers.state,
            result: None,
        },
    ];
    for section in &sections {
        section.check_names(&sections, &mut errors);
        section.check_cycles(&mut errors);
        section.check_weights(&mut errors);
    }
    // Where a name is wrong, what it should have named seems unused: that would only distract.
    if errors.is_empty() {
        sections
            .iter()
            .for_each(|section| section.check_uses(&mut errors));
    }
    check_end(graph, &mut errors);
    check_names_in(&layers.repeat, &symbols, &mut errors);
    for section in &sections {
        for expr in section.nodes.iter().flat_map(|node| expressions(&node.op)) {
            check_names_in(expr, &symbols, &mut errors);
        }
    }
    errors
}

/// Puts nodes into an order of execution: among those that are ready, the first of the file comes first. Nodes on a cycle
/// would be left out, but [`check`] has refused them.
pub(super) fn sort(nodes: &mut Vec<Node>) {
    let graph = dependencies(nodes);
    let mut waiting: Vec<usize> = graph
        .node_indices()
        .map(|node| graph.neighbors_directed(node, Direction::Incoming).count())
        .collect();
    let mut ready: BinaryHeap<_> = (0..nodes.len())
        .filter(|i| waiting[*i] == 0)
        .map(Reverse)
        .collect();
    let mut order = Vec::new();
    while let Some(Reverse(next)) = ready.pop() {
        order.push(nodes[next].clone());
        for user in graph.neighbors(NodeIndex::new(next)) {
            waiting[user.index()] -= 1;
            if waiting[user.index()] == 0 {
                ready.push(Reverse(user.index()));
            }
        }
    }
    *nodes = order;
}

/// One edge from maker to user for every input made in the section.
fn dependencies(nodes: &[Node]) -> DiGraph<(), ()> {
    let mut graph = DiGraph::new();
    let index: BTreeMap<&str, NodeIndex> = nodes
        .iter()
        .map(|node| (node.id.as_str(), graph.add_node(())))
        .collect();
    for (user, node) in nodes.iter().enumerate() {
        for input in node.op.inputs() {
            if let Some(maker) = index.get(input.as_str()) {
                graph.add_edge(*maker, NodeIndex::new(user), ());
            }
        }
    }
    graph
}

struct Section<'a> {
    name: &'static str,
    nodes: &'a [Node],
    /// The value it starts from.
    given: &'a str,
    /// The value of it that goes on, where that is one.
    result: Option<&'a Spanned<String>>,
}

impl Section<'_> {
    fn has(&self, name: &str) -> bool {
        self.nodes.iter().any(|node| node.id.as_str() == name)
    }

    /// Rule 2.
    fn check_names(&self, sections: &[Section<'_>], errors: &mut Vec<Diagnostic>) {
        let inputs = self.nodes.iter().flat_map(|node| node.op.inputs());
        for input in inputs.filter(|input| !self.has(input) && input.as_str() != self.given) {
            let elsewhere = sections.iter().find(|section| section.has(input));
            errors.push(self.undefined(input, elsewhere));
        }
        if let Some(result) = self.result.filter(|result| !self.has(result)) {
            let elsewhere = sections.iter().find(|section| section.has(result));
            errors.push(self.undefined(result, elsewhere));
        }
    }

    /// Rule 4.
    fn check_uses(&self, errors: &mut Vec<Diagnostic>) {
        let used = |id: &str| {
            self.result.is_some_and(|result| result.as_str() == id)
                || self
                    .nodes
                    .iter()
                    .any(|user| user.op.inputs().iter().any(|input| input.as_str() == id))
        };
        for node in self
            .nodes
            .iter()
            .filter(|node| !matches!(node.op.value, Op::Sample(_)) && !used(&node.id))
        {
            errors.push(
                Diagnostic::new(
                    "unused-value",
                    node.id.span,
                    format!("nothing uses the value `{}`", node.id.value),
                )
                .help("name it as the input of another operator, or remove this one"),
            );
        }
    }

    fn undefined(&self, name: &Spanned<String>, elsewhere: Option<&Section<'_>>) -> Diagnostic {
        let error = Diagnostic::new(
            "undefined-value",
            name.span,
            format!("there is no value `{}` in `{}`", name.value, self.name),
        );
        if let Some(section) = elsewhere {
            return error
                .label(format!("this is a value of `{}`", section.name))
                .help(format!(
                    "only the state passes from section to section; here that is `{}`",
                    self.given
                ));
        }
        let known = self
            .nodes
            .iter()
            .map(|node| node.id.as_str())
            .chain([self.given]);
        match did_you_mean(name, known) {
            Some(near) => error.label(format!("did you mean `{near}`?")),
            None => error.help(format!("`{}` starts from `{}`", self.name, self.given)),
        }
    }

    /// Rule 3.
    fn check_cycles(&self, errors: &mut Vec<Diagnostic>) {
        let graph = dependencies(self.nodes);
        for mut group in tarjan_scc(&graph) {
            group.sort();
            let first = group[0];
            if group.len() == 1 && !graph.contains_edge(first, first) {
                continue;
            }
            let names: Vec<_> = group
                .iter()
                .map(|at| format!("`{}`", self.nodes[at.index()].id.value))
                .collect();
            let message = match names.as_slice() {
                [name] => format!("{name} depends on its own result"),
                _ => format!("{} depend on each other's results", names.join(", ")),
            };
            let error = Diagnostic::new("cycle", self.nodes[first.index()].id.span, message)
                .label("this one is on the cycle");
            let error = group[1..].iter().fold(error, |error, at| {
                error.related(self.nodes[at.index()].id.span, "so is this one")
            });
            errors.push(error.help("let one of them read a value that is made before"));
        }
    }

    /// Rule 6.
    fn check_weights(&self, errors: &mut Vec<Diagnostic>) {
        let repeated = self.name == "layers";
        for weight in self.nodes.iter().flat_map(|node| node.op.weights()) {
            let stray = weight.replace(LAYER, "").contains(['{', '}']);
            if weight.contains(LAYER) == repeated && !stray && !weight.is_empty() {
                continue;
            }
            let message = if stray || weight.is_empty() {
                format!("`{}` is not a weight's name", weight.value)
            } else if repeated {
                format!("all layers would share the weight `{}`", weight.value)
            } else {
                format!("the weight `{}` is outside of the layers", weight.value)
            };
            errors.push(
                Diagnostic::new("weight-name", weight.span, message).help(
                    "in `layers` write the layer's index as `{layer}`; elsewhere there is none",
                ),
            );
        }
    }
}

/// Rule 1.
fn check_ids(graph: &Graph, errors: &mut Vec<Diagnostic>) {
    let state = &graph.layers.state;
    identifier("the state's name", state, errors);
    let mut seen: BTreeMap<&str, Span> = BTreeMap::from([(state.as_str(), state.span)]);
    for node in [&graph.before, &graph.layers.nodes, &graph.after]
        .into_iter()
        .flatten()
    {
        identifier("an id", &node.id, errors);
        if node.id.as_str() == TOKENS {
            errors.push(
                Diagnostic::new(
                    "duplicate-id",
                    node.id.span,
                    "`tokens` is the name of the token ids",
                )
                .help("give this value another name"),
            );
        }
        if let Some(first) = seen.insert(&node.id, node.id.span) {
            errors.push(
                Diagnostic::new(
                    "duplicate-id",
                    node.id.span,
                    format!("`{}` is already the name of a value", node.id.value),
                )
                .related(first, "here")
                .help("give one of them another name"),
            );
        }
    }
}

fn identifier(what: &str, name: &Spanned<String>, errors: &mut Vec<Diagnostic>) {
    if !is_identifier(name) {
        errors.push(
            Diagnostic::new(
                "identifier",
                name.span,
                format!("{what} cannot be `{}`", name.value),
            )
            .help("use up to 64 lower-case letters, digits and `_`, with a letter first"),
        );
    }
}

/// Rule 4, the end.
fn check_end(graph: &Graph, errors: &mut Vec<Diagnostic>) {
    let all = [&graph.before, &graph.layers.nodes, &graph.after]
        .into_iter()
        .flatten();
    let samples: Vec<_> = all
        .filter(|node| matches!(node.op.value, Op::Sample(_)))
        .collect();
    let in_after = graph
        .after
        .iter()
        .filter(|node| matches!(node.op.value, Op::Sample(_)))
        .count();
    if samples.len() == 1 && in_after == 1 {
        return;
    }
    let place = samples.last().map_or(graph.name.span, |node| node.id.span);
    errors.push(
        Diagnostic::new(
            "one-sample",
            place,
            format!(
                "the graph has {} Sample operators, {in_after} of them in `after`",
                samples.len()
            ),
        )
        .help("end `after` with one `Sample(logits: …)`"),
    );
}

/// Rule 5 for the declarations; gives the names of all symbols.
fn check_symbols<'a>(graph: &'a Graph, errors: &mut Vec<Diagnostic>) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for Symbol { name, origin } in graph.dims.iter().chain(&graph.params) {
        identifier("a symbol's name", name, errors);
        if names.contains(&name.as_str()) {
            errors.push(
                Diagnostic::new(
                    "duplicate-symbol",
                    name.span,
                    format!("`{}` is declared twice", name.value),
                )
                .help("remove one of them"),
            );
        }
        if origin.keys.is_empty() {
            errors.push(
                Diagnostic::new(
                    "no-key",
                    origin.span,
                    format!("`{}` has no key of config.json", name.value),
                )
                .help("write `keys: [\"…\"]`"),
            );
        }
        for expr in [Some(&origin.default), origin.absent.as_ref()]
            .into_iter()
            .flatten()
        {
            check_names_in(expr, &names, errors);
        }
        names.push(name);
    }
    names
}

fn check_names_in(expr: &Spanned<Expr>, known: &[&str], errors: &mut Vec<Diagnostic>) {
    if errors.len() >= ENOUGH {
        return;
    }
    for name in expr
        .names()
        .into_iter()
        .filter(|name| !known.contains(name))
    {
        let error = Diagnostic::new(
            "undefined-symbol",
            expr.span,
            format!("there is no dim or param `{name}`"),
        );
        errors.push(match did_you_mean(name, known.iter().copied()) {
            Some(near) => error.label(format!("did you mean `{near}`?")),
            None => error.help("declare it in `dims` or `params`, above its first use there"),
        });
    }
}

/// All expressions of an operator.
pub(super) fn expressions(op: &Op) -> Vec<&Spanned<Expr>> {
    match op {
        Op::Embedding(op) => vec![&op.rows, &op.columns],
        Op::RmsNorm(op) => vec![&op.eps],
        Op::Linear(op) => op.out.iter().collect(),
        Op::Rope(op) => {
            let scaling = op.llama3.iter().flat_map(|s| {
                [
                    &s.factor,
                    &s.low_freq_factor,
                    &s.high_freq_factor,
                    &s.original_context,
                ]
            });
            [&op.theta].into_iter().chain(scaling).collect()
        }
        Op::Attention(op) => op.scale.iter().collect(),
        Op::LmHead(op) => vec![&op.tied, &op.rows],
        Op::KvAppend(_) | Op::Silu(_) | Op::Mul(_) | Op::Add(_) | Op::Sample(_) => Vec::new(),
    }
}
