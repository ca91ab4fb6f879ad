//! What is wrong with a checkpoint is said when it is opened or loaded, and names the file or the tensor.

use mirage_compiler::arch::GpuModel;
use mirage_compiler::plan::Target;
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::cpu::CpuModel;
use mirage_testing::{CASES, Damage, SIZES, Sizes, damaged, planned, qwen3};

fn target() -> Target {
    Target {
        gpu: GpuModel::cpu(),
        batch: 1,
        max_seq: 16,
    }
}

#[test]
fn damaged_weights_are_refused() {
    let model = qwen3(SIZES);
    let program = planned(&model, &target());
    for (damage, expect) in CASES {
        let checkpoint = Checkpoint::open(damaged(&model, damage)).unwrap();
        let Err(error) = CpuModel::load(program.clone(), &checkpoint) else {
            panic!("{damage:?}: loaded");
        };
        assert!(error.to_string().contains(expect), "{error}");
    }
}

#[test]
fn truncated_files_are_refused() {
    let model = qwen3(SIZES);
    let file = model.as_ref().join("model.safetensors");
    let length = std::fs::metadata(file).unwrap().len() as usize;
    // Within the last tensor, within the header, and within the header's own length.
    for (left, expect) in [
        (
            length - 1,
            format!("truncated: {} bytes of {length}", length - 1),
        ),
        (100, "the first 8 bytes claim a header of".to_owned()),
        (5, "truncated: 5 bytes of 8".to_owned()),
    ] {
        let damage = Damage::Truncated(length - left);
        let opened = Checkpoint::open(damaged(&model, damage));
        let error = opened.unwrap_err().to_string();
        assert!(error.contains("model.safetensors: "), "{error}");
        assert!(error.contains(&expect), "{left} bytes left: {error}");
    }
}

/// Sizes come from config.json, so weights of another model do not fit.
#[test]
fn weights_of_another_model_are_refused() {
    let model = qwen3(SIZES);
    let other = qwen3(Sizes { ffn: 128, ..SIZES });
    let other = Checkpoint::open(other).unwrap();
    let Err(error) = CpuModel::load(planned(&model, &target()), &other) else {
        panic!("loaded");
    };
    let expect = "has shape [128, 80], but [112, 80] is expected; check that config.json belongs";
    assert!(error.to_string().contains(expect), "{error}");
}
