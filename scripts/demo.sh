#!/usr/bin/env bash
# The main job, on any machine with Rust and Python: compiles Qwen3-0.6B's graph to one CUDA kernel, then runs the
# embedded model on both sides of the benchmark. Without a GPU the compiled program runs on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
cargo build --release --locked --quiet --workspace --bins
target="${CARGO_TARGET_DIR:-target}/release"

echo "== mirage-compile graphs/qwen3.ron"
"$target/mirage-compile" graphs/qwen3.ron --out out/qwen3
echo
echo "== mirage-bench --model models/tiny"
# Few iterations, for a first look. `mirage-bench` alone has the defaults that numbers should be taken with.
"$target/mirage-bench" --model models/tiny --num-warmup 1 --num-iterations 3 --batch-sizes 1 4 --max-tokens 32 \
  --output-report out/benchmark_report.txt --output-json out/benchmark_results.json --output-html out/benchmark_report.html
