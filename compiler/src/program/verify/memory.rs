//! Places: the array of norms, the exchange area, shared memory. Sizes are those of the device code, stated here anew.

use super::{Rule, Violation, ensure, views};
use crate::fuse::{Epilogue, WeightId};
use crate::plan::{Target, Transport};
use crate::program::{
    CHUNK, CONSUMER_WARPS, Norm, Phase, Program, Region, Ring, Rows, SharedLayout, Step, TILE,
    WORD_BYTES,
};

/// A stretch of words or bytes that something needs.
struct Need {
    name: String,
    at: usize,
    size: usize,
}

/// Needs are disjoint and end before `end`.
fn disjoint(mut needs: Vec<Need>, end: usize, rule: Rule, unit: &str) -> Result<(), Violation> {
    needs.sort_by_key(|need| (need.at, need.size));
    for (i, need) in needs.iter().enumerate() {
        let (next, who) = match needs.get(i + 1) {
            Some(next) => (next.at, next.name.as_str()),
            None => (end, "the end"),
        };
        ensure(need.at + need.size <= next, rule, &need.name, || {
            format!(
                "it needs {} {unit} from {}, but {who} is at {next}",
                need.size, need.at
            )
        })?;
    }
    Ok(())
}

pub(super) fn check_norms(program: &Program) -> Result<(), Violation> {
    let norms = &program.norms;
    let length = |weight: WeightId| -> usize {
        program
            .weights
            .get(weight.0 as usize)
            .map_or(0, |weight| weight.shape.iter().product())
    };
    let needs = norms.layer.iter().map(|&(weight, at)| Need {
        name: format!("gamma {}", weight.0),
        at,
        size: length(weight),
    });
    disjoint(needs.collect(), norms.layer_stride, Rule::Norms, "elements")?;
    let a = &program.attention;
    let of_linears = program
        .linears
        .iter()
        .map(|linear| (linear.name.as_str(), linear.norm, linear.columns));
    let of_heads = [a.q_norm, a.k_norm].map(|norm| (a.name.as_str(), norm, a.head_dim));
    for (name, norm, width) in of_linears.chain(of_heads) {
        let Some(Norm {
            gamma,
            gamma_at,
            gamma_stride,
            ..
        }) = norm
        else {
            continue;
        };
        let there = norms
            .layer
            .iter()
            .any(|&(weight, at)| weight == gamma && at == gamma_at && length(weight) == width);
        ensure(
            there && gamma_at.is_multiple_of(2) && gamma_stride == norms.layer_stride,
            Rule::Norms,
            name,
            || {
                format!(
                    "its gamma {} of {width} elements is not at {gamma_at}, every {gamma_stride}",
                    gamma.0
                )
            },
        )?;
    }
    let last_at = program.layers * norms.layer_stride;
    let last = norms.last.map_or(0, length);
    if let Some(norm) = program.head.norm {
        let there = norms.last == Some(norm.gamma)
            && norm.gamma_at == last_at
            && last == program.hidden
            && last_at.is_multiple_of(2);
        ensure(there, Rule::Norms, &program.head.name, || {
            format!(
                "no gamma of {} elements at {}",
                program.hidden, norm.gamma_at
            )
        })?;
    }
    ensure(
        norms.len == last_at + last,
        Rule::Norms,
        "the array of norms",
        || format!("{} elements, {} are needed", norms.len, last_at + last),
    )
}

/// Buffers of the exchange area, in words, for whichever kind of step needs more.
pub(super) fn check_words(program: &Program) -> Result<(), Violation> {
    let (mesh, e) = (&program.mesh, &program.exchange);
    let columns = program.most_columns();
    let decode = program.decode.columns;
    let mut needs: Vec<Need> = Vec::new();
    let mut need = |name: String, at: usize, size: usize| {
        // A buffer that both kinds of step name is one buffer.
        match needs
            .iter_mut()
            .find(|need| need.name == name && need.at == at)
        {
            Some(known) => known.size = known.size.max(size),
            None => needs.push(Need { name, at, size }),
        }
    };
    for linear in &program.linears {
        need(
            format!("words of {}", linear.name),
            linear.words_at,
            mesh.workers() * columns * linear.words(),
        );
    }
    let a = &program.attention;
    for (_, step) in program.steps() {
        let words = mesh.groups * a.tasks(step) * a.heads_per_task * a.task_words(step);
        need("words of the heads".to_owned(), a.words_at, words);
        for phase in &step.layer {
            let (Phase::ReduceScatter {
                exchange, words_at, ..
            }
            | Phase::GatherStream {
                exchange, words_at, ..
            }) = phase
            else {
                continue;
            };
            let linear = &program.linears[exchange.source];
            let units = views::producers(program, exchange, (0, 0)).len() * linear.gathered_words();
            need(
                format!("the stream after {}", linear.name),
                *words_at,
                units * step.columns,
            );
        }
    }
    rows_needs(program, &mut need);
    for (_, step) in program.steps() {
        let writer = step.layer.iter().rev().find_map(|phase| match phase {
            Phase::AddToStream { exchange, .. } => Some(exchange),
            _ => None,
        });
        if let Some(exchange) = writer.filter(|_| mesh.ctas > mesh.workers()) {
            let units = views::producers(program, exchange, (0, 0)).len()
                * program.linears[exchange.source].gathered_words();
            need(
                "the stream for the other CTAs".to_owned(),
                e.stream_at,
                units * step.columns,
            );
        }
    }
    // Candidates of two steps: a CTA that holds no layer may still read the last step's while others write the next's. Of
    // a column that samples each CTA has two words.
    need(
        "candidates of the head".to_owned(),
        e.candidates_at,
        2 * 2 * decode * mesh.ctas,
    );
    need(
        "sums above the draws".to_owned(),
        e.sums_at,
        2 * decode * mesh.ctas,
    );
    need(
        "candidates of the sampler".to_owned(),
        e.samples_at,
        decode * mesh.ctas,
    );
    need("the grid barrier".to_owned(), e.barrier_at, mesh.ctas);
    // 64-bit counts: two kinds, four levels of 256 bins (`device/radix.cuh`, `Histograms`).
    need(
        "histograms of the sampler".to_owned(),
        e.histograms_at,
        2 * 4 * 256 * decode / 2,
    );
    ensure(
        i32::try_from(e.words).is_ok(),
        Rule::Words,
        "the exchange area",
        || format!("{} words; the device code counts them in 32 bits", e.words),
    )?;
    disjoint(needs, e.words, Rule::Words, "words")
}

/// Rows of bf16 and the flags beside them (`device/rows.cuh`), in words.
fn rows_needs(program: &Program, need: &mut impl FnMut(String, usize, usize)) {
    let steps = program.steps();
    let of_rows = steps.filter(|(_, step)| step.transport == Transport::Rows);
    let Some(columns) = of_rows.map(|(_, step)| step.columns).max() else {
        return;
    };
    let mesh = &program.mesh;
    let mut rows = |name: String, rows: Rows, bytes: usize| {
        need(
            format!("rows of {name}"),
            rows.at,
            bytes.div_ceil(WORD_BYTES),
        );
        let flags = (4 * mesh.ctas).div_ceil(WORD_BYTES);
        need(format!("flags of {name}"), rows.flags_at, flags);
    };
    for linear in &program.linears {
        let bytes = columns * linear.outputs() * 2;
        rows(
            linear.name.clone(),
            linear.rows,
            linear.partials(mesh) * bytes,
        );
        if linear.epilogue == Epilogue::AddResidual {
            // A sum of squares of each run, of one chunk at least.
            let squares = columns * (linear.outputs() / CHUNK) * 4;
            rows(
                format!("the stream after {}", linear.name),
                linear.stream_rows,
                bytes + squares,
            );
        }
    }
    let a = &program.attention;
    let heads = columns * a.heads * mesh.groups * a.head_dim * 2;
    rows(a.name.clone(), a.rows, heads);
}

/// Alignment of a region: what a bulk copy asks for, and then some.
const ALIGN: usize = 128;

pub(super) fn check_shared(program: &Program) -> Result<(), Violation> {
    let steps = [&program.prefill, &program.decode];
    check_layout(
        &program.shared,
        shared_needs(program, &steps, &program.ring),
    )?;
    let Some(wide) = &program.wide else {
        return Ok(());
    };
    check_layout(
        &wide.shared,
        shared_needs(program, &[&wide.step], &wide.ring),
    )?;
    ensure(
        wide.shared.bytes <= program.shared.bytes,
        Rule::Shared,
        "the wide layout",
        || "it is larger than what a CTA has".to_owned(),
    )?;
    // What follows on a wide step finds its columns, its head's input and the rings' barriers where it left them.
    for region in program
        .shared
        .regions
        .iter()
        .filter(|r| r.name != "Pages" && r.name != "Stream")
    {
        let there = |other: &&Region| other.name == region.name && other.at == region.at;
        ensure(
            wide.shared.regions.iter().any(|other| there(&other)),
            Rule::Shared,
            &region.name,
            || "it is at another place in wide steps".to_owned(),
        )?;
    }
    Ok(())
}

fn check_layout(layout: &SharedLayout, needs: Vec<(&'static str, usize)>) -> Result<(), Violation> {
    let regions = &layout.regions;
    for (name, size) in needs {
        let mut of_name = regions.iter().filter(|region| region.name == name);
        let (Some(region), None) = (of_name.next(), of_name.next()) else {
            return ensure(false, Rule::Shared, name, || {
                "the region is not there exactly once".to_owned()
            });
        };
        ensure(region.bytes >= size, Rule::Shared, name, || {
            format!("{} B; its phases keep {size} B there", region.bytes)
        })?;
        ensure(region.at.is_multiple_of(ALIGN), Rule::Shared, name, || {
            format!("it begins at {}", region.at)
        })?;
    }
    let needs = regions.iter().map(|region| Need {
        name: format!("region {}", region.name),
        at: region.at,
        size: region.bytes,
    });
    disjoint(needs.collect(), layout.bytes, Rule::Shared, "B")
}

/// What the device code keeps in each region of shared memory in these steps, in bytes.
fn shared_needs(program: &Program, steps: &[&Step], ring: &Ring) -> Vec<(&'static str, usize)> {
    let a = &program.attention;
    let columns = steps.iter().map(|step| step.columns).max().unwrap_or(0);
    // The sampler runs in the layout of decode steps.
    let samples = steps
        .iter()
        .any(|step| std::ptr::eq(*step, &program.decode));
    let decode = if samples { program.decode.columns } else { 0 };
    // linear.cuh, Products: [warps that split columns, columns, rows of a pass + 4] f32; rows.cuh: of sixteen at once.
    let at_once = columns.min(16);
    let products = program.linears.iter().map(|linear| {
        let t = &linear.tiling;
        t.warp_k() * at_once * (t.pass_tiles * TILE + 4) * 4
    });
    // generate.cuh, load_rope: attention of words.
    let of_words = steps.iter().filter(|s| s.transport == Transport::Words);
    let turned = of_words.map(|step| step.columns).max().unwrap_or(0);
    // attention.cuh, WarpResult: a head's values, maximum and sum of every warp, f32, padded to four.
    let results = CONSUMER_WARPS * a.heads_per_task * (a.head_dim + 4) * 4;
    // candidates.cuh, Choices: of each warp 64 logits, tokens and columns; per column candidates of the warps, the winner, its state, three draws, four masses and
    // three counts of each warp.
    let choices = decode * (8 * CONSUMER_WARPS + 8 + 8 + 3 * 8 + (16 + 12) * CONSUMER_WARPS)
        + 4
        + CONSUMER_WARPS * 64 * 3 * 4;
    // radix.cuh, in place of the activation: per column two histograms, a prefix, a floor and a 64-bit target.
    let sampling = decode * (2 * 256 * 4 + 4 + 4 + 8);
    // context.cuh, padded: a row of bf16 has 16 bytes more than it holds.
    let row = |width: usize| (width + 8) * 2;
    let operands = program
        .linears
        .iter()
        .map(|linear| columns * row(linear.width()));
    let heads = columns * row(a.width());
    let head = columns * row(program.head.width());
    // attention.cuh: behind the operand into which replicated columns' heads go, a task's q, k and v are gathered.
    let replicated = steps
        .iter()
        .filter(|step| step.replicate_below > 0)
        .flat_map(|step| step.layer.iter().map(move |phase| (*step, phase)))
        .filter_map(|(step, phase)| match phase {
            Phase::Attention { next, .. } => {
                let heads = step.columns * row(program.linears.get(*next)?.width());
                Some(heads + (a.heads_per_task + 2) * a.head_dim * 2)
            }
            _ => None,
        });
    // residual.cuh, Replicated: six f32 of every unit of a thread, threads innermost.
    let stream = steps.iter().filter_map(|step| {
        let exchange = step.layer.iter().find_map(|phase| match phase {
            Phase::AddToStream { exchange, .. } => Some(exchange),
            _ => None,
        })?;
        let words = program.linears.get(exchange.source)?.words();
        let units = views::producers(program, exchange, (0, 0)).len() * words;
        let lanes = (CONSUMER_WARPS / step.columns).max(1) * 32;
        let rounds = (step.columns / CONSUMER_WARPS).max(1) * units.div_ceil(lanes);
        Some(rounds * 6 * 4 * CONSUMER_WARPS * 32)
    });
    let stream = stream.max().map(|bytes| ("Stream", bytes));
    let mut needs = vec![
        ("Pages", ring.pages * ring.page_bytes),
        // Barriers of both rings, the one at which memory is handed over, and the flag.
        ("RingStorage", program.ring.pages * 16 + 8 + 4),
        // Slot, position, token, first: 4 bytes each; a pointer. Then a note, padded.
        ("Columns", Target::MAX_COLUMNS * (4 * 4 + 8) + 8),
        // Two 64-bit numbers, four of 32, and a logit of each warp.
        (
            "Draws",
            Target::MAX_COLUMNS * (8 * 2 + 4 * 4 + 4 * CONSUMER_WARPS),
        ),
        ("SumSquares", columns * CONSUMER_WARPS * 4),
        ("Rope", turned * a.head_dim / 2 * 8),
        (
            "Scratch",
            products.chain([results, choices]).max().unwrap_or(0),
        ),
        (
            "Activation",
            operands
                .chain(replicated)
                .chain([heads, head, sampling])
                .max()
                .unwrap_or(0),
        ),
    ];
    needs.extend(stream);
    needs.extend(
        program
            .wide
            .as_ref()
            .map(|wide| ("WideRingStorage", wide.ring.pages * 16 + 8 + 4)),
    );
    needs
}
