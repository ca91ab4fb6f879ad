//! The KV cache: rows of bf16, written by one CTA each and read in later steps.

use mirage_compiler::program::Program;

use super::area::value;
use super::cta::Append;

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

    /// Appends the key and the value at `at` to a list, in f32.
    pub(super) fn read(&self, at: usize, width: usize, to: &mut Vec<f32>) {
        for half in [&self.keys, &self.values] {
            to.extend(half[at..][..width].iter().map(|&bits| value(bits)));
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
