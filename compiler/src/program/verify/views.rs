//! Who reads what from whom: an exchange seen from one worker.

use std::ops::Range;

use super::{Rule, Violation, ensure};
use crate::mesh::Share;
use crate::program::{Along, Exchange, Program, VALUES_PER_WORD};

/// One of the producers a reader takes side by side.
pub(super) struct Producer {
    /// The CTAs whose partial sums make its values, in the order in which they are added.
    pub(super) partials: Vec<usize>,
    /// Its row tiles.
    pub(super) rows: Share,
}

/// What two workers must have in common to see an exchange alike: their coordinates where they read their own.
pub(super) fn key(
    exchange: &Exchange,
    (group, member): (usize, usize),
) -> (Option<usize>, Option<usize>) {
    (
        (exchange.groups == Along::Own).then_some(group),
        (exchange.members == Along::Own).then_some(member),
    )
}

/// The producers that a worker reads, as `Producers` in `device/exchange.cuh` numbers them.
pub(super) fn producers(
    program: &Program,
    exchange: &Exchange,
    (group, member): (usize, usize),
) -> Vec<Producer> {
    let (mesh, linear) = (&program.mesh, &program.linears[exchange.source]);
    // Coordinates side by side, and those summed from each.
    let axis = |along: Along, size: usize, own: usize| match along {
        Along::Own => (vec![own], vec![own]),
        Along::Concat => ((0..size).collect(), Vec::new()),
        Along::Sum => (vec![0], (0..size).collect()),
    };
    let (groups, sum_groups) = axis(exchange.groups, mesh.groups, group);
    let (members, sum_members) = axis(exchange.members, mesh.members, member);
    let mut producers = Vec::new();
    for &g in &groups {
        for &m in &members {
            let one_group = [g];
            let one_member = [m];
            let from_groups: &[usize] = if sum_groups.is_empty() {
                &one_group
            } else {
                &sum_groups
            };
            let from_members: &[usize] = if sum_members.is_empty() {
                &one_member
            } else {
                &sum_members
            };
            let partials = from_groups
                .iter()
                .flat_map(|g| from_members.iter().map(move |m| g * mesh.members + m))
                .collect();
            let (rows, _) = linear.slice(mesh, g, m);
            producers.push(Producer { partials, rows });
        }
    }
    producers
}

/// The output elements that a worker reads: one stretch, every element once, every value a complete sum.
pub(super) fn covered(
    program: &Program,
    exchange: &Exchange,
    at: (usize, usize),
    place: &str,
) -> Result<Range<usize>, Violation> {
    let (mesh, linear) = (&program.mesh, &program.linears[exchange.source]);
    let per_tile = linear.outputs_per_tile();
    let mut stretches = Vec::new();
    for producer in producers(program, exchange, at) {
        let mut columns = Vec::new();
        for &cta in &producer.partials {
            let (group, member) = mesh.coordinates(cta);
            let (rows, k) = linear.slice(mesh, group, member);
            ensure(rows == producer.rows, Rule::Views, place, || {
                format!("it adds outputs of different rows of {}", linear.name)
            })?;
            columns.push(k.begin..k.begin + k.count);
        }
        let whole = joined(columns);
        ensure(whole == Some(0..linear.k_tiles), Rule::Views, place, || {
            format!(
                "the sums over {} are not over all of its columns, each once",
                linear.name
            )
        })?;
        let rows = producer.rows;
        stretches.push(rows.begin * per_tile..(rows.begin + rows.count) * per_tile);
    }
    joined(stretches).ok_or_else(|| Violation {
        rule: Rule::Views,
        place: place.to_owned(),
        message: format!(
            "the outputs it takes of {} overlap or leave a gap",
            linear.name
        ),
    })
}

/// The union of ranges that lie end to end; `None` where they overlap or leave a gap.
fn joined(mut ranges: Vec<Range<usize>>) -> Option<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut whole = ranges.first()?.clone();
    for range in &ranges[1..] {
        if range.start != whole.end {
            return None;
        }
        whole.end = range.end;
    }
    Some(whole)
}

/// One of the words of the residual stream that a step's readers collect, and who owns it in the scattered form.
pub(super) struct Unit {
    /// Producer whose partial sums it is made of.
    pub(super) producer: usize,
    /// The worker that adds them up.
    pub(super) owner: usize,
}

/// The used units of the residual stream as they are shared out, all columns: whole runs, each what one pass of one
/// producer gives of a column (`Scattered` in `device/residual.cuh`).
pub(super) fn stream_units(program: &Program, exchange: &Exchange, columns: usize) -> Vec<Unit> {
    let (linear, workers) = (&program.linears[exchange.source], program.mesh.workers());
    let producers = producers(program, exchange, (0, 0));
    let passes = linear.tiling.passes;
    let mut units = Vec::new();
    for owner in 0..workers {
        let share = crate::mesh::share(producers.len() * passes * columns, workers, owner);
        for run in (share.begin..share.begin + share.count).map(|index| index / columns) {
            let (producer, pass) = (run / passes, run % passes);
            let rows = linear.pass_rows(producers[producer].rows.count, pass);
            let words = (rows * linear.outputs_per_tile()).div_ceil(VALUES_PER_WORD);
            units.extend((0..words).map(|_| Unit { producer, owner }));
        }
    }
    units
}
