//! What each phase of a program takes: two CTAs walk through a layer, an average one and the one whose weights come slowest.
//!
//! Owns the formulas by phase. A linear uses up pages and waits for those that are not there. An exchange within a group
//! leaves each of the two at its own pace; one over the grid begins for both when the slower is there, and is itself slower
//! for as long as weights stream beside it. What is told is the average one's time. Nothing here chooses anything.

use super::ring::{Arrival, RingWalk};
use super::{Fan, Machine};
use crate::fuse::Epilogue;
use crate::mesh::Mesh;
use crate::plan::Transport;
use crate::program::{
    Along, Attention, CONSUMER_WARPS, Exchange, Linear, Phase, Program, STRIPE, Step, TILE_BYTES,
    VALUES_PER_WORD, WORD_BYTES,
};

/// Layers until one is like the next.
const LAYERS: usize = 3;
/// Words that a CTA's warps publish at once (`device/words.cuh`, `publish_values`).
const PUBLISHED: usize = CONSUMER_WARPS * 10;
/// Words of heads that a thread asks for at once (`device/attention.cuh`, `collect_heads`): of a part the values and its sums.
const PARTS_AT_ONCE: usize = 4;
const CONSUMERS: usize = CONSUMER_WARPS * 32;

/// Predicted time of a step, by phase. Microseconds, on average over the CTAs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prediction {
    /// The phases of a layer, in their order.
    pub phases: Vec<f64>,
    /// What follows the layers: the head and the choice of the tokens, or the barrier after a prefill step.
    pub head: f64,
    /// The whole step.
    pub total: f64,
}

impl Prediction {
    /// A step of `program` whose columns are at position `depth`. `decode` says which of the two kinds of step.
    pub fn new(program: &Program, machine: &Machine, decode: bool, depth: usize) -> Prediction {
        let step = if decode {
            &program.decode
        } else {
            &program.prefill
        };
        let mut walk = Walk::new(program, machine, step, decode, depth);
        let mut phases = Vec::new();
        for _ in 0..LAYERS {
            phases = walk.layer();
        }
        let head = match decode {
            true => walk.head(),
            false => machine.exchange.barrier,
        };
        let begin = machine.column * step.columns as f64;
        Prediction {
            total: begin + phases.iter().sum::<f64>() * program.layers as f64 + head,
            phases,
            head,
        }
    }
}

/// One CTA under way.
struct Pace {
    now: f64,
    ring: RingWalk,
}

struct Walk<'a> {
    program: &'a Program,
    machine: &'a Machine,
    step: &'a Step,
    decode: bool,
    depth: usize,
    /// The average CTA and the slowest.
    paces: [Pace; 2],
    /// What the members with the most tasks of attention still do while the others wait for heads.
    ahead: f64,
}

/// What an exchange brings.
#[derive(Clone, Copy)]
struct Read {
    /// Words that a CTA reads.
    words: usize,
    /// CTAs whose words these are.
    producers: usize,
    /// Whether these are of several groups.
    of_grid: bool,
    /// Times that a thread asks for words one after the other.
    turns: usize,
}

impl<'a> Walk<'a> {
    fn new(
        program: &'a Program,
        machine: &'a Machine,
        step: &'a Step,
        decode: bool,
        depth: usize,
    ) -> Walk<'a> {
        let (ring, workers) = (&program.ring, program.mesh.workers());
        let share = workers as f64 / program.mesh.ctas as f64;
        let pages: Vec<usize> = program.linears.iter().flat_map(pages_of).collect();
        let paces = [1.0, machine.stream.slowest].map(|slower| {
            let slower = slower * machine.stream.disturbed;
            let time = |bytes: usize| {
                let of = |in_flight: usize| {
                    let rate = machine.ring_rate(bytes, in_flight, share);
                    slower * (bytes * workers) as f64 / rate
                };
                Arrival {
                    next: of(ring.in_flight),
                    first: of(1),
                }
            };
            Pace {
                now: 0.0,
                ring: RingWalk::new(pages.clone(), ring.pages, time),
            }
        });
        Walk {
            program,
            machine,
            step,
            decode,
            depth,
            paces,
            ahead: 0.0,
        }
    }

    fn layer(&mut self) -> Vec<f64> {
        let mut times = Vec::new();
        for phase in &self.step.layer {
            let begin = self.paces[0].now;
            match phase {
                Phase::Linear(index) => self.linear(&self.program.linears[*index]),
                Phase::Attention { exchange, .. } => self.attention(exchange),
                Phase::CollectHeads { all_groups, .. } => {
                    self.each(|walk| walk.ahead);
                    self.ahead = 0.0;
                    self.exchange(self.heads(*all_groups));
                }
                Phase::Collect { exchange, .. } => self.exchange(self.read(exchange)),
                Phase::AddToStream { exchange, .. } => {
                    let read = self.read(exchange);
                    self.exchange(read);
                    let of_thread = read.words as f64 / CONSUMERS as f64;
                    self.each(|walk| walk.machine.exchange.sum * of_thread);
                }
                Phase::ReduceScatter { exchange, .. } => {
                    let read = self.read(exchange);
                    let words = read.words.div_ceil(self.program.mesh.workers());
                    self.exchange(Read { words, ..read });
                }
                Phase::GatherStream { exchange, .. } => {
                    self.exchange(self.gathered(exchange));
                    self.each(|walk| walk.machine.exchange.scatter);
                }
            }
            times.push(self.paces[0].now - begin);
        }
        times
    }

    /// Time passes for both.
    fn each(&mut self, time: impl Fn(&Self) -> f64) {
        let time = time(self);
        self.paces.iter_mut().for_each(|pace| pace.now += time);
    }

    /// The pages of the largest slice, and after each pass the sum over the warps, the epilogue and the words. SwiGLU adds
    /// up two products for each output.
    fn linear(&mut self, linear: &Linear) {
        let (machine, columns) = (self.machine, self.step.columns);
        let t = &linear.tiling;
        let rounds = (columns * linear.pass_words()).div_ceil(PUBLISHED);
        let products = if linear.epilogue == Epilogue::SwiGlu {
            2
        } else {
            1
        };
        let end = machine.linear.pass * (rounds * products) as f64;
        let work = |bytes: usize| machine.pages(1, bytes / TILE_BYTES, columns);
        for pace in &mut self.paces {
            pace.now += machine.linear.fixed;
            for _ in 0..t.passes {
                for _ in 0..t.k.div_ceil(t.page_k) {
                    pace.now = pace.ring.take(pace.now, work);
                }
                pace.now += end;
            }
        }
    }

    fn exchange(&mut self, read: Read) {
        if read.words == 0 {
            // Nothing is waited for but the barrier inside the CTA; a trip to L2 is most of the shortest exchange.
            let shortest = self.machine.exchange.group.idle[0];
            return self.each(|_| shortest / 2.0);
        }
        if read.of_grid {
            let late = self.paces[0].now.max(self.paces[1].now);
            self.paces.iter_mut().for_each(|pace| pace.now = late);
        }
        let fan = Fan {
            producers: read.producers,
            ctas: self.program.mesh.ctas,
        };
        let (e, ring) = (&self.machine.exchange, &self.program.ring);
        // Rows are copied as they are, behind a flag; not measured by itself.
        let (words, turns, flag) = match self.step.transport {
            Transport::Words => (read.words, read.turns, 0.0),
            Transport::Rows => {
                let bytes = read.words * VALUES_PER_WORD * 2;
                (bytes.div_ceil(WORD_BYTES), 1, self.machine.search.flag)
            }
        };
        let idle = e.idle(words, fan);
        let busy = e.busy(words, fan, ring.in_flight * ring.page_bytes);
        let again = flag + (turns - 1) as f64 * e.idle(1, fan);
        for pace in &mut self.paces {
            // The stream runs until the ring is full.
            let beside = ((pace.ring.full_at() - pace.now) / busy).clamp(0.0, 1.0);
            pace.now += idle + beside * (busy - idle) + again;
        }
    }

    /// A linear's output as a reader takes it.
    fn read(&self, exchange: &Exchange) -> Read {
        let mesh = &self.program.mesh;
        let producers = along(exchange, mesh, Along::Concat) * along(exchange, mesh, Along::Sum);
        let words = self.program.linears[exchange.source].words();
        Read {
            words: self.step.columns * producers * words,
            producers,
            of_grid: exchange.groups != Along::Own && mesh.groups > 1,
            turns: 1,
        }
    }

    /// A handed-on residual stream: a warp's columns one after the other.
    fn gathered(&self, exchange: &Exchange) -> Read {
        let mesh = &self.program.mesh;
        let source = &self.program.linears[exchange.source];
        let words = along(exchange, mesh, Along::Concat) * source.gathered_words();
        Read {
            words: self.step.columns * words,
            producers: mesh.workers(),
            of_grid: true,
            turns: self.step.columns.div_ceil(CONSUMER_WARPS),
        }
    }

    /// The heads of every column, of each part of its positions the values and the sums. None where each member has them.
    fn heads(&self, all_groups: bool) -> Read {
        let (a, step, mesh) = (&self.program.attention, self.step, &self.program.mesh);
        let groups = if all_groups { mesh.groups } else { 1 };
        let units = step.columns * groups * a.heads * a.value_words();
        let (words, turns) = match step.kv_splits {
            1 => (units, 1),
            _ => {
                let lanes = if 2 * units <= CONSUMERS { 2 } else { 1 };
                let of_thread = self.parts().div_ceil(lanes).div_ceil(PARTS_AT_ONCE);
                (
                    2 * units * self.parts(),
                    of_thread * (units * lanes).div_ceil(CONSUMERS),
                )
            }
        };
        Read {
            words: if self.is_replicated() { 0 } else { words },
            producers: groups * mesh.members,
            of_grid: all_groups && mesh.groups > 1,
            turns,
        }
    }

    fn is_replicated(&self) -> bool {
        self.depth < self.step.replicate_below
    }

    fn stripes(&self) -> usize {
        (self.depth + 1).div_ceil(STRIPE)
    }

    /// Parts of a column's positions that have any.
    fn parts(&self) -> usize {
        self.stripes().min(self.step.kv_splits)
    }

    /// Collecting q, k and v, behind the keys and values that are asked for first and stand in their way; then for every
    /// task norms and RoPE, its stripes, and merging the warps' results. A member steps over the blocks of others.
    fn attention(&mut self, exchange: &Exchange) {
        let (program, step, machine) = (self.program, self.step, self.machine);
        let (a, mesh) = (&program.attention, &program.mesh);
        let blocks = step.columns * (a.heads / a.heads_per_task);
        let (parts, tasks) = match self.is_replicated() {
            true => (1, blocks as f64),
            false => (
                self.parts(),
                (blocks * self.parts()) as f64 / mesh.members as f64,
            ),
        };
        let read = self.read(exchange);
        let words = self.qkv_words(a) * along(exchange, mesh, Along::Sum);
        let bytes = self.kv_bytes(a);
        let fetch = (bytes * mesh.groups) as f64 / machine.stream_rate();
        let begin = self.paces[0].now;
        self.exchange(Read { words, ..read });
        for pace in &mut self.paces {
            pace.ring.stand_back(pace.now, fetch);
        }
        let stripes = self.stripes().div_ceil(parts) as f64;
        let task = machine.attention.task + stripes * machine.attention.stripe;
        let attend = fetch + tasks.ceil() * task + blocks as f64 * machine.attention.block;
        self.each(|_| attend);
        // Members without a task are through at once, and wait where the heads are collected.
        let idle = (1.0 - tasks).max(0.0) * (self.paces[0].now - begin);
        self.each(|_| -idle);
        self.ahead = idle;
    }

    /// Words of q, k and v that a member takes: a decode step's task its own heads, a prefill step all of its group.
    fn qkv_words(&self, a: &Attention) -> usize {
        let (rows, columns) = match self.decode {
            true => ((a.heads_per_task + 2) * a.head_dim, 1),
            false => (a.width(), self.step.columns),
        };
        columns * rows.div_ceil(VALUES_PER_WORD)
    }

    /// Bytes of keys and values that a group reads. Prefill columns are positions of one sequence.
    fn kv_bytes(&self, a: &Attention) -> usize {
        let sequences = if self.decode { self.step.columns } else { 1 };
        sequences * self.depth * a.kv_heads * 2 * a.head_dim * 2
    }

    /// The head's pages at the pace of the slowest CTA, those in the ring for nothing; the candidates of all CTAs; and what
    /// follows for each column.
    fn head(&mut self) -> f64 {
        let (program, machine) = (self.program, self.machine);
        let (columns, head, ring) = (self.step.columns, &program.head, &program.ring);
        let ctas = program.mesh.ctas;
        let pages: Vec<usize> = pages_of(head).collect();
        let rest: usize = pages.iter().skip(ring.pages).sum();
        let page = pages.first().copied().unwrap_or(0);
        let rate = machine.ring_rate(page, ring.head_in_flight, 1.0) / ctas as f64;
        let tiles = pages.iter().sum::<usize>() / TILE_BYTES;
        let work = machine.pages(pages.len(), tiles, columns);
        let streamed = work.max(machine.stream.slowest * rest as f64 / rate);
        let candidates = columns.max(CONSUMER_WARPS) * ctas;
        let fan = Fan {
            producers: ctas,
            ctas,
        };
        let choice = machine.exchange.idle(candidates, fan) + machine.column * columns as f64;
        streamed + choice
    }
}

/// Bytes of a linear's pages of one CTA.
fn pages_of(linear: &Linear) -> impl Iterator<Item = usize> {
    let t = linear.tiling;
    (0..t.passes).flat_map(move |pass| {
        let rows = t.pass_tiles.min(t.rows.saturating_sub(pass * t.pass_tiles));
        let columns = (0..t.k).step_by(t.page_k);
        columns.map(move |k| rows * t.page_k.min(t.k - k) * TILE_BYTES)
    })
}

/// How many coordinates of the mesh a reader takes in this way.
fn along(exchange: &Exchange, mesh: &Mesh, which: Along) -> usize {
    let size = |a: Along, size: usize| if a == which { size } else { 1 };
    size(exchange.groups, mesh.groups) * size(exchange.members, mesh.members)
}
