//! Global memory as the phases of a CTA see it: the exchange area and the KV cache. What a phase does is written once, over
//! this interface; whose memory it is decides how CTAs run beside each other.
//!
//! The CPU executor's ([`Lockstep`]) belongs to one phase that all CTAs do at once: what is read was written in an earlier
//! one, so nobody waits. The simulator's writes arrive late and in any order, and its readers wait.

use std::task::Poll;

use super::area::{ExchangeArea, PhaseFault, Values, pack, unpack};
use super::cta::Now;
use super::kv_cache::KvCache;

pub(super) trait Memory: Sync {
    /// The payload of a word in this epoch; pending as long as it has an older one.
    fn read(&self, word: usize, epoch: u32) -> Poll<Result<[u32; 3], PhaseFault>>;

    /// Publishes a word.
    fn write(&self, word: usize, payload: [u32; 3], epoch: u32) -> Result<(), PhaseFault>;

    /// Appends a key and a value of `width` elements, in f32, that an earlier step left at `at` in the cache.
    fn cached(&self, at: usize, width: usize, to: &mut Vec<f32>) -> Result<(), PhaseFault>;

    /// Puts things that the device's warps do side by side, each publishing when it is done, into the order in which they
    /// come to it.
    fn shuffle(&self, _items: &mut [usize]) {}
}

/// The memory of one phase of the CPU executor.
pub(super) struct Lockstep<'a> {
    pub(super) area: &'a ExchangeArea,
    pub(super) cache: &'a KvCache,
}

impl Memory for Lockstep<'_> {
    fn read(&self, word: usize, epoch: u32) -> Poll<Result<[u32; 3], PhaseFault>> {
        Poll::Ready(self.area.take(word, epoch))
    }

    fn write(&self, word: usize, payload: [u32; 3], epoch: u32) -> Result<(), PhaseFault> {
        self.area.publish(word, payload, epoch)
    }

    fn cached(&self, at: usize, width: usize, to: &mut Vec<f32>) -> Result<(), PhaseFault> {
        self.cache.read(at, width, to);
        Ok(())
    }
}

impl Now<'_> {
    /// Waits for a word of this epoch.
    pub(super) async fn take(&self, word: usize) -> Result<[u32; 3], PhaseFault> {
        std::future::poll_fn(|_| self.memory.read(word, self.epoch)).await
    }

    /// Waits for a word of six values.
    pub(super) async fn take_values(&self, word: usize) -> Result<Values, PhaseFault> {
        Ok(unpack(self.take(word).await?))
    }

    pub(super) fn publish(&self, word: usize, payload: [u32; 3]) -> Result<(), PhaseFault> {
        self.memory.write(word, payload, self.epoch)
    }

    /// Publishes six values, rounded to bf16.
    pub(super) fn publish_values(&self, word: usize, values: &Values) -> Result<(), PhaseFault> {
        self.publish(word, pack(values))
    }
}
