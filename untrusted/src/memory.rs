//! An allocator that refuses to hold more than a limit, so that an input that asks for too much fails where it asks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most memory that a process may hold while it reads input, in bytes.
pub const LIMIT: usize = 1 << 30;

static HELD: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator up to [`LIMIT`]; beyond, every allocation fails, which ends the process.
pub struct Bounded;

// SAFETY: all memory is the system allocator's, asked for and given back with the caller's own layouts; counting beside it
// does not touch the memory.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size() > LIMIT {
            HELD.fetch_sub(layout.size(), Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `memory` came from `alloc` above with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}
