//! The front end from text to fused graph: snapshots of its stages and of its diagnostics, and the reference executor
//! against Hugging Face transformers.

mod diagnostics;
mod reference;
mod stages;

const QWEN3: &str = include_str!("../../../graphs/qwen3.ron");
const LLAMA3: &str = include_str!("../../../graphs/llama3.ron");

/// Compares with `snapshots/<stage>/<name>.snap` at the top of the repository.
fn snapshot(stage: &str, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(format!("../../../snapshots/{stage}"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}
