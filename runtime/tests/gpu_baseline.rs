//! The per-op baseline on a GPU, against the plain reference on the CPU, with small random models.
//!
//! The reference calculates in f32, the baseline rounds every value to bf16. So logits are compared within bf16's noise,
//! and a greedy token is right if the reference's logit of it is within that noise of the best.

use mirage_compiler::reference::Reference;
use mirage_compiler::typed::TypedGraph;
use mirage_runtime::baseline::{Baseline, GenerateRequest, LaunchMode, Prompt};
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::gpu::Gpu;
use mirage_runtime::sampler::SamplingParams;
use mirage_testing::{LLAMA3, QWEN3, Random};

const QWEN3_CONFIG: &str = r#"{"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 520, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "tie_word_embeddings": true}"#;

/// Groups of one head, no tiles of several groups, scaled RoPE, untied.
const LLAMA3_CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 264, "rms_norm_eps": 1e-5,
    "rope_theta": 500000, "tie_word_embeddings": false, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#;

/// Part of the largest logit that bf16 may be off by, after these few layers.
const NOISE: f32 = 0.04;

struct Model {
    graph: TypedGraph,
    checkpoint: Checkpoint,
    baseline: Baseline,
}

/// A graph with random weights, both on the GPU and for the reference.
fn model(graph: &'static str, config: &str, max_batch: usize, max_seq: usize) -> Model {
    let gpu = Gpu::open(0).expect("these tests need a GPU");
    let model = mirage_testing::Model::random(graph, config);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let graph = model.typed.clone();
    // The files stay open when their names are gone.
    Model {
        baseline: Baseline::new(&gpu, &graph, &checkpoint, max_batch, max_seq).unwrap(),
        graph,
        checkpoint,
    }
}

fn largest(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |max, x| x.abs().max(max))
}

/// Teacher-forced logits of every position.
fn check_logits(model: &mut Model, tokens: &[u32]) {
    let reference = Reference::new(&model.graph, &model.checkpoint).unwrap();
    let expect = reference.logits(tokens).unwrap();
    let got = model.baseline.logits(tokens, 0..tokens.len()).unwrap();
    let vocab = expect[0].len();
    assert_eq!(got.len(), tokens.len() * vocab);
    for (position, (got, expect)) in got.chunks_exact(vocab).zip(&expect).enumerate() {
        let noise = NOISE * largest(expect);
        for (token, (got, expect)) in got.iter().zip(expect).enumerate() {
            assert!(
                (got - expect).abs() <= noise,
                "position {position}, token {token}: {got}, not {expect} ± {noise}"
            );
        }
    }
}

/// That each of `tokens` was a best next token, within the noise.
fn check_greedy(model: &Model, prompt: &[u32], tokens: &[u32]) {
    let reference = Reference::new(&model.graph, &model.checkpoint).unwrap();
    let all = [prompt, tokens].concat();
    let logits = reference.logits(&all).unwrap();
    for (index, token) in tokens.iter().enumerate() {
        let row = &logits[prompt.len() + index - 1];
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (chosen, noise) = (row[*token as usize], 2.0 * NOISE * largest(row));
        assert!(
            chosen >= best - noise,
            "token {index} of {tokens:?}: its logit is {chosen}, the best {best}"
        );
    }
}

fn greedy(prompts: &[Vec<u32>], max_new_tokens: usize) -> GenerateRequest {
    let prompt = |(sequence, tokens): (u32, &Vec<u32>)| Prompt {
        tokens: tokens.clone(),
        sampling: SamplingParams::default(),
        sequence,
    };
    GenerateRequest {
        prompts: (0..).zip(prompts).map(prompt).collect(),
        max_new_tokens,
        stop_tokens: Vec::new(),
        mode: LaunchMode::Eager,
    }
}

#[test]
fn logits_are_the_references() {
    let tokens = Random::new(1).tokens(70, 500);
    check_logits(&mut model(QWEN3, QWEN3_CONFIG, 2, 128), &tokens);
    let tokens = Random::new(2).tokens(70, 260);
    check_logits(&mut model(LLAMA3, LLAMA3_CONFIG, 2, 128), &tokens);
}

/// Longer than a chunk, so that attention reaches back into an earlier pass.
#[test]
fn long_prompts_go_through_in_chunks() {
    let tokens = Random::new(3).tokens(600, 500);
    check_logits(&mut model(QWEN3, QWEN3_CONFIG, 3, 640), &tokens);
}

#[test]
fn greedy_tokens_are_the_references_for_prompts_of_any_length_together() {
    let mut model = model(QWEN3, QWEN3_CONFIG, 4, 320);
    let mut random = Random::new(4);
    let prompts: Vec<_> = [1, 5, 37, 200]
        .map(|length| random.tokens(length, 500))
        .into();
    let output = model.baseline.generate(&greedy(&prompts, 90)).unwrap();
    for (prompt, tokens) in prompts.iter().zip(&output.tokens) {
        assert_eq!(tokens.len(), 90);
        check_greedy(&model, prompt, tokens);
    }
    assert_eq!(output.timings.decode_steps, 89);
    assert!(output.timings.prefill > 0.0 && output.timings.decode > 0.0);
    assert!(output.timings.total >= output.timings.time_to_first_token);
}

#[test]
fn a_recorded_step_gives_the_tokens_of_one_launch_after_the_other() {
    let mut model = model(LLAMA3, LLAMA3_CONFIG, 2, 256);
    let prompts = [
        Random::new(5).tokens(3, 260),
        Random::new(6).tokens(40, 260),
    ];
    // Short enough for attention not to be split differently.
    let mut request = greedy(&prompts, 20);
    let eager = model.baseline.generate(&request).unwrap();
    request.mode = LaunchMode::Graph;
    let graph = model.baseline.generate(&request).unwrap();
    assert_eq!(eager.tokens, graph.tokens);
    request.max_new_tokens = 200;
    let long = model.baseline.generate(&request).unwrap();
    for (prompt, tokens) in prompts.iter().zip(&long.tokens) {
        check_greedy(&model, prompt, tokens);
    }
}

#[test]
fn a_sequence_ends_with_its_stop_token() {
    let mut model = model(QWEN3, QWEN3_CONFIG, 2, 128);
    let prompts = [Random::new(7).tokens(6, 500), Random::new(8).tokens(9, 500)];
    let mut request = greedy(&prompts, 30);
    let free = model.baseline.generate(&request).unwrap().tokens;
    for mode in [LaunchMode::Eager, LaunchMode::Graph] {
        request.mode = mode;
        request.stop_tokens = vec![free[0][4], free[1][11]];
        let output = model.baseline.generate(&request).unwrap();
        for (tokens, free) in output.tokens.iter().zip(&free) {
            let end = free
                .iter()
                .position(|token| request.stop_tokens.contains(token))
                .unwrap();
            assert_eq!(tokens, &free[..=end]);
        }
        assert!(output.timings.decode_steps < 16, "{:?}", output.timings);
    }
}

/// The token of a prompt's end, sampled on the GPU, is the one that the CPU's sampler picks from the same logits.
#[test]
fn sampling_is_the_cpus() {
    let mut model = model(QWEN3, QWEN3_CONFIG, 1, 64);
    let tokens = Random::new(9).tokens(12, 500);
    let logits = model.baseline.logits(&tokens, 11..12).unwrap();
    for seed in 0..20 {
        for (top_k, top_p) in [(0, 1.0), (7, 1.0), (0, 0.6), (20, 0.8), (10_000, 0.95)] {
            let sampling = SamplingParams {
                temperature: 0.8,
                top_k,
                top_p,
                seed,
            };
            let mut request = greedy(std::slice::from_ref(&tokens), 1);
            request.prompts[0] = Prompt {
                tokens: tokens.clone(),
                sampling,
                sequence: 3,
            };
            let expect = sampling.sampler().unwrap().sample(&logits, 3, 12);
            let got = model.baseline.generate(&request).unwrap().tokens;
            assert_eq!(got, [[expect]], "{sampling:?}");
        }
    }
}

#[test]
fn what_the_benchmark_asks_for_is_measured() {
    let mut model = model(QWEN3, QWEN3_CONFIG, 4, 128);
    assert_eq!(model.baseline.launches_per_step(), 1 + 3 * 19 + 3);
    for mode in [LaunchMode::Eager, LaunchMode::Graph] {
        let times = model.baseline.decode_steps_timed(4, 64, 10, mode).unwrap();
        assert_eq!(times.steps.len(), 10);
        assert!(times.steps.iter().all(|step| *step > 0.0) && times.wall > 0.0);
    }
    let linears = model.baseline.linears(4).unwrap();
    let launches: usize = linears.iter().map(|linear| linear.launches).sum();
    assert_eq!(launches, 3 * 7 + 1);
    let bytes: usize = linears
        .iter()
        .map(|linear| linear.launches * linear.bytes)
        .sum();
    assert_eq!(
        bytes,
        2 * (3 * 128 * (128 + 64 + 64 + 128 + 3 * 192) + 128 * 520)
    );
    for linear in linears {
        assert!(
            linear.gigabytes_per_second() > 0.0 && !linear.values.is_empty(),
            "{linear:?}"
        );
    }
}
