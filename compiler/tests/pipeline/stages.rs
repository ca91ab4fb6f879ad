//! Snapshots of plan, program and CUDA source.

use mirage_compiler::arch::Arch;
use mirage_compiler::emit::{cuda_source, phased_source};

use crate::models::compile;

/// Compares with `snapshots/<stage>/<name>.snap` at the top of the repository.
fn snapshot(stage: &str, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(format!("../../../snapshots/{stage}"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// The generated text is for people to read.
const MOST_LINES: usize = 600;

#[track_caller]
fn check(model: &str, arch: Arch, batch: usize, name: &str) {
    let (plan, program) = compile(model, arch, batch);
    let source = cuda_source(&program, arch);
    assert_eq!(
        compile(model, arch, batch).1,
        program,
        "the program differs from run to run"
    );
    assert_eq!(
        cuda_source(&program, arch),
        source,
        "the source differs from run to run"
    );
    let lines = source.text.lines().count();
    assert!(lines <= MOST_LINES, "{lines} lines");
    snapshot("plan", name, &plan.to_string());
    snapshot("program", name, &program.to_string());
    snapshot("cuda", name, &source.text);
}

#[test]
fn qwen3_0_6b_on_h100() {
    check("0.6B", Arch::Sm90a, 1, "qwen3_0_6b_h100_b1");
    check("0.6B", Arch::Sm90a, 8, "qwen3_0_6b_h100_b8");
}

/// The chain of kernels that the benchmark compares with: the residual stream replicated, and scattered.
#[test]
fn qwen3_0_6b_phased() {
    for (batch, name) in [(1, "qwen3_0_6b_h100_b1"), (8, "qwen3_0_6b_h100_b8")] {
        let (_, program) = compile("0.6B", Arch::Sm90a, batch);
        let phased = phased_source(&program, Arch::Sm90a);
        let text = phased.source.text;
        let model = text.find("struct Model").expect("the model");
        snapshot("phased", name, &text[model..]);
    }
}

#[test]
fn qwen3_0_6b_on_other_gpus() {
    check("0.6B", Arch::Sm80, 1, "qwen3_0_6b_a100_b1");
    check("0.6B", Arch::Sm120a, 1, "qwen3_0_6b_rtx5090_b1");
}

#[test]
fn qwen3_8b_on_h100() {
    check("8B", Arch::Sm90a, 1, "qwen3_8b_h100_b1");
}

#[test]
fn llama3_on_h100() {
    check("llama3", Arch::Sm90a, 1, "llama3_2_1b_h100_b1");
}

#[test]
fn tiny_on_h100() {
    check("tiny", Arch::Sm90a, 1, "tiny_h100_b1");
}
