//! Steps that exchange rows: what their phases take for granted.

use super::{Rule, Violation, ensure};
use crate::plan::{StreamForm, Target, Transport};
use crate::program::{CHUNK, CONSUMER_WARPS, MOST_PRODUCTS, Program, Step, stream_share};

/// What a step that exchanges rows takes for granted (`device/rows.cuh`, `stream_rows.cuh`, `attention_rows.cuh`).
pub(super) fn check(program: &Program, name: &str, step: &Step) -> Result<(), Violation> {
    let ring = match &program.wide {
        Some(wide) if std::ptr::eq(step, &wide.step) => &wide.ring,
        _ => &program.ring,
    };
    let rule =
        |holds: bool, message: &dyn Fn() -> String| ensure(holds, Rule::Steps, name, message);
    let (columns, block) = (step.columns, Target::ROW_COLUMNS);
    rule(columns.is_multiple_of(block), &|| {
        format!("{columns} columns; rows come in blocks of {block}")
    })?;
    rule(
        step.stream == StreamForm::Scattered && step.kv_splits == 1 && step.replicate_below == 0,
        &|| "rows are for a scattered stream and attention in one part".to_owned(),
    )?;
    if let Some(wide) = program
        .wide
        .as_ref()
        .filter(|wide| std::ptr::eq(step, &wide.step))
    {
        let narrow = &program.prefill;
        rule(wide.step.columns > narrow.columns, &|| {
            format!(
                "{columns} columns, other prefill steps have {}",
                narrow.columns
            )
        })?;
        // The same to the bit, where it depends on other sequences which kind a position goes through.
        rule(
            program.slots == 1 || narrow.transport == Transport::Rows,
            &|| "other prefill steps exchange words".to_owned(),
        )?;
    }
    let share = stream_share(
        program.hidden,
        program.most_columns(),
        program.mesh.workers(),
    );
    rule(share <= CONSUMER_WARPS * 32, &|| {
        format!("a worker's share of the stream takes {share} threads")
    })?;
    for linear in &program.linears {
        let t = &linear.tiling;
        let products = t.tiles_per_warp * columns / 8;
        let in_ring = t.k.div_ceil(t.page_k) <= ring.pages;
        rule(
            products <= MOST_PRODUCTS || (products <= 2 * MOST_PRODUCTS && in_ring),
            &|| format!("a warp holds {products} products of {}", linear.name),
        )?;
        rule(
            linear
                .norm
                .is_none_or(|norm| norm.gamma_at.is_multiple_of(CHUNK)),
            &|| format!("gamma of {} is not at a multiple of {CHUNK}", linear.name),
        )?;
    }
    Ok(())
}
