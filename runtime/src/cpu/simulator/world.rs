//! The memory that the simulated CTAs share. A write waits in its CTA's buffer until the scheduler delivers it: late, and in
//! any order among those between two fences. Some of plain memory are held back until nothing else can happen. Once
//! delivered, all see it. A reader waits for the epoch it needs; a word that has gone past it, and one that an older
//! write falls on, is a fault.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use mirage_compiler::program::Program;

use super::rows;
use super::schedule::Random;
use crate::cpu::area::PhaseFault;
use crate::cpu::cta::Append;
use crate::cpu::kv_cache::KvCache;
use crate::cpu::memory::Memory;

/// How long a CTA runs: it stops once in so many reads, to go on later.
const READS_OF_A_TURN: usize = 256;
/// One write of plain memory in so many is held back. Words never are: everybody would wait for each, and nobody run ahead.
const HELD_BACK: usize = 2;

#[derive(Clone, Copy, Default)]
struct Word {
    payload: [u32; 3],
    epoch: u32,
}

/// Logits of a CTA, `[columns, rows]`, in plain memory.
#[derive(Clone, Default)]
struct Logits {
    values: Vec<f32>,
    epoch: u32,
}

enum Write {
    Word { at: usize, word: Word },
    Row(Append),
    Logits(Logits),
}

/// What a CTA waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) word: usize,
    pub(super) epoch: u32,
}

/// Writes between two fences: they come in any order.
#[derive(Default)]
struct Set {
    /// Those that may come at any time.
    ready: Vec<Write>,
    /// Those that come when nothing else is left that could.
    held: Vec<Write>,
}

impl Set {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.held.is_empty()
    }
}

struct Buffer {
    /// Writes not yet delivered; all of a set come before the next one's.
    sets: VecDeque<Set>,
    wait: Option<Wait>,
}

struct State {
    /// Those of the exchange area, then flags.
    words: Vec<Word>,
    /// Words of the exchange area.
    area: usize,
    cache: KvCache,
    /// Whether a row of the cache has been written, by `at / head_dim`.
    written: Vec<bool>,
    head_dim: usize,
    logits: Vec<Logits>,
    of_ctas: Vec<Buffer>,
    random: Random,
    delivered: u64,
}

/// The memory, with the source of everything that is random.
pub(super) struct World {
    state: Mutex<State>,
}

impl World {
    /// Memory in which nothing was ever written.
    pub(super) fn new(program: &Program, random: Random) -> World {
        let head_dim = program.attention.head_dim;
        let buffer = || Buffer {
            sets: VecDeque::new(),
            wait: None,
        };
        World {
            state: Mutex::new(State {
                words: vec![Word::default(); program.exchange.words + rows::flags(program)],
                area: program.exchange.words,
                cache: KvCache::new(program),
                written: vec![false; program.cache_elements() / head_dim],
                head_dim,
                logits: vec![Logits::default(); program.mesh.ctas],
                of_ctas: (0..program.mesh.ctas).map(|_| buffer()).collect(),
                random,
                delivered: 0,
            }),
        }
    }

    /// One thread runs all CTAs, so nobody ever waits for the lock or leaves it poisoned.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory as a CTA sees it.
    pub(super) fn of(&self, cta: usize) -> View<'_> {
        View {
            world: self,
            cta,
            plain: false,
        }
    }

    /// Runs something with the random numbers.
    pub(super) fn random<T>(&self, f: impl FnOnce(&mut Random) -> T) -> T {
        f(&mut self.state().random)
    }

    /// What a CTA waits for.
    pub(super) fn wait_of(&self, cta: usize) -> Option<Wait> {
        self.state().of_ctas[cta].wait
    }

    /// The epoch that a word carries.
    pub(super) fn epoch_of(&self, word: usize) -> u32 {
        self.state().words.get(word).map_or(0, |word| word.epoch)
    }

    /// CTAs of which a write could be delivered, one that is held back or one that is not.
    pub(super) fn writers(&self, held: bool) -> Vec<usize> {
        let state = self.state();
        let buffers = state.of_ctas.iter().enumerate();
        let some = buffers.filter(|(_, buffer)| {
            let front = buffer.sets.front();
            front.is_some_and(|set| !if held { &set.held } else { &set.ready }.is_empty())
        });
        some.map(|(cta, _)| cta).collect()
    }

    /// Writes delivered so far.
    pub(super) fn delivered(&self) -> u64 {
        self.state().delivered
    }

    /// Delivers up to `most` writes of a CTA, those held back or the others, and tells whom that lets go on.
    pub(super) fn deliver(
        &self,
        cta: usize,
        held: bool,
        most: usize,
        woken: &mut Vec<usize>,
    ) -> Result<(), PhaseFault> {
        let state = &mut *self.state();
        for _ in 0..most {
            let sets = &mut state.of_ctas[cta].sets;
            let Some(set) = sets.front_mut() else { break };
            let writes = if held { &mut set.held } else { &mut set.ready };
            if writes.is_empty() {
                break;
            }
            let write = writes.swap_remove(state.random.below(writes.len()));
            if set.is_empty() {
                sets.pop_front();
            }
            state.delivered += 1;
            match write {
                Write::Row(row) => {
                    state.written[row.at / state.head_dim] = true;
                    state.cache.append([row].into_iter());
                }
                Write::Logits(logits) => state.logits[cta] = logits,
                Write::Word { at, word } => {
                    let found = state.words[at].epoch;
                    if found == word.epoch {
                        return Err(PhaseFault::Twice {
                            word: at,
                            epoch: found,
                        });
                    }
                    if found > word.epoch {
                        return Err(PhaseFault::Backwards {
                            word: at,
                            found,
                            epoch: word.epoch,
                        });
                    }
                    state.words[at] = word;
                    for (cta, buffer) in state.of_ctas.iter_mut().enumerate() {
                        let here = |wait: Wait| wait.word == at && wait.epoch <= word.epoch;
                        if buffer.wait.is_some_and(here) {
                            buffer.wait = None;
                            woken.push(cta);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The memory as one CTA sees it.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    world: &'a World,
    cta: usize,
    /// Whether words are plain memory, which is not waited for.
    plain: bool,
}

impl<'a> View<'a> {
    /// The memory of a step that exchanges rows.
    pub(super) fn of_rows(self) -> View<'a> {
        View {
            plain: true,
            ..self
        }
    }

    fn push(&self, write: Write) {
        let state = &mut *self.world.state();
        let held = match write {
            Write::Word { .. } => false,
            Write::Row(_) | Write::Logits(_) => state.random.once_in(HELD_BACK),
        };
        let sets = &mut state.of_ctas[self.cta].sets;
        if sets.is_empty() {
            sets.push_back(Set::default());
        }
        if let Some(set) = sets.back_mut() {
            if held { &mut set.held } else { &mut set.ready }.push(write);
        }
    }

    /// All writes before it are delivered before any after it.
    pub(super) fn fence(&self) {
        let sets = &mut self.world.state().of_ctas[self.cta].sets;
        if sets.back().is_some_and(|set| !set.is_empty()) {
            sets.push_back(Set::default());
        }
    }

    /// Publishes a word or a flag.
    pub(super) fn publish(&self, at: usize, payload: [u32; 3], epoch: u32) {
        let word = Word { payload, epoch };
        self.push(Write::Word { at, word });
    }

    /// Waits for a word or a flag of this epoch.
    pub(super) async fn take(&self, word: usize, epoch: u32) -> Result<[u32; 3], PhaseFault> {
        std::future::poll_fn(|_| self.look(word, epoch, false)).await
    }

    /// The payload of a word in this epoch. Of plain memory it must be there; for any other the CTA waits.
    fn look(&self, at: usize, epoch: u32, plain: bool) -> Poll<Result<[u32; 3], PhaseFault>> {
        let state = &mut *self.world.state();
        let words = state.words.len();
        let Some(word) = state.words.get(at) else {
            return Poll::Ready(Err(PhaseFault::Outside { word: at, words }));
        };
        let (found, expected) = (word.epoch, epoch);
        if found > epoch {
            return Poll::Ready(Err(PhaseFault::Overwritten {
                word: at,
                found,
                expected,
            }));
        }
        if found < epoch && plain {
            return Poll::Ready(Err(PhaseFault::Stale {
                word: at,
                found,
                expected,
            }));
        }
        if found < epoch {
            state.of_ctas[self.cta].wait = Some(Wait { word: at, epoch });
            return Poll::Pending;
        }
        if state.random.once_in(READS_OF_A_TURN) {
            return Poll::Pending;
        }
        Poll::Ready(Ok(word.payload))
    }

    /// A phase reads and writes the exchange area alone.
    fn check(&self, word: usize) -> Result<(), PhaseFault> {
        let words = self.world.state().area;
        if word < words {
            Ok(())
        } else {
            Err(PhaseFault::Outside { word, words })
        }
    }

    /// Writes a row of the KV cache.
    pub(super) fn append(&self, row: Append) {
        self.push(Write::Row(row));
    }

    /// Writes logits, plain memory that is overwritten in every step.
    pub(super) fn write_logits(&self, values: Vec<f32>, epoch: u32) {
        self.push(Write::Logits(Logits { values, epoch }));
    }

    /// The logits of a CTA in this epoch, which must have been delivered.
    pub(super) fn logits(&self, cta: usize, epoch: u32) -> Result<Vec<f32>, PhaseFault> {
        let logits = &self.world.state().logits[cta];
        if logits.epoch == epoch {
            return Ok(logits.values.clone());
        }
        Err(PhaseFault::Logits {
            cta,
            found: logits.epoch,
            expected: epoch,
        })
    }

    /// Waits until a word carries this epoch or a later one.
    pub(super) async fn arrived(&self, word: usize, epoch: u32) {
        std::future::poll_fn(|_| {
            let state = &mut *self.world.state();
            if state
                .words
                .get(word)
                .is_some_and(|word| word.epoch >= epoch)
            {
                return Poll::Ready(());
            }
            state.of_ctas[self.cta].wait = Some(Wait { word, epoch });
            Poll::Pending
        })
        .await;
    }
}

impl Memory for View<'_> {
    fn read(&self, word: usize, epoch: u32) -> Poll<Result<[u32; 3], PhaseFault>> {
        match self.check(word) {
            Ok(()) => self.look(word, epoch, self.plain),
            Err(fault) => Poll::Ready(Err(fault)),
        }
    }

    fn write(&self, word: usize, payload: [u32; 3], epoch: u32) -> Result<(), PhaseFault> {
        self.check(word)?;
        self.publish(word, payload, epoch);
        Ok(())
    }

    fn cached(&self, at: usize, width: usize, to: &mut Vec<f32>) -> Result<(), PhaseFault> {
        let state = self.world.state();
        if !state.written[at / state.head_dim] {
            return Err(PhaseFault::Row { at });
        }
        state.cache.read(at, width, to);
        Ok(())
    }

    fn shuffle(&self, items: &mut [usize]) {
        self.world.state().random.shuffle(items);
    }
}
