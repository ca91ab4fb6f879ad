//! The tiny model end to end on the CPU: from text to text, against transformers' f32 and our own per-operator reference.

mod transformers;

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::plan::Target;
use mirage_compiler::reference::Reference;
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::cpu::CpuModel;
use mirage_runtime::generate::{Executor, GenerateRequest};
use mirage_runtime::tokenizer::{Tokenizer, stop_tokens};
use mirage_testing::{BOUND, behind, error, expected, planned, tiny, tiny_dir};
use transformers::{check_greedy, check_logits};

/// The tiny model on the CPU, planned for so many sequences on a GPU, or on the CPU's own mesh.
fn cpu(gpu: GpuModel, batch: usize) -> CpuModel {
    let (model, max_seq) = (tiny(), 512);
    let target = Target {
        gpu,
        batch,
        max_seq,
    };
    let checkpoint = Checkpoint::open(&model).unwrap();
    CpuModel::load(planned(&model, &target), &checkpoint).unwrap()
}

#[test]
fn the_tokenizer_reads_and_writes_what_transformers_does() {
    let dir = tiny_dir();
    let tokenizer = Tokenizer::open(&dir).unwrap();
    for prompt in expected() {
        assert_eq!(
            tokenizer.encode(&prompt.text).unwrap(),
            prompt.ids,
            "{}",
            prompt.name
        );
        let text = tokenizer.decode(&prompt.greedy).unwrap();
        assert_eq!(text, prompt.greedy_text, "{}", prompt.name);
        let mut stream = tokenizer.stream();
        let pieces = prompt.greedy.iter().map(|&t| stream.push(t).unwrap());
        let pieces: String = pieces.collect();
        assert_eq!(pieces + &stream.finish().unwrap(), prompt.greedy_text);
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(
        stop_tokens(&dir, checkpoint.config()).unwrap(),
        [tokenizer.token_id("<|endoftext|>").unwrap()]
    );
}

#[test]
fn logits_are_those_of_transformers() {
    check_logits(&mut cpu(GpuModel::cpu(), 8), &expected());
}

#[test]
fn greedy_texts_are_those_of_transformers() {
    check_greedy(&mut cpu(GpuModel::cpu(), 3), &expected());
}

/// The program that the GPU gets, all 132 CTAs of it.
#[test]
fn the_program_of_an_h100_computes_the_same() {
    let mut cpu = cpu(GpuModel::default_for(Arch::Sm90a), 8);
    assert!(cpu.program().mesh.ctas > 100);
    let mut prompts = expected();
    prompts.pop();
    check_greedy(&mut cpu, &prompts);
    check_logits(&mut cpu, &prompts[..4]);
}

/// The reference rounds nothing, so it is transformers' f32 but for the order of sums; the executor is near both.
#[test]
fn the_reference_agrees_with_transformers_and_the_executor() {
    let model = tiny();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let reference = Reference::new(&model.typed, &checkpoint).unwrap();
    let mut cpu = cpu(GpuModel::cpu(), 4);
    let prompts = &expected()[..4];
    let batch: Vec<_> = prompts
        .iter()
        .map(|prompt| GenerateRequest::greedy(prompt.ids.clone(), 24))
        .collect();
    let scored = cpu
        .score(&prompts.iter().map(|p| p.whole()).collect::<Vec<_>>())
        .unwrap();
    let generated = cpu.generate_all(&batch).unwrap();
    for ((prompt, scored), generated) in prompts.iter().zip(scored).zip(generated) {
        let name = &prompt.name;
        let logits = reference.logits(&prompt.whole()).unwrap();
        for (position, row) in logits.iter().enumerate() {
            let token = prompt.argmax[position];
            let off = (row[token as usize] - prompt.max_logit[position]).abs();
            assert!(off < 1e-3, "{name}, position {position}: off by {off}");
            assert!(behind(row, token) < 1e-3, "{name}, position {position}");
            let error = error(scored.row(position), row);
            assert!(error < BOUND, "{name}, position {position}: {error}");
        }
        for (token, logit) in prompt.known() {
            let off = (logits[prompt.ids.len() - 1][token as usize] - logit).abs();
            assert!(off < 1e-3, "{name}, token {token}: off by {off}");
        }
        // Token by token on the executor's own text, which may part from the reference's where two are as likely.
        let whole: Vec<u32> = prompt
            .ids
            .iter()
            .chain(&generated.tokens)
            .copied()
            .collect();
        let logits = reference.logits(&whole).unwrap();
        for (row, &token) in logits[prompt.ids.len() - 1..].iter().zip(&generated.tokens) {
            let behind = behind(row, token);
            assert!(
                behind < 2.0 * BOUND,
                "{name}: token {token} is {behind} behind"
            );
        }
    }
}
