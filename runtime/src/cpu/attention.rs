//! Causal grouped-query attention of one layer with its KV cache: the twin of `compiler/device/attention.cuh`.
//!
//! The members of a group work on tasks: one column, one KV head, some of its query heads, and one of the interleaved parts
//! of the positions. The parts of a head are merged by whoever collects them. A column of few positions is worked on by
//! every member. In prefill a member first gathers the group's q, k and v of all columns; in decode each task's alone.

use mirage_compiler::mesh::Share;
use mirage_compiler::program::{Attention, Exchange, Linear, Norm, STRIPE, TILE, VALUES_PER_WORD};

use super::area::{PhaseFault, Values, bits, round};
use super::cta::{Append, Cta, Head, Now};
use super::exchange::{View, publish};

/// The score of no position at all; finite, so that differences of maxima are numbers.
const NO_SCORE: f32 = -1e30;

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

/// Parts of a column's positions that are not empty.
fn active_splits(now: &Now<'_>, column: usize) -> usize {
    now.kv_splits.min(now.columns[column].position / STRIPE + 1)
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
    pub(super) async fn attention(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
    ) -> Result<(), PhaseFault> {
        let mesh = &now.shared.mesh;
        let a = &now.shared.program.attention;
        if !now.alone {
            for column in 0..now.columns.len() {
                self.gather_heads(now, exchange, column, |_| true).await?;
                if column % mesh.members == self.member {
                    for kv_head in 0..a.kv_heads {
                        self.append(now, column, kv_head);
                    }
                }
            }
        }
        for block in 0..now.columns.len() * blocks(a) {
            let (column, of_column) = (block / blocks(a), block % blocks(a));
            let whole = replicated(now, column);
            let first_task = block * now.kv_splits;
            let splits = if whole { 1 } else { active_splits(now, column) };
            for split in 0..splits {
                if !whole && (first_task + split) % mesh.members != self.member {
                    continue;
                }
                if now.alone {
                    let appends = if whole {
                        column % mesh.members == self.member
                    } else {
                        split == 0
                    };
                    self.gather_task(now, exchange, column, of_column, appends)
                        .await?;
                }
                if whole {
                    self.whole_block(now, block)?;
                } else {
                    self.task(now, first_task + split)?;
                }
            }
        }
        Ok(())
    }

    /// Brings what a block of tasks needs of a column into the activation. With `appends`, the first of the blocks that share
    /// keys and values appends them to the cache.
    async fn gather_task(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        column: usize,
        block: usize,
        appends: bool,
    ) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        let kv_head = kv_head_of(a, block);
        let first = block * a.heads_per_task;
        let (key, value) = (a.heads + kv_head, a.heads + a.kv_heads + kv_head);
        self.gather_heads(now, exchange, column, |head| {
            (first..first + a.heads_per_task).contains(&head) || head == key || head == value
        })
        .await?;
        if appends && first.is_multiple_of(a.heads / a.kv_heads) {
            self.append(now, column, kv_head);
        }
        Ok(())
    }

    /// Brings heads of q, k and v of the group into the activation and makes them ready for scores.
    async fn gather_heads(
        &mut self,
        now: &Now<'_>,
        exchange: Exchange,
        column: usize,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<(), PhaseFault> {
        let shared = now.shared;
        let a = &shared.program.attention;
        let view = View::new(now, exchange, self);
        let of_group = view.source().slice(&shared.mesh, self.group, 0).0.begin;
        let whole = Share {
            begin: of_group,
            count: a.width() / TILE,
        };
        for unit in 0..view.units() {
            let span = view.span(unit);
            let mut heads = span
                .clone()
                .map(|output| (output - of_group * TILE) / a.head_dim);
            if heads.any(&wanted) {
                let values = view.collect(now, unit, column).await?;
                let values = &values[..span.len()];
                self.store(shared.stride, column, whole, span.start, values);
            }
        }
        let pairs = a.head_dim / 2;
        let turns = &shared.weights.rope[now.columns[column].position * pairs..][..pairs];
        // Scores in powers of two: exp(x) = exp2(x log2 e).
        let scale = a.scale * std::f32::consts::LOG2_E;
        let row = &mut self.activation[column * shared.stride..][..a.width()];
        let heads = row.chunks_exact_mut(a.head_dim).enumerate();
        for (head, values) in heads.filter(|(head, _)| wanted(*head)) {
            if head < a.heads {
                norm(now, a.q_norm, values);
                rotate(values, turns);
                values.iter_mut().for_each(|v| *v *= scale);
            } else if head < a.heads + a.kv_heads {
                norm(now, a.k_norm, values);
                rotate(values, turns);
            }
            values.iter_mut().for_each(|v| *v = round(*v));
        }
        Ok(())
    }

    /// Keeps a column's key and value for the cache.
    fn append(&mut self, now: &Now<'_>, column: usize, kv_head: usize) {
        let a = &now.shared.program.attention;
        let this = &now.columns[column];
        let Some(slot) = this.slot else { return };
        let row = &self.activation[column * now.shared.stride..];
        let head = |head: usize| -> Vec<u16> {
            let values = &row[head * a.head_dim..][..a.head_dim];
            values.iter().map(|v| bits(*v)).collect()
        };
        let of_all = self.group * a.kv_heads + kv_head;
        let append = Append {
            at: row_at(now, slot, of_all, this.position),
            keys: head(a.heads + kv_head),
            values: head(a.heads + a.kv_heads + kv_head),
        };
        self.appends.push(append);
    }

    /// One task, published.
    fn task(&mut self, now: &Now<'_>, task: usize) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        let (split, block) = (task % now.kv_splits, task / now.kv_splits % blocks(a));
        let column = task / now.kv_splits / blocks(a);
        let kv_head = kv_head_of(a, block);
        let rows = self.rows(now, column, kv_head, |position| {
            position / STRIPE % now.kv_splits == split
        })?;
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
                now.publish(at + a.value_words(), [max, sum, sum])?;
            }
        }
        Ok(())
    }

    /// The tasks of a replicated column's heads that share keys and values, over all positions, kept.
    fn whole_block(&mut self, now: &Now<'_>, index: usize) -> Result<(), PhaseFault> {
        let a = &now.shared.program.attention;
        let (column, block) = (index / blocks(a), index % blocks(a));
        let rows = self.rows(now, column, kv_head_of(a, block), |_| true)?;
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
        Ok(())
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
        column: usize,
        kv_head: usize,
        is_part: impl Fn(usize) -> bool,
    ) -> Result<Vec<f32>, PhaseFault> {
        let a = &now.shared.program.attention;
        let this = &now.columns[column];
        let Some(slot) = this.slot else {
            return Ok(Vec::new());
        };
        // Positions of this very step are not in the cache yet; they came with the exchange.
        let cached = this.position - (column - this.first);
        let mut rows = Vec::new();
        for position in (0..=this.position).filter(|&position| is_part(position)) {
            if position < cached {
                let head = self.group * a.kv_heads + kv_head;
                let at = row_at(now, slot, head, position);
                now.memory.cached(at, a.head_dim, &mut rows)?;
            } else {
                let from = (this.first + position - cached) * now.shared.stride;
                let key = from + (a.heads + kv_head) * a.head_dim;
                rows.extend_from_slice(&self.activation[key..][..a.head_dim]);
                let value = key + a.kv_heads * a.head_dim;
                rows.extend_from_slice(&self.activation[value..][..a.head_dim]);
            }
        }
        Ok(rows)
    }

    /// Collects the heads of all columns, merges their splits, and writes them as the operand of linear `next`.
    pub(super) async fn collect_heads(
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
                    let values = merged(now, column, head, word).await?;
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
async fn merged(
    now: &Now<'_>,
    column: usize,
    head: usize,
    word: usize,
) -> Result<Values, PhaseFault> {
    let a = &now.shared.program.attention;
    let (group, local) = (head / a.heads, head % a.heads);
    let block = column * blocks(a) + local / a.heads_per_task;
    let words = |split: usize| {
        let task = block * now.kv_splits + split;
        words_of(now, group, task, local % a.heads_per_task)
    };
    if now.kv_splits == 1 {
        return now.take_values(words(0) + word).await;
    }
    let (mut max, mut sum, mut out) = (NO_SCORE, 0.0, Values::default());
    for split in 0..active_splits(now, column) {
        let part = now.take_values(words(split) + word).await?;
        let [other, weight, _] = now.take(words(split) + a.value_words()).await?;
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
