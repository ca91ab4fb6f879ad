//! `models/tiny/expected.json`: what transformers makes of the tiny model in f32, and the rule by which an executor agrees
//! with it (`oracle/README.md`). The yardstick is transformers' own bf16 noise at each position.

use std::path::PathBuf;

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::generate::{Executor, FinishReason, GenerateRequest};
use mirage_runtime::tokenizer::{Tokenizer, stop_tokens};
use serde::Deserialize;

/// How much worse than bf16 one position may be. Its noise there is a small sample.
const POSITION_TOLERANCE: f32 = 3.0;

/// One prompt with n tokens and its continuation of g tokens.
#[derive(Deserialize)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) greedy_text: String,
    /// The likeliest token at each of the n + g positions, and so on.
    pub(crate) argmax: Vec<u32>,
    pub(crate) max_logit: Vec<f32>,
    pub(crate) margin: Vec<f32>,
    pub(crate) bf16_noise: Vec<f32>,
    /// Of the logits after the prompt: the highest, or all.
    top_ids: Vec<u32>,
    top_logits: Vec<f32>,
    #[serde(default)]
    logits: Vec<f32>,
}

impl Expected {
    /// Prompt and continuation.
    pub(crate) fn whole(&self) -> Vec<u32> {
        self.ids.iter().chain(&self.greedy).copied().collect()
    }

    /// Whether every logit within the noise leaves the same token the likeliest.
    pub(crate) fn is_decided(&self, position: usize) -> bool {
        self.margin[position] > 2.0 * self.bf16_noise[position]
    }

    /// The logits after the prompt that are known, with their tokens.
    pub(crate) fn known(&self) -> impl Iterator<Item = (u32, f32)> {
        let top = self.top_ids.iter().copied().zip(self.top_logits.clone());
        top.chain((0..).zip(self.logits.clone()))
    }
}

/// The tiny model's folder.
pub(crate) fn dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))
}

/// All prompts; the last one is long.
pub(crate) fn expected() -> Vec<Expected> {
    #[derive(Deserialize)]
    struct File {
        prompts: Vec<Expected>,
    }
    let text = std::fs::read_to_string(dir().join("expected.json")).unwrap();
    let file: File = serde_json::from_str(&text).unwrap();
    assert!(file.prompts.len() > 4);
    file.prompts
}

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
    let tokenizer = Tokenizer::open(dir()).unwrap();
    let checkpoint = Checkpoint::open(dir()).unwrap();
    let stop = stop_tokens(dir(), checkpoint.config()).unwrap();
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
