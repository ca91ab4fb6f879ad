//! Which requests are refused, and how prompts are cut into prefill steps.

use super::*;
use crate::sampler::SamplingParams;

const LIMITS: Limits = Limits {
    batch: 2,
    context: 4,
    vocab: 10,
};

fn check(batch: &[GenerateRequest], expect: &str) {
    let error = LIMITS.check(batch).unwrap_err().to_string();
    assert!(error.starts_with(expect), "{error}");
}

#[test]
fn bad_requests_are_named() {
    let good = GenerateRequest::greedy(vec![1, 2, 3, 9], 1);
    assert_eq!(LIMITS.check(&[good.clone(), good.clone()]), Ok(()));
    let with = |prompt: &[u32], max_new_tokens| {
        [
            good.clone(),
            GenerateRequest::greedy(prompt.to_vec(), max_new_tokens),
        ]
    };
    check(&[], "the batch is empty");
    check(
        &[good.clone(), good.clone(), good.clone()],
        "the batch has 3 sequences, but the program was compiled for 2; split the batch or compile with --batch 3",
    );
    check(&with(&[], 1), "sequence 1: the prompt is empty");
    check(
        &with(&[1; 5], 1),
        "sequence 1: the prompt has 5 tokens, but the context is 4; shorten the prompt or compile with --max-seq 5",
    );
    check(
        &with(&[1, 10], 1),
        "sequence 1: token 10 at position 1 is not in the vocabulary of 10",
    );
    check(&with(&[1], 0), "sequence 1: max_new_tokens is 0");
    let hot = SamplingParams {
        top_p: 0.0,
        ..SamplingParams::default()
    };
    let hot = GenerateRequest {
        sampling: hot,
        ..good.clone()
    };
    check(&[hot], "sequence 0: top_p is 0");
    let scored = LIMITS.check_sequences(&[vec![1], vec![]]);
    assert_eq!(scored, Err(RequestError::EmptyPrompt { sequence: 1 }));
}

/// Steps as `slot:position@first`, idle columns as `-`.
fn steps(prompts: &[&[u32]], narrow: usize) -> Vec<String> {
    steps_of(prompts, Widths { narrow, wide: None })
}

fn steps_of(prompts: &[&[u32]], widths: Widths) -> Vec<String> {
    let column = |column: &PrefillColumn| match column.slot {
        Some(slot) => {
            let prompt = prompts[slot as usize];
            assert_eq!(column.token, prompt[column.position as usize]);
            format!("{slot}:{}@{}", column.position, column.first)
        }
        None => "-".to_owned(),
    };
    prefill_steps(prompts, widths)
        .iter()
        .map(|step| step.iter().map(column).collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn prompts_share_steps() {
    let (long, short): (&[u32], &[u32]) = (&[5, 6, 7, 8, 9, 10], &[1, 2, 3]);
    // What is left over does not fit beside the last positions, or just does.
    assert_eq!(
        steps(&[long, short], 4),
        [
            "0:0@0 0:1@0 0:2@0 0:3@0",
            "0:4@0 1:0@1 1:1@1 -",
            "0:5@0 1:2@1 - -"
        ]
    );
    assert_eq!(
        steps(&[long, short], 5),
        ["0:0@0 0:1@0 0:2@0 0:3@0 0:4@0", "0:5@0 1:0@1 1:1@1 1:2@1 -"]
    );
    assert_eq!(
        steps(&[&[1], long, short], 8),
        [
            "1:0@0 1:1@0 1:2@0 1:3@0 1:4@0 2:0@5 2:1@5 -",
            "0:0@0 1:5@1 2:2@2 - - - - -"
        ]
    );
    assert_eq!(steps(&[&[1]], 2), ["0:0@0 -"]);
    assert_eq!(steps(&[short], 1), ["0:0@0", "0:1@0", "0:2@0"]);
    assert_eq!(steps(&[], 4), Vec::<String>::new());
}

#[test]
fn what_a_narrow_step_does_not_hold_goes_through_wide_ones() {
    let (long, short): (&[u32], &[u32]) = (&[5, 6, 7, 8, 9, 10], &[1, 2, 3]);
    let check = |prompts: &[&[u32]], expect: &[&str]| {
        let widths = Widths {
            narrow: 2,
            wide: Some(4),
        };
        assert_eq!(steps_of(prompts, widths), expect);
    };
    check(&[&[1]], &["0:0@0 -"]);
    check(&[short], &["0:0@0 0:1@0 0:2@0 -"]);
    check(&[long], &["0:0@0 0:1@0 0:2@0 0:3@0", "0:4@0 0:5@0"]);
    check(&[&long[..5]], &["0:0@0 0:1@0 0:2@0 0:3@0", "0:4@0 -"]);
    check(&[short, short], &["0:0@0 0:1@0 1:0@2 1:1@2", "0:2@0 1:2@1"]);
    // Only last positions are left for the last step.
    check(&[short, &[1, 2]], &["0:0@0 0:1@0 1:0@2 -", "0:2@0 1:1@1"]);
}

#[test]
fn handles_cancel_together() {
    let cancel = CancelHandle::new();
    let other = cancel.clone();
    assert!(!cancel.is_cancelled());
    other.cancel();
    assert!(cancel.is_cancelled());
}
