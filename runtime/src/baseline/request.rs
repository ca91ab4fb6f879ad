//! What can be asked of the baseline, what it answers, and the rules a request must keep to.
//!
//! Owns requests, their limits and the rule by which a sequence ends. It must not touch a GPU.

use super::BaselineError;
use super::forward::Cutoffs;
use super::kernels::Sampling;
use crate::sampler::SamplingParams;

/// How a decode step is put on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaunchMode {
    /// One launch after the other, by the host.
    #[default]
    Eager,
    /// All launches of a step at once, as a CUDA graph recorded before.
    Graph,
}

/// A prompt and how its answer is sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Greedy, temperature, top-k, top-p, seed.
    pub sampling: SamplingParams,
    /// Tells prompts of the same seed apart.
    pub sequence: u32,
}

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// One for each sequence, up to `max_batch`.
    pub prompts: Vec<Prompt>,
    /// Tokens for each, at least one.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence; with none, each gets `max_new_tokens`.
    pub stop_tokens: Vec<u32>,
    /// How decode steps are launched.
    pub mode: LaunchMode,
}

/// What was generated, and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOutput {
    /// The new tokens of each sequence, with the stop token that ended it, if one did.
    pub tokens: Vec<Vec<u32>>,
    /// Times of the whole request.
    pub timings: Timings,
}

/// Times in milliseconds. Copying the prompts to the GPU, choosing algorithms and recording graphs are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Host time until the first token of every sequence was there.
    pub time_to_first_token: f64,
    /// Host time until the last token was there.
    pub total: f64,
    /// GPU time of the prefill, to its sampled tokens.
    pub prefill: f64,
    /// GPU time of the decode steps, gaps between launches included.
    pub decode: f64,
    /// Decode steps, each of one token for every sequence.
    pub decode_steps: usize,
}

/// What a baseline was made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Sequences at once.
    pub(super) batch: usize,
    /// Tokens of a sequence, prompt and answer together.
    pub(super) seq: usize,
    /// Tokens there are.
    pub(super) vocab: usize,
}

impl Limits {
    /// What the sampler is told, if the request can be served.
    pub(super) fn check(
        self,
        request: &GenerateRequest,
    ) -> Result<(Vec<Sampling>, Cutoffs), BaselineError> {
        let refuse = |text: String| Err(BaselineError::Request(text));
        let (batch, new) = (request.prompts.len(), request.max_new_tokens);
        if batch == 0 || batch > self.batch {
            return refuse(format!(
                "{batch} prompts, but the baseline was made for 1 to {}",
                self.batch
            ));
        }
        if new == 0 {
            return refuse("max_new_tokens is 0; ask for at least one token".to_owned());
        }
        let mut cutoffs = Cutoffs::default();
        let mut sampling = Vec::new();
        for (index, prompt) in request.prompts.iter().enumerate() {
            let length = prompt.tokens.len();
            if length == 0 {
                return refuse(format!(
                    "prompt {index} is empty; give it at least one token"
                ));
            }
            if length.saturating_add(new) > self.seq {
                return refuse(format!(
                    "prompt {index} has {length} tokens, and with {new} new ones it passes the context of {}; \
                     shorten it, ask for fewer tokens or raise the context",
                    self.seq
                ));
            }
            if let Some(token) = prompt
                .tokens
                .iter()
                .find(|token| **token as usize >= self.vocab)
            {
                let vocab = self.vocab;
                return refuse(format!(
                    "prompt {index} holds token {token}, but there are {vocab}; use the model's tokenizer"
                ));
            }
            let params = prompt.sampling;
            let sampler = params.sampler().map_err(|error| BaselineError::Sampling {
                prompt: index,
                error,
            })?;
            cutoffs.top_k |= !params.is_greedy() && params.top_k > 0;
            cutoffs.top_p |= !params.is_greedy() && params.top_p < 1.0;
            sampling.push(Sampling {
                seed: params.seed,
                inverse_temperature: sampler.inverse_temperature(),
                top_p: params.top_p,
                top_k: params.top_k,
                sequence: prompt.sequence,
            });
        }
        Ok((sampling, cutoffs))
    }
}

/// Which sequences have met a stop token.
pub(super) struct Stops<'a> {
    tokens: &'a [u32],
    stopped: Vec<bool>,
    seen: usize,
}

impl<'a> Stops<'a> {
    pub(super) fn new(tokens: &'a [u32], batch: usize) -> Self {
        Self {
            tokens,
            stopped: vec![false; batch],
            seen: 0,
        }
    }

    /// Looks at the tokens up to number `made`, read by `token(slot, index)`; whether all sequences have stopped.
    pub(super) fn look(&mut self, made: usize, token: impl Fn(usize, usize) -> u32) -> bool {
        if self.tokens.is_empty() {
            return false;
        }
        for index in self.seen..made {
            for (slot, stopped) in self.stopped.iter_mut().enumerate() {
                *stopped |= self.tokens.contains(&token(slot, index));
            }
        }
        self.seen = self.seen.max(made);
        self.stopped.iter().all(|stopped| *stopped)
    }

    /// Tokens up to the first stop token, that one included.
    pub(super) fn cut(&self, tokens: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut kept = Vec::new();
        for token in tokens {
            kept.push(token);
            if self.tokens.contains(&token) {
                break;
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompts: &[&[u32]], max_new_tokens: usize) -> GenerateRequest {
        let prompt = |tokens: &&[u32]| Prompt {
            tokens: tokens.to_vec(),
            sampling: SamplingParams::default(),
            sequence: 0,
        };
        GenerateRequest {
            prompts: prompts.iter().map(prompt).collect(),
            max_new_tokens,
            stop_tokens: Vec::new(),
            mode: LaunchMode::Eager,
        }
    }

    const LIMITS: Limits = Limits {
        batch: 2,
        seq: 64,
        vocab: 520,
    };

    #[test]
    fn requests_beyond_the_limits_are_refused() {
        let check = |prompts: &[&[u32]], new: usize, part: &str| match LIMITS
            .check(&request(prompts, new))
        {
            Err(BaselineError::Request(text)) => {
                assert!(text.contains(part), "{text:?} lacks {part:?}")
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{prompts:?} and {new} new tokens were taken"),
        };
        check(&[], 1, "0 prompts");
        check(&[&[1], &[1], &[1]], 1, "3 prompts");
        check(&[&[1], &[]], 1, "prompt 1 is empty");
        check(&[&[1]], 0, "at least one token");
        check(&[&[1; 60]], 5, "passes the context of 64");
        check(&[&[1]], usize::MAX, "passes the context of 64");
        check(&[&[520]], 1, "token 520");
        assert!(LIMITS.check(&request(&[&[519; 60], &[0]], 4)).is_ok());
    }

    #[test]
    fn the_sampler_does_no_more_than_is_asked() {
        let check = |sampling: SamplingParams, top_k: bool, top_p: bool| {
            let mut request = request(&[&[1]], 1);
            request.prompts[0].sampling = sampling;
            let (_, cutoffs) = LIMITS.check(&request).unwrap();
            assert_eq!(
                (cutoffs.top_k, cutoffs.top_p),
                (top_k, top_p),
                "{sampling:?}"
            );
        };
        let sampled = SamplingParams {
            temperature: 0.8,
            ..SamplingParams::default()
        };
        check(
            SamplingParams {
                top_k: 5,
                top_p: 0.5,
                ..SamplingParams::default()
            },
            false,
            false,
        );
        check(sampled, false, false);
        check(
            SamplingParams {
                top_k: 5,
                ..sampled
            },
            true,
            false,
        );
        check(
            SamplingParams {
                top_p: 0.5,
                ..sampled
            },
            false,
            true,
        );
        let mut wrong = request(&[&[1]], 1);
        wrong.prompts[0].sampling.temperature = -1.0;
        assert!(matches!(
            LIMITS.check(&wrong),
            Err(BaselineError::Sampling { prompt: 0, .. })
        ));
    }

    #[test]
    fn all_sequences_stop_before_the_batch_does() {
        let made = [[1, 9, 3, 4], [5, 6, 7, 9]];
        let token = |slot: usize, index: usize| made[slot][index];
        let mut stops = Stops::new(&[9], 2);
        assert!(!stops.look(1, token));
        assert!(!stops.look(3, token));
        assert!(stops.look(4, token));
        assert_eq!(stops.cut(made[0].into_iter()), [1, 9]);
        assert_eq!(stops.cut([1, 2].into_iter()), [1, 2]);
        assert!(
            !Stops::new(&[], 1).look(4, token),
            "without stop tokens nothing stops"
        );
    }
}
