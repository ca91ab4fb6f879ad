//! How sequences end, what is heard of them on the way, and that the next generation starts afresh.

use std::collections::BTreeSet;
use std::sync::mpsc;

use mirage_compiler::program::step_epochs;
use mirage_runtime::generate::{
    CancelHandle, Event, Executor, FinishReason, GenerateRequest, Generated,
};
use mirage_runtime::megakernel::Megakernel;
use mirage_testing::{Model, SIZES, prompts, qwen3};

use crate::device::{Kernel, turn};

const VOCAB: usize = SIZES.vocab;

/// All events of a generation, in order, after a check of what every generation keeps to.
fn events(
    gpu: &mut Megakernel,
    batch: &[GenerateRequest],
    cancel: &CancelHandle,
    mut hear: impl FnMut(Event),
) -> Vec<Generated> {
    let mut all: Vec<(Vec<u32>, Option<FinishReason>)> = vec![Default::default(); batch.len()];
    gpu.generate(batch, cancel, &mut |event| {
        match event {
            Event::Token {
                sequence,
                index,
                token,
            } => {
                let (tokens, reason) = &mut all[sequence];
                assert_eq!(index, tokens.len(), "tokens of {sequence} come in order");
                assert_eq!(*reason, None, "a token of {sequence} after its end");
                tokens.push(token);
            }
            Event::Finished { sequence, reason } => {
                let earlier = all[sequence].1.replace(reason);
                assert_eq!(earlier, None, "{sequence} ends twice");
            }
        }
        hear(event);
    })
    .unwrap();
    all.into_iter()
        .map(|(tokens, reason)| Generated {
            tokens,
            reason: reason.expect("every sequence ends"),
        })
        .collect()
}

#[test]
fn sequences_end_for_the_right_reason() {
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 3, 24);
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let prompt = prompts(&[7], VOCAB).remove(0);
    let all = gpu
        .generate_all(&[GenerateRequest::greedy(prompt.clone(), 100)])
        .unwrap();
    // Positions 7 to 23 hold new tokens, and the one after the last position is never put in.
    let tokens = all[0].tokens.clone();
    assert_eq!((tokens.len(), all[0].reason), (18, FinishReason::Context));
    let request = |max_new_tokens, stop: &[u32]| GenerateRequest {
        stop_tokens: stop.iter().copied().collect(),
        ..GenerateRequest::greedy(prompt.clone(), max_new_tokens)
    };
    let mut check = |max_new_tokens, stop: &[u32], count: usize, reason| {
        let want = Generated {
            tokens: tokens[..count].to_vec(),
            reason,
        };
        let got = gpu.generate_all(&[request(max_new_tokens, stop)]).unwrap();
        assert_eq!(got[0], want);
        // Beside one that goes on.
        let batch = [request(100, &[]), request(max_new_tokens, stop)];
        let got = events(&mut gpu, &batch, &CancelHandle::new(), |_| ());
        assert_eq!(got[..], [all[0].clone(), want]);
    };
    check(1, &[], 1, FinishReason::Length);
    check(4, &[], 4, FinishReason::Length);
    check(18, &[], 18, FinishReason::Length);
    check(19, &[], 18, FinishReason::Context);
    let first = |token| tokens.iter().position(|&t| t == token).unwrap() + 1;
    check(100, &[tokens[2]], first(tokens[2]), FinishReason::Stop);
    check(100, &[tokens[17]], first(tokens[17]), FinishReason::Stop);
    let (a, b) = (tokens[9], tokens[4]);
    check(100, &[a, b], first(a).min(first(b)), FinishReason::Stop);
    let every: Vec<u32> = (0..VOCAB as u32).collect();
    check(1, &every, 1, FinishReason::Stop);
    // A prompt that fills the context still has a next token.
    let full = prompts(&[24], VOCAB).remove(0);
    let ended = gpu.generate_all(&[GenerateRequest::greedy(full, 5)]);
    let ended = ended.unwrap().remove(0);
    assert_eq!(
        (ended.tokens.len(), ended.reason),
        (1, FinishReason::Context)
    );
}

/// A model with a long context, and a request that takes all of it.
fn long() -> (Model, Kernel, GenerateRequest) {
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 2, LONG);
    (model, kernel, GenerateRequest::greedy(vec![5, 6, 7], LONG))
}

/// Long enough that thousands of tokens are missing when the first is heard of.
const LONG: usize = 8192;

#[test]
fn tokens_stream_and_cancelling_ends_early() {
    let (model, kernel, request) = long();
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let short = GenerateRequest::greedy(vec![9], 20);
    let want = gpu.generate_all(std::slice::from_ref(&short)).unwrap();
    let whole = gpu.generate_all(std::slice::from_ref(&request)).unwrap();
    assert_eq!(whole[0].reason, FinishReason::Context);
    let check = |got: &Generated| {
        assert_eq!(got.reason, FinishReason::Cancelled);
        let made = got.tokens.len();
        assert!(
            0 < made && made < whole[0].tokens.len(),
            "{made} tokens of {}",
            whole[0].tokens.len()
        );
        assert_eq!(got.tokens, whole[0].tokens[..made]);
    };

    // By whoever hears of the first token: later ones were not made yet.
    let cancel = CancelHandle::new();
    let got = events(&mut gpu, std::slice::from_ref(&request), &cancel, |_| {
        cancel.cancel();
    });
    check(&got[0]);
    assert_eq!(
        gpu.generate_all(std::slice::from_ref(&short)).unwrap(),
        want
    );

    // From another thread, with a neighbour that ended in time.
    let cancel = CancelHandle::new();
    let got = std::thread::scope(|scope| {
        let (first, heard) = mpsc::channel();
        let handle = cancel.clone();
        scope.spawn(move || {
            // Where the test fails, there is nothing to hear.
            if heard.recv().is_ok() {
                handle.cancel();
            }
        });
        let batch = [request.clone(), short.clone()];
        events(&mut gpu, &batch, &cancel, |event| {
            if let Event::Finished { sequence: 1, .. } = event {
                first.send(()).unwrap();
            }
        })
    });
    check(&got[0]);
    assert_eq!(got[1], want[0]);
    assert_eq!(
        gpu.generate_all(std::slice::from_ref(&short)).unwrap(),
        want
    );

    // Before it starts: nothing, or what was made until the kernel saw it.
    let cancel = CancelHandle::new();
    cancel.cancel();
    let got = events(&mut gpu, std::slice::from_ref(&request), &cancel, |_| ());
    assert_eq!(got[0].reason, FinishReason::Cancelled);
    assert_eq!(
        gpu.generate_all(std::slice::from_ref(&short)).unwrap(),
        want
    );
}

/// Someone who panics while listening leaves a kernel that can be used again.
#[test]
fn a_listener_s_panic_ends_the_generation() {
    let (model, kernel, request) = long();
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let short = [GenerateRequest::greedy(vec![9], 20)];
    let want = gpu.generate_all(&short).unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        gpu.generate(&[request], &CancelHandle::new(), &mut |_| {
            std::panic::resume_unwind(Box::new("heard enough"));
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(gpu.generate_all(&short).unwrap(), want);
}

/// Most CTAs hold no part of so small a model: they wait for the whole of a long prefill, and hear when it is cancelled.
#[test]
fn a_long_prompt_is_taken_in_or_cancelled() {
    const CONTEXT: usize = 1 << 16;
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 1, CONTEXT);
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let prompt = prompts(&[CONTEXT - 10], VOCAB).remove(0);
    let request = [GenerateRequest::greedy(prompt, 5)];
    let whole = gpu.generate_all(&request).unwrap().remove(0);
    assert_eq!(
        (whole.tokens.len(), whole.reason),
        (5, FinishReason::Length)
    );
    let taken = gpu.kernel_ms().unwrap();
    let cancel = CancelHandle::new();
    let cancelled = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            cancel.cancel();
        });
        events(&mut gpu, &request, &cancel, |_| ()).remove(0)
    });
    assert_eq!(
        (cancelled.tokens.len(), cancelled.reason),
        (0, FinishReason::Cancelled)
    );
    let early = gpu.kernel_ms().unwrap();
    assert!(early < taken / 2.0, "{early} ms of {taken}");
    assert_eq!(gpu.generate_all(&request).unwrap(), [whole]);
}

/// Batches of all sizes one after the other, sequences of all lengths in them.
#[test]
fn generations_follow_each_other() {
    let model = qwen3(SIZES);
    let kernel = Kernel::planned(&model, 8, 64);
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let requests: Vec<_> = prompts(&[1, 17, 3, 40, 2, 33, 16, 8], VOCAB)
        .into_iter()
        .zip([30, 1, 12, 5, 60, 2, 20, 7])
        .map(|(prompt, new)| GenerateRequest::greedy(prompt, new))
        .collect();
    let want: Vec<Generated> = requests
        .iter()
        .map(|request| gpu.generate_all(std::slice::from_ref(request)).unwrap()[0].clone())
        .collect();
    for round in 0..300 {
        let (first, size) = (round % 8, 1 + round / 8 % 8);
        let of = |i: usize| (first + 3 * i) % 8;
        let batch: Vec<_> = (0..size).map(|i| requests[of(i)].clone()).collect();
        let got = gpu.generate_all(&batch).unwrap();
        for (i, got) in got.iter().enumerate() {
            assert_eq!(got, &want[of(i)], "round {round}, slot {i} of {size}");
        }
    }
}

/// A long context takes many epochs to a launch, so that they run out within a thousand launches.
#[test]
fn epochs_start_over() {
    let model = qwen3(SIZES);
    let context = 1 << 18;
    let kernel = Kernel::planned(&model, 1, context);
    let turn = turn();
    let mut gpu = kernel.load(&turn, &model);
    let request = GenerateRequest {
        stop_tokens: (0..VOCAB as u32).collect::<BTreeSet<_>>(),
        ..GenerateRequest::greedy(vec![3, 1, 4, 1, 5], context)
    };
    let request = std::slice::from_ref(&request);
    let want = gpu.generate_all(request).unwrap();
    assert_eq!(want[0].reason, FinishReason::Stop);
    let launches = i32::MAX as usize / (context * step_epochs(SIZES.layers)) + 10;
    for launch in 0..launches {
        assert_eq!(gpu.generate_all(request).unwrap(), want, "launch {launch}");
    }
    // And the kernel still does more than one step right.
    let more = GenerateRequest::greedy(vec![3, 1, 4, 1, 5], 10);
    let again = kernel
        .load(&turn, &model)
        .generate_all(std::slice::from_ref(&more));
    assert_eq!(gpu.generate_all(&[more]).unwrap(), again.unwrap());
}
