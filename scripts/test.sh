#!/usr/bin/env bash
# All checks, on any machine with Rust and Python. No GPU needed: NVRTC compiles the cubins of every architecture.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '== %s\n' "$*" >&2; }

scripts/setup.sh

step "Rust sources are formatted"
cargo fmt --all --check

step "device sources are formatted"
# The wheel's own binary: its start script needs the environment that it was installed in.
clang_format=$(find .venv -path '*/clang_format/data/bin/clang-format' -print -quit)
git ls-files -z --cached --others --exclude-standard -- '*.cu' '*.cuh' ':!snapshots' | xargs -0 --no-run-if-empty "$clang_format" --dry-run --Werror

step "clippy"
cargo clippy --workspace --all-targets --locked --quiet -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

step "tests"
# CI=1 makes insta fail on a snapshot that is new or changed instead of writing it beside.
CI=1 cargo test --workspace --locked --quiet

step "all passed"
