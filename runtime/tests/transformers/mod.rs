//! The rule by which an executor agrees with transformers on the tiny model (`oracle/README.md`). The yardstick is
//! transformers' own bf16 noise at each position.

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::generate::{Executor, FinishReason, GenerateRequest};
use mirage_runtime::tokenizer::{Tokenizer, stop_tokens};
use mirage_testing::{Expected, tiny_dir};

/// How much worse than bf16 one position may be. Its noise there is a small sample.
const POSITION_TOLERANCE: f32 = 3.0;

/// Logits of `executor` at every position of prompt and continuation against the rule.
pub(crate) fn check_logits(executor: &mut dyn Executor, expected: &[Expected]) {
    let (mut ratios, mut decided) = (Vec::new(), 0);
    for batch in expected.chunks(executor.limits().batch) {
        let sequences: Vec<Vec<u32>> = batch.iter().map(Expected::whole).collect();
        for (prompt, logits) in batch.iter().zip(executor.score(&sequences).unwrap()) {
            let name = &prompt.name;
            assert_eq!(logits.positions(), prompt.argmax.len(), "{name}");
            for position in 0..logits.positions() {
                let row = logits.row(position);
                let (token, noise) = (prompt.argmax[position], prompt.bf16_noise[position]);
                assert!(
                    row.iter().all(|logit| logit.is_finite()),
                    "{name}, position {position}: a logit is not finite"
                );
                let ratio = (row[token as usize] - prompt.max_logit[position]).abs() / noise;
                ratios.push(ratio);
                assert!(
                    ratio < POSITION_TOLERANCE,
                    "{name}, position {position}: the best logit is off by {ratio} times bf16's noise"
                );
                if prompt.is_decided(position) {
                    decided += 1;
                    let best = argmax(row);
                    assert_eq!(
                        best, token,
                        "{name}, position {position}: the likeliest token"
                    );
                }
            }
            let last = prompt.ids.len() - 1;
            for (token, logit) in prompt.known() {
                let ratio =
                    (logits.row(last)[token as usize] - logit).abs() / prompt.bf16_noise[last];
                assert!(
                    ratio < POSITION_TOLERANCE,
                    "{name}: the logit of token {token} after the prompt is off by {ratio} times bf16's noise"
                );
            }
        }
    }
    // A single logit's error is mostly well below the largest one's over the vocabulary, which the noise is.
    let mean = ratios.iter().sum::<f32>() / ratios.len() as f32;
    assert!(
        mean < 0.5,
        "errors of {mean} times bf16's noise in the mean"
    );
    assert!(
        decided * 2 > ratios.len(),
        "{decided} of {} positions decided",
        ratios.len()
    );
}

fn argmax(logits: &[f32]) -> u32 {
    let best = |a: &(u32, &f32), b: &(u32, &f32)| a.1.total_cmp(b.1);
    (0..).zip(logits).max_by(best).map_or(0, |(token, _)| token)
}

/// Greedy continuations of `executor`, from text to text, against the rule.
pub(crate) fn check_greedy(executor: &mut dyn Executor, expected: &[Expected]) {
    let tokenizer = Tokenizer::open(tiny_dir()).unwrap();
    let checkpoint = Checkpoint::open(tiny_dir()).unwrap();
    let stop = stop_tokens(tiny_dir(), checkpoint.config()).unwrap();
    let mut whole = 0;
    for batch in expected.chunks(executor.limits().batch) {
        let requests: Vec<GenerateRequest> = batch
            .iter()
            .map(|prompt| GenerateRequest {
                stop_tokens: stop.iter().copied().collect(),
                ..GenerateRequest::greedy(tokenizer.encode(&prompt.text).unwrap(), 48)
            })
            .collect();
        for (prompt, got) in batch.iter().zip(executor.generate_all(&requests).unwrap()) {
            let name = &prompt.name;
            let parts = |(got, want): (&u32, &u32)| got != want;
            match got.tokens.iter().zip(&prompt.greedy).position(parts) {
                Some(index) => assert!(
                    !prompt.is_decided(prompt.ids.len() - 1 + index),
                    "{name}: token {index} is {}, not {}",
                    got.tokens[index],
                    prompt.greedy[index]
                ),
                None => {
                    assert_eq!(got.tokens.len(), prompt.greedy.len(), "{name}");
                    let ended = prompt.greedy.last().is_some_and(|last| stop.contains(last));
                    let reason = if ended {
                        FinishReason::Stop
                    } else {
                        FinishReason::Length
                    };
                    assert_eq!(got.reason, reason, "{name}");
                    assert_eq!(tokenizer.decode(&got.tokens).unwrap(), prompt.greedy_text);
                    whole += 1;
                }
            }
        }
    }
    assert!(whole > 0, "no continuation is the expected one to its end");
}
