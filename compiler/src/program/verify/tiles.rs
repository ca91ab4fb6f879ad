//! Weights: every row packed once, every tile streamed once, passes and pages as the device code divides them.

use super::{Rule, Violation, ensure};
use crate::fuse::Epilogue;
use crate::mesh::{Share, Split};
use crate::program::{CONSUMER_WARPS, Linear, Program, RowOrder, TILE, TILE_BYTES};

pub(super) fn check(program: &Program) -> Result<(), Violation> {
    let mesh = &program.mesh;
    for ring in program.rings() {
        for in_flight in [ring.in_flight, ring.head_in_flight] {
            ensure(
                in_flight >= 1 && in_flight <= ring.pages,
                Rule::Ring,
                "ring",
                || format!("{in_flight} pages in flight of {}", ring.pages),
            )?;
        }
        ensure(
            ring.page_bytes > 0 && ring.page_bytes.is_multiple_of(TILE_BYTES),
            Rule::Ring,
            "ring",
            || format!("pages of {} B are no whole tiles", ring.page_bytes),
        )?;
    }
    for linear in &program.linears {
        let slices: Vec<(Share, Share)> = (0..mesh.workers())
            .map(|cta| mesh.coordinates(cta))
            .map(|(group, member)| linear.slice(mesh, group, member))
            .collect();
        let rows: usize = linear.parts.iter().map(|(_, rows)| rows).sum();
        ensure(linear.rows() == rows, Rule::Tiles, &linear.name, || {
            format!("{} packed rows for {rows} rows of weights", linear.rows())
        })?;
        check_linear(program, linear, &slices)?;
        let splits_columns =
            [linear.placement.groups, linear.placement.members].contains(&Split::Columns);
        ensure(
            linear.epilogue != Epilogue::SwiGlu || !splits_columns,
            Rule::Tiles,
            &linear.name,
            || "partial sums cannot pass through SwiGLU".to_owned(),
        )?;
    }
    check_writers(program)?;

    let head = &program.head;
    let slices: Vec<(Share, Share)> = (0..mesh.ctas)
        .map(|cta| {
            (
                program.head_rows(cta),
                Share {
                    begin: 0,
                    count: head.k_tiles,
                },
            )
        })
        .collect();
    let rows: usize = head.parts.iter().map(|(_, rows)| rows).sum();
    ensure(
        rows == program.vocab && head.rows() == rows.next_multiple_of(TILE),
        Rule::Tiles,
        &head.name,
        || {
            format!(
                "{} packed rows, {rows} rows of weights, {} tokens",
                head.rows(),
                program.vocab
            )
        },
    )?;
    check_linear(program, head, &slices)?;
    ensure(head.tiling.warp_k() == 1, Rule::Pages, &head.name, || {
        format!(
            "{} warps share a row; a warp of the head holds whole rows",
            head.tiling.warp_k()
        )
    })
}

fn check_linear(
    program: &Program,
    linear: &Linear,
    slices: &[(Share, Share)],
) -> Result<(), Violation> {
    ensure(
        linear.columns == linear.k_tiles * TILE,
        Rule::Tiles,
        &linear.name,
        || {
            format!(
                "{} column tiles for {} columns",
                linear.k_tiles, linear.columns
            )
        },
    )?;
    check_rows(program, linear)?;
    check_cover(linear, slices)?;
    check_tiling(program, linear, slices)
}

/// Every row of every part is packed exactly once, at a multiple of what the order asks for.
fn check_rows(program: &Program, linear: &Linear) -> Result<(), Violation> {
    let groups = program.mesh.groups;
    let fits = match linear.order {
        RowOrder::Stacked => linear.epilogue != Epilogue::SwiGlu,
        RowOrder::ByGroup { groups: of } => {
            of == groups
                && linear.row_units == groups
                && linear
                    .parts
                    .iter()
                    .all(|(_, rows)| rows.is_multiple_of(groups))
                && linear.epilogue != Epilogue::SwiGlu
        }
        RowOrder::Interleaved => {
            linear.epilogue == Epilogue::SwiGlu
                && linear.unit_tiles.is_multiple_of(2)
                && matches!(linear.parts[..], [(_, gate), (_, up)] if gate == up)
        }
    };
    ensure(fits && linear.rows() > 0, Rule::Tiles, &linear.name, || {
        format!("rows in the order {:?} do not fit its parts", linear.order)
    })?;
    let mut seen: Vec<Vec<bool>> = linear
        .parts
        .iter()
        .map(|(_, rows)| vec![false; *rows])
        .collect();
    for row in 0..linear.rows() {
        let Some(element) = linear.source_row(row) else {
            continue;
        };
        let part = linear
            .parts
            .iter()
            .position(|(weight, _)| *weight == element.weight);
        let once = part
            .and_then(|part| seen[part].get_mut(element.row))
            .is_some_and(|seen| !std::mem::replace(seen, true));
        ensure(once, Rule::Tiles, &linear.name, || {
            format!(
                "packed row {row} is row {} of {:?}, which does not exist or was packed",
                element.row, element.weight
            )
        })?;
    }
    ensure(
        seen.iter().flatten().all(|seen| *seen),
        Rule::Tiles,
        &linear.name,
        || "a row of its weights is packed nowhere".to_owned(),
    )
}

/// The slices are rectangles of tiles; together they cover the matrix once.
fn check_cover(linear: &Linear, slices: &[(Share, Share)]) -> Result<(), Violation> {
    let (rows, columns) = (linear.row_units * linear.unit_tiles, linear.k_tiles);
    let mut streamed = vec![0u8; rows * columns];
    for (cta, (r, k)) in slices.iter().enumerate() {
        ensure(
            r.begin + r.count <= rows && k.begin + k.count <= columns,
            Rule::Tiles,
            &linear.name,
            || format!("the slice of CTA {cta} leaves the matrix"),
        )?;
        for row in r.begin..r.begin + r.count {
            let at = row * columns + k.begin;
            for tile in &mut streamed[at..at + k.count] {
                *tile = tile.saturating_add(1);
            }
        }
    }
    match streamed.iter().position(|times| *times != 1) {
        None => Ok(()),
        Some(at) => ensure(false, Rule::Tiles, &linear.name, || {
            format!(
                "tile ({}, {}) is streamed {} times",
                at / columns,
                at % columns,
                streamed[at]
            )
        }),
    }
}

fn check_tiling(
    program: &Program,
    linear: &Linear,
    slices: &[(Share, Share)],
) -> Result<(), Violation> {
    let t = &linear.tiling;
    let pages = |holds: bool, message: &dyn Fn() -> String| {
        ensure(holds, Rule::Pages, &linear.name, message)
    };
    pages(
        t.warp_rows > 0 && CONSUMER_WARPS.is_multiple_of(t.warp_rows),
        &|| format!("{} warp rows of {CONSUMER_WARPS} warps", t.warp_rows),
    )?;
    pages(
        t.pass_tiles > 0 && t.pass_tiles == t.tiles_per_warp * t.warp_rows,
        &|| {
            format!(
                "{} row tiles a pass for {} x {}",
                t.pass_tiles, t.tiles_per_warp, t.warp_rows
            )
        },
    )?;
    pages(t.page_k > 0 && t.page_k.is_multiple_of(t.warp_k()), &|| {
        format!(
            "pages of {} column tiles for {} warps",
            t.page_k,
            t.warp_k()
        )
    })?;
    ensure(
        program
            .rings()
            .all(|ring| t.page_bytes() <= ring.page_bytes),
        Rule::Ring,
        &linear.name,
        || {
            format!(
                "pages of {} B in a ring of {} B pages",
                t.page_bytes(),
                program.ring.page_bytes
            )
        },
    )?;
    let most = |of: &dyn Fn(&(Share, Share)) -> usize| slices.iter().map(of).max().unwrap_or(0);
    let (rows, k) = (most(&|slice| slice.0.count), most(&|slice| slice.1.count));
    pages(t.rows == rows && t.k == k, &|| {
        format!(
            "the largest slice is {rows} x {k} tiles, not {} x {}",
            t.rows, t.k
        )
    })?;
    pages(t.passes == rows.div_ceil(t.pass_tiles), &|| {
        format!(
            "{} passes of {} over {rows} row tiles",
            t.passes, t.pass_tiles
        )
    })?;
    let full_passes = slices
        .iter()
        .all(|(r, _)| r.count == t.passes * t.pass_tiles);
    pages(!t.rows_exact || full_passes, &|| {
        "rows are not exact: a slice leaves a pass unfilled".to_owned()
    })?;
    let full_pages = slices
        .iter()
        .all(|(_, s)| s.count == t.k && s.count.is_multiple_of(t.page_k));
    pages(!t.k_exact || full_pages, &|| {
        "columns are not exact: a slice leaves a page unfilled".to_owned()
    })
}

/// The device code walks the residual stream by the words of one of its writers, so all must divide it alike.
fn check_writers(program: &Program) -> Result<(), Violation> {
    let mut writers = program
        .linears
        .iter()
        .filter(|linear| linear.epilogue == Epilogue::AddResidual);
    let Some(first) = writers.next() else {
        return ensure(false, Rule::Tiles, "the layer", || {
            "nothing writes the residual stream".to_owned()
        });
    };
    let division = |linear: &Linear| {
        let t = &linear.tiling;
        (
            linear.placement,
            linear.row_units,
            linear.unit_tiles,
            t.passes,
            t.pass_tiles,
        )
    };
    writers.try_for_each(|linear| {
        ensure(
            division(linear) == division(first),
            Rule::Tiles,
            &linear.name,
            || {
                format!(
                    "it divides the residual stream in another way than {}",
                    first.name
                )
            },
        )
    })
}
