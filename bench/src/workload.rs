//! Which prompts each batch has, as token ids: the same for every side.
//!
//! Owns tokenized prompts and the walk over them. Every iteration takes the next prompts of the file in
//! [`prompts::order`], so that a run uses as much of the file as it has iterations for, and both sides get equal token ids
//! in equal iterations. It must not know a tokenizer: ids come in.

use crate::prompts::{self, Prompt};
use crate::results::Skipped;
use crate::side::{Sampling, Sequence, Work};

/// A prompt as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its id in the file.
    pub id: String,
    /// Its category.
    pub category: String,
    /// Its tokens, at least one.
    pub tokens: Vec<u32>,
}

/// The tokenized prompts that fit the model, in the order in which they are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    prompts: Vec<Encoded>,
    /// Those that do not fit, and why.
    pub skipped: Vec<Skipped>,
}

/// One batch: the work, and which prompts it is of.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch<'a> {
    /// One for each sequence.
    pub prompts: Vec<&'a Encoded>,
    /// For the sides.
    pub work: Work,
}

/// How each prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// New tokens, at most.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Tokens that end a text, unless those are ignored.
    pub stop_tokens: Vec<u32>,
}

impl Workload {
    /// Takes the prompts and the ids that `encode` makes of them. Prompts that with `max_tokens` new tokens pass
    /// `context`, and those without any token, are left out with their reason.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn new<E>(
        file: &[Prompt],
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>,
        max_tokens: usize,
        context: usize,
        seed: u64,
    ) -> Result<Workload, E> {
        let (mut fitting, mut skipped) = (Vec::new(), Vec::new());
        for prompt in file {
            let tokens = encode(&prompt.text)?;
            let length = tokens.len();
            let reason = if tokens.is_empty() {
                Some("the tokenizer makes no token of it".to_owned())
            } else if length.saturating_add(max_tokens) > context {
                Some(format!(
                    "{length} tokens and {max_tokens} new ones pass the model's context of {context}"
                ))
            } else {
                None
            };
            match reason {
                Some(reason) => skipped.push(Skipped {
                    prompt: prompt.id.clone(),
                    reason,
                }),
                None => fitting.push(Encoded {
                    id: prompt.id.clone(),
                    category: prompt.category.clone(),
                    tokens,
                }),
            }
        }
        let categories: Vec<&str> = fitting
            .iter()
            .map(|prompt| prompt.category.as_str())
            .collect();
        let order = prompts::order(&categories, seed);
        let prompts = order
            .into_iter()
            .map(|index| fitting[index].clone())
            .collect();
        Ok(Workload { prompts, skipped })
    }

    /// Whether no prompt is left.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Length of the longest prompt.
    pub fn longest(&self) -> usize {
        self.prompts
            .iter()
            .map(|prompt| prompt.tokens.len())
            .max()
            .unwrap_or(0)
    }

    /// The batch of `size` sequences that starts at place `from` of the order; the order repeats. With a `depth`, every
    /// prompt is brought to that many tokens: cut, or repeated from its start.
    ///
    /// # Panics
    /// Where no prompt is left.
    pub fn batch(
        &self,
        from: usize,
        size: usize,
        depth: Option<usize>,
        answer: &Answer,
    ) -> Batch<'_> {
        let prompts: Vec<&Encoded> = (from..from + size)
            .map(|place| &self.prompts[place % self.prompts.len()])
            .collect();
        let sequences = (0u32..)
            .zip(&prompts)
            .map(|(stream, prompt)| {
                let length = depth.unwrap_or(prompt.tokens.len());
                let prompt = prompt.tokens.iter().copied().cycle().take(length).collect();
                Sequence { prompt, stream }
            })
            .collect();
        let work = Work {
            sequences,
            max_tokens: answer.max_tokens,
            sampling: answer.sampling,
            stop_tokens: answer.stop_tokens.clone(),
        };
        Batch { prompts, work }
    }

    /// Prompts for the correctness gate: the longest of every category that has at most `longest` tokens, in the walk's
    /// order of categories. Where all are longer: the first `longest` tokens of the shortest one, with an id that says
    /// so.
    pub fn gate_prompts(&self, longest: usize) -> Vec<Encoded> {
        let mut chosen: Vec<&Encoded> = Vec::new();
        for prompt in self
            .prompts
            .iter()
            .filter(|prompt| prompt.tokens.len() <= longest)
        {
            match chosen
                .iter_mut()
                .find(|other| other.category == prompt.category)
            {
                // Longer ones test more.
                Some(other) if other.tokens.len() < prompt.tokens.len() => *other = prompt,
                Some(_) => {}
                None => chosen.push(prompt),
            }
        }
        if chosen.is_empty() {
            let shortest = self.prompts.iter().min_by_key(|prompt| prompt.tokens.len());
            let cut = |prompt: &Encoded| Encoded {
                id: format!("{}, its first {longest} tokens", prompt.id),
                category: prompt.category.clone(),
                tokens: prompt.tokens.iter().copied().take(longest).collect(),
            };
            return shortest.map(cut).into_iter().collect();
        }
        chosen.into_iter().cloned().collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A workload whose prompts are as long as their text, for tests of all modules.
    pub(crate) fn workload(texts: &[(&str, &str)], max_tokens: usize, context: usize) -> Workload {
        let file: Vec<Prompt> = texts
            .iter()
            .enumerate()
            .map(|(index, (category, text))| Prompt {
                id: format!("{category}/{index}"),
                category: (*category).to_owned(),
                text: (*text).to_owned(),
            })
            .collect();
        let encode =
            |text: &str| Ok::<_, std::convert::Infallible>(text.bytes().map(u32::from).collect());
        match Workload::new(&file, encode, max_tokens, context, 0) {
            Ok(workload) => workload,
            Err(never) => match never {},
        }
    }

    pub(crate) fn answer(max_tokens: usize) -> Answer {
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        };
        Answer {
            max_tokens,
            sampling,
            stop_tokens: Vec::new(),
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_with_its_reason() {
        let all = workload(&[("a", "abc"), ("a", "abcdefgh"), ("b", "ab")], 4, 10);
        assert_eq!(all.longest(), 3);
        assert_eq!(all.skipped.len(), 1);
        assert_eq!(
            all.skipped[0].reason,
            "8 tokens and 4 new ones pass the model's context of 10"
        );
        assert!(workload(&[("a", "abc")], 10, 10).is_empty());
        assert!(!workload(&[("a", "abc")], 7, 10).is_empty());
    }

    #[test]
    fn batches_walk_over_all_prompts_and_begin_again() {
        let all = workload(&[("a", "a"), ("b", "bb"), ("c", "ccc")], 4, 10);
        let lengths = |from, size| -> Vec<usize> {
            let batch = all.batch(from, size, None, &answer(4));
            batch
                .work
                .sequences
                .iter()
                .map(|sequence| sequence.prompt.len())
                .collect()
        };
        assert_eq!(lengths(0, 6)[..3], lengths(0, 6)[3..]);
        assert_eq!(lengths(4, 2), lengths(1, 2));
        let streams: Vec<u32> = all
            .batch(0, 3, None, &answer(4))
            .work
            .sequences
            .iter()
            .map(|s| s.stream)
            .collect();
        assert_eq!(streams, [0, 1, 2]);
    }

    #[test]
    fn a_depth_cuts_or_repeats() {
        let all = workload(&[("a", "abc")], 4, 10);
        let prompt = |depth| {
            all.batch(0, 1, Some(depth), &answer(4)).work.sequences[0]
                .prompt
                .clone()
        };
        assert_eq!(prompt(2), [97, 98]);
        assert_eq!(prompt(5), [97, 98, 99, 97, 98]);
    }

    #[test]
    fn the_gate_takes_one_of_each_category() {
        let all = workload(
            &[("a", "a"), ("a", "aaa"), ("b", "bbbbb"), ("b", "bbbbbbb")],
            4,
            99,
        );
        let mut found: Vec<_> = all
            .gate_prompts(6)
            .iter()
            .map(|prompt| prompt.tokens.len())
            .collect();
        found.sort_unstable();
        assert_eq!(found, [3, 5]);
    }

    #[test]
    fn the_gate_cuts_the_shortest_prompt_where_all_are_long() {
        let all = workload(&[("a", "aaaaaa"), ("b", "bbbbb")], 4, 99);
        let prompts = all.gate_prompts(3);
        assert_eq!(prompts.len(), 1);
        assert_eq!(prompts[0].id, "b/1, its first 3 tokens");
        assert_eq!(prompts[0].tokens, [98; 3]);
    }
}
