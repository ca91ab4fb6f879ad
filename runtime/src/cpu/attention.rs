//! Causal grouped-query attention of one layer with its KV cache: the twin of `compiler/device/attention.cuh`.
//!
//! Each member of a group gathers the group's q, k and v of all columns, then works on tasks: one column, one KV head, some
//! of its query heads, and one of the interleaved parts of the positions. The parts of a head are merged by whoever
//! collects them. A column of few positions is worked on by every member.

use mirage_compiler::mesh::Share;
use mirage_compiler::program::{
    Attention, Exchange, Linear, Norm, Program, STRIPE, TILE, VALUES_PER_WORD,
};

use super::area::{PhaseFault, Values, bits, value};
use super::cta::{Append, Cta, Head, Now};
use super::exchange::{View, publish};

/// The score of no position at all; finite, so that differences of maxima are numbers.
const NO_SCORE: f32 = -1e30;

/// Keys and values as bf16 bits, `[layers, slots, KV heads, positions, head_dim]` each.
pub(super) struct KvCache {
    keys: Vec<u16>,
    values: Vec<u16>,
}

impl KvCache {
    pub(super) fn new(program: &Program) -> KvCache {
        let elements = program.cache_elements();
        KvCache {
            keys: vec![0; elements],
            values: vec![0; elements],
        }
    }

    /// Takes the rows that a step has made.
    pub(super) fn append(&mut self, rows: impl Iterator<Item = Append>) {
        for row in rows {
            self.keys[row.at..][..row.keys.len()].copy_from_slice(&row.keys);
            self.values[row.at..][..row.values.len()].copy_from_slice(&row.values);
        }
    }
}

/// First element of a row of the cache; `kv_head` counts over all groups.
fn row_at(now: &Now<'_>, slot: usize, kv_head: usize, position: usize) -> usize {
    let program = &now.shared.program;
    let all = program.attention.kv_heads * now.shared.mesh.groups;
    (((now.layer * program.slots + slot) * all + kv_head) * program.max_seq + position)
        * program.attention.head_dim
}

/// Whether every member of a group attends to a column for itself.
fn replicated(now: &Now<'_>, column: usize) -> bool {
    now.columns[column].position < now.replicate_below
}

/// Tasks of a group before the splits: of one column, KV head after KV head.
fn blocks(attention: &Attention) -> usize {
    attention.heads / attention.heads_per_task
}

/// The KV head of the group that a block of tasks is about.
fn kv_head_of(attention: &Attention, block: usize) -> usize {
    block * attention.heads_per_task / (attention.heads / attention.kv_heads)
}

/// Where the words of one head of a task begin.
fn words_of(now: &Now<'_>, group: usize, task: usize, head: usize) -> usize {
    let a = &now.shared.program.attention;
    let words = a.value_words() + usize::from(now.kv_splits > 1);
    let tasks = now.columns.len() * blocks(a) * now.kv_splits;
    a.words_at + ((group * tasks + task) * a.heads_per_task + head) * words
}

/// A head's outputs over the positions of one split: not normalised, relative to the largest score.
struct Partial {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

impl Cta {
    /// The attention phase of a worker.
    pub(super) fn attention(
        &mut self,
        now: &Now<'_>,
        cache: &KvCache,
        exchange: Exchange,
    ) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        self.collect_heads_of_group(now, exchange)?;
        self.prepare_heads(now);
        let tasks = now.columns.len() * blocks(a) * now.kv_splits;
        let column_of = |task: usize| task / now.kv_splits / blocks(a);
        for task in (self.member..tasks).step_by(now.shared.mesh.members) {
            if !replicated(now, column_of(task)) {
                self.task(now, cache, task)?;
            }
        }
        for block in 0..now.columns.len() * blocks(a) {
            if replicated(now, block / blocks(a)) {
                self.whole_block(now, cache, block);
            }
        }
        Ok(())
    }

    /// Brings the group's q, k and v into the activation.
    fn collect_heads_of_group(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
    ) -> Result<(), PhaseFault> {
        let view = View::new(now, exchange, self);
        let of_group = view.source().slice(&now.shared.mesh, self.group, 0).0.begin;
        let whole = Share {
            begin: of_group,
            count: now.shared.program.attention.width() / TILE,
        };
        for column in 0..now.columns.len() {
            for unit in 0..view.units() {
                let span = view.span(unit);
                if !span.is_empty() {
                    let values = view.collect(unit, column, now.epoch)?;
                    let values = &values[..span.len()];
                    self.store(now.shared.stride, column, whole, span.start, values);
                }
            }
        }
        Ok(())
    }

    /// Makes q and k ready for scores, and keeps k and v for the cache, each column by one member.
    fn prepare_heads(&mut self, now: &Now<'_>) {
        let shared = now.shared;
        let a = &shared.program.attention;
        let pairs = a.head_dim / 2;
        // Scores in powers of two: exp(x) = exp2(x log2 e).
        let scale = a.scale * std::f32::consts::LOG2_E;
        for (index, column) in now.columns.iter().enumerate() {
            let turns = &shared.weights.rope[column.position * pairs..][..pairs];
            let row = &mut self.activation[index * shared.stride..][..a.width()];
            for (head, values) in row.chunks_exact_mut(a.head_dim).enumerate() {
                if head < a.heads {
                    norm(now, a.q_norm, values);
                    rotate(values, turns);
                    values.iter_mut().for_each(|v| *v *= scale);
                } else if head < a.heads + a.kv_heads {
                    norm(now, a.k_norm, values);
                    rotate(values, turns);
                }
                values.iter_mut().for_each(|v| *v = super::area::round(*v));
            }
            let Some(slot) = column.slot else { continue };
            if index % shared.mesh.members != self.member {
                continue;
            }
            let heads = |first: usize, kv_head: usize| -> Vec<u16> {
                let head = &row[(first + kv_head) * a.head_dim..][..a.head_dim];
                head.iter().map(|v| bits(*v)).collect()
            };
            for kv_head in 0..a.kv_heads {
                self.appends.push(Append {
                    at: row_at(
                        now,
                        slot,
                        self.group * a.kv_heads + kv_head,
                        column.position,
                    ),
                    keys: heads(a.heads, kv_head),
                    values: heads(a.heads + a.kv_heads, kv_head),
                });
            }
        }
    }

    /// One task, published.
    fn task(&mut self, now: &Now<'_>, cache: &KvCache, task: usize) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        let (split, block) = (task % now.kv_splits, task / now.kv_splits % blocks(a));
        let column = task / now.kv_splits / blocks(a);
        let kv_head = kv_head_of(a, block);
        let rows = self.rows(now, cache, column, kv_head, |position| {
            position / STRIPE % now.kv_splits == split
        });
        for head in 0..a.heads_per_task {
            let partial = self.attend(now, column, block * a.heads_per_task + head, &rows);
            let normalised = if now.kv_splits == 1 && partial.sum > 0.0 {
                partial.sum
            } else {
                1.0
            };
            let at = words_of(now, self.group, task, head);
            publish(now, at, partial.out.iter().map(|v| v / normalised))?;
            if now.kv_splits > 1 {
                let [max, sum] = [partial.max, partial.sum].map(f32::to_bits);
                now.shared
                    .area
                    .publish(at + a.value_words(), [max, sum, sum], now.epoch)?;
            }
        }
        Ok(())
    }

    /// The tasks of a replicated column's heads that share keys and values, over all positions, kept.
    fn whole_block(&mut self, now: &Now<'_>, cache: &KvCache, index: usize) {
        let a = &now.shared.program.attention;
        let (column, block) = (index / blocks(a), index % blocks(a));
        let rows = self.rows(now, cache, column, kv_head_of(a, block), |_| true);
        for head in 0..a.heads_per_task {
            let head = block * a.heads_per_task + head;
            let Partial { sum, out, .. } = self.attend(now, column, head, &rows);
            let total = if sum > 0.0 { sum } else { 1.0 };
            self.heads.push(Head {
                column,
                head: self.group * a.heads + head,
                values: out.iter().map(|v| v / total).collect(),
            });
        }
    }

    /// Softmax of a query head of the group over these rows.
    fn attend(&self, now: &Now<'_>, column: usize, head: usize, rows: &[f32]) -> Partial {
        let width = now.shared.program.attention.head_dim;
        let q = &self.activation[column * now.shared.stride + head * width..];
        attend(&q[..width], rows)
    }

    /// Keys and values, one after the other, of some of the positions up to the column's own, in f32.
    fn rows(
        &self,
        now: &Now<'_>,
        cache: &KvCache,
        column: usize,
        kv_head: usize,
        is_part: impl Fn(usize) -> bool,
    ) -> Vec<f32> {
        let a = &now.shared.program.attention;
        let this = &now.columns[column];
        let Some(slot) = this.slot else {
            return Vec::new();
        };
        // Positions of this very step are not in the cache yet; they came with the exchange.
        let cached = this.position - (column - this.first);
        let mut rows = Vec::new();
        for position in (0..=this.position).filter(|&position| is_part(position)) {
            if position < cached {
                let head = self.group * a.kv_heads + kv_head;
                let at = row_at(now, slot, head, position);
                let widen =
                    |row: &[u16], to: &mut Vec<f32>| to.extend(row.iter().map(|&b| value(b)));
                widen(&cache.keys[at..][..a.head_dim], &mut rows);
                widen(&cache.values[at..][..a.head_dim], &mut rows);
            } else {
                let from = (this.first + position - cached) * now.shared.stride;
                let key = from + (a.heads + kv_head) * a.head_dim;
                rows.extend_from_slice(&self.activation[key..][..a.head_dim]);
                let value = key + a.kv_heads * a.head_dim;
                rows.extend_from_slice(&self.activation[value..][..a.head_dim]);
            }
        }
        rows
    }

    /// Collects the heads of all columns, merges their splits, and writes them as the operand of linear `next`.
    pub(super) fn collect_heads(
        &mut self,
        now: &Now<'_>,
        next: &Linear,
        all_groups: bool,
    ) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        let (_, k) = self.slice(now.shared, next);
        let groups = if all_groups {
            0..now.shared.mesh.groups
        } else {
            self.group..self.group + 1
        };
        for Head {
            column,
            head,
            values,
        } in std::mem::take(&mut self.heads)
        {
            self.store(now.shared.stride, column, k, head * a.head_dim, &values);
        }
        for column in (0..now.columns.len()).filter(|&column| !replicated(now, column)) {
            for head in groups.start * a.heads..groups.end * a.heads {
                for word in 0..a.value_words() {
                    let values = merged(now, column, head, word)?;
                    let within = word * VALUES_PER_WORD;
                    let values = &values[..VALUES_PER_WORD.min(a.head_dim - within)];
                    let begin = head * a.head_dim + within;
                    self.store(now.shared.stride, column, k, begin, values);
                }
            }
        }
        Ok(())
    }
}

/// A word of a head, counted over all groups, merged from its splits.
fn merged(now: &Now<'_>, column: usize, head: usize, word: usize) -> Result<Values, PhaseFault> {
    let a = &now.shared.program.attention;
    let (group, local) = (head / a.heads, head % a.heads);
    let block = column * blocks(a) + local / a.heads_per_task;
    let words = |split: usize| {
        let task = block * now.kv_splits + split;
        words_of(now, group, task, local % a.heads_per_task)
    };
    let area = &now.shared.area;
    if now.kv_splits == 1 {
        return area.take_values(words(0) + word, now.epoch);
    }
    let (mut max, mut sum, mut out) = (NO_SCORE, 0.0, Values::default());
    for split in 0..now.kv_splits {
        let part = area.take_values(words(split) + word, now.epoch)?;
        let [other, weight, _] = area.take(words(split) + a.value_words(), now.epoch)?;
        let (other, weight) = (f32::from_bits(other), f32::from_bits(weight));
        let new_max = f32::max(max, other);
        let (keep, add) = ((max - new_max).exp2(), (other - new_max).exp2());
        max = new_max;
        sum = sum * keep + weight * add;
        for (out, part) in out.iter_mut().zip(part) {
            *out = *out * keep + part * add;
        }
    }
    let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
    Ok(out.map(|v| v * scale))
}

/// Softmax over rows of a key and a value each; scores are in powers of two.
fn attend(q: &[f32], rows: &[f32]) -> Partial {
    let width = q.len();
    let dot = |row: &[f32]| -> f32 { q.iter().zip(&row[..width]).map(|(q, k)| q * k).sum() };
    let scores: Vec<f32> = rows.chunks_exact(2 * width).map(dot).collect();
    let max = scores.iter().copied().fold(NO_SCORE, f32::max);
    let (mut sum, mut out) = (0.0, vec![0.0; width]);
    for (score, row) in scores.iter().zip(rows.chunks_exact(2 * width)) {
        let p = (score - max).exp2();
        sum += p;
        for (out, v) in out.iter_mut().zip(&row[width..]) {
            *out += p * v;
        }
    }
    Partial { max, sum, out }
}

/// RMSNorm of one head, in place; nothing where the model has none.
fn norm(now: &Now<'_>, norm: Option<Norm>, head: &mut [f32]) {
    let Some(norm) = norm else { return };
    let at = norm.gamma_at + now.layer * norm.gamma_stride;
    let gamma = &now.shared.weights.norms[at..][..head.len()];
    let squares: f32 = head.iter().map(|v| v * v).sum();
    let scale = 1.0 / (squares / head.len() as f32 + norm.eps).sqrt();
    for (value, gamma) in head.iter_mut().zip(gamma) {
        *value *= scale * gamma.to_f32();
    }
}

/// Turns element `i` of the first half with element `i` of the second, by {cos, sin} of the column's position.
fn rotate(head: &mut [f32], turns: &[[f32; 2]]) {
    let (low, high) = head.split_at_mut(turns.len());
    for ((low, high), [cos, sin]) in low.iter_mut().zip(high).zip(turns) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
