//! Benchmark of mirage's megakernel against an unfused per-op baseline.
fn main() {}
