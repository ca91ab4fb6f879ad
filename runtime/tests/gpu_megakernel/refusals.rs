//! What is refused, with an error that says what to do, and that a refusal changes nothing.

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::generate::{Executor, GenerateRequest};
use mirage_runtime::gpu::GpuError;
use mirage_runtime::megakernel::{Megakernel, MegakernelError};
use mirage_runtime::sampler::SamplingParams;
use mirage_testing::{CASES, SIZES, Sizes, damaged, qwen3};

use crate::device::{Kernel, gpu_model, turn};

#[test]
fn requests_beyond_the_limits_are_refused() {
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 3, 32);
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let good = GenerateRequest::greedy(vec![1, 2, 3], 8);
    let want = gpu.generate_all(std::slice::from_ref(&good)).unwrap();
    let bad = |request| vec![good.clone(), request];
    let sampled = |temperature, top_p| GenerateRequest {
        sampling: SamplingParams {
            temperature,
            top_p,
            ..SamplingParams::default()
        },
        ..good.clone()
    };
    let prompt = |prompt: Vec<u32>| bad(GenerateRequest::greedy(prompt, 1));
    let cases = [
        (vec![], "the batch is empty"),
        (
            vec![good.clone(); 4],
            "the batch has 4 sequences, but the program was compiled for 3",
        ),
        (prompt(vec![]), "sequence 1: the prompt is empty"),
        (
            prompt(vec![1; 33]),
            "sequence 1: the prompt has 33 tokens, but the context is 32",
        ),
        (
            prompt(vec![0, 75]),
            "sequence 1: token 75 at position 1 is not in the vocabulary of 75",
        ),
        (
            bad(GenerateRequest::greedy(vec![1], 0)),
            "sequence 1: max_new_tokens is 0",
        ),
        (bad(sampled(-1.0, 1.0)), "sequence 1: temperature is -1"),
        (
            bad(sampled(f32::NAN, 1.0)),
            "sequence 1: temperature is NaN",
        ),
        (bad(sampled(1.0, 0.0)), "sequence 1: top_p is 0"),
    ];
    for (batch, expect) in cases {
        let error = gpu.generate_all(&batch).unwrap_err().to_string();
        assert!(error.starts_with(expect), "{error}");
        let after = gpu.generate_all(std::slice::from_ref(&good)).unwrap();
        assert_eq!(after, want, "after: {error}");
    }
    for (sequences, expect) in [
        (vec![], "the batch is empty"),
        (
            vec![vec![1], vec![75]],
            "sequence 1: token 75 at position 0",
        ),
    ] {
        let error = gpu.score(&sequences).unwrap_err().to_string();
        assert!(error.starts_with(expect), "{error}");
    }
}

/// A KV cache of the longest context for a model of many heads: some 275 GB for the keys alone.
#[test]
fn too_little_memory_is_an_error_with_numbers() {
    let model = qwen3(Sizes {
        layers: 16,
        hidden: 128,
        ffn: 512,
        heads: 8,
        kv_heads: 8,
        vocab: 64,
        tied: true,
    });
    let kernel = Kernel::planned(&model, 16, 1 << 20);
    let turn = turn();
    let Err(error) = kernel.try_load(&turn, &model) else {
        panic!("loaded");
    };
    let text = error.to_string();
    let MegakernelError::Gpu(GpuError::OutOfMemory {
        asked, free, total, ..
    }) = error
    else {
        panic!("{text}");
    };
    assert_eq!(asked, 2 * kernel.program.cache_elements());
    assert!(free <= total && total < asked, "{text}");
    for number in [asked, free, total] {
        assert!(text.contains(&number.to_string()), "{text}");
    }
    // What was allocated before is free again.
    let small = qwen3(SIZES);
    let mut gpu = Kernel::planned(&small, 1, 16).load(&turn, &small);
    gpu.score(&[vec![1, 2]]).unwrap();
}

#[test]
fn damaged_weights_are_refused() {
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 1, 16);
    let turn = turn();
    for (damage, expect) in CASES {
        let checkpoint = Checkpoint::open(damaged(&model, damage)).unwrap();
        let load = Megakernel::load(
            &turn.gpu,
            kernel.program.clone(),
            &kernel.cubin,
            &checkpoint,
            &mut |_, _| (),
        );
        let Err(error) = load else {
            panic!("{damage:?}: loaded");
        };
        assert!(error.to_string().contains(expect), "{error}");
    }
}

#[test]
fn kernels_for_a_larger_gpu_are_refused() {
    let model = qwen3(SIZES);
    let mut kernel = Kernel::planned(&model, 1, 16);
    let sms = gpu_model().sms as usize;
    kernel.program.mesh.ctas = sms + 1;
    let turn = turn();
    let Err(error) = kernel.try_load(&turn, &model) else {
        panic!("loaded");
    };
    let expect = format!("the kernel was compiled for {} SMs", sms + 1);
    assert!(error.to_string().starts_with(&expect), "{error}");
    kernel.program.mesh.ctas = 1;
    kernel.cubin.truncate(100);
    let Err(error) = kernel.try_load(&turn, &model) else {
        panic!("loaded");
    };
    assert!(
        matches!(error, MegakernelError::Gpu(GpuError::Image { .. })),
        "{error}"
    );
}
