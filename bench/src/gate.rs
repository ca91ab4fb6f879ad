//! The correctness gate: no speedup is printed of two sides that do not compute the same thing.
//!
//! Owns the comparison and its bounds. Two engines in bf16 never agree bit for bit: they sum in other orders and round in
//! other places. So the gate asks two things, on the same token ids:
//!
//! 1. *Logits.* Along one greedy continuation, both sides' teacher-forced logits differ by little: root mean square of the
//!    differences, over the root mean square of the baseline's logits around their mean, at most [`ERROR_BOUND`] over all
//!    rows and [`ROW_BOUND`] in the worst one.
//! 2. *Greedy tokens.* They are the same up to a place where the baseline's own logits for the two choices lie closer
//!    together than twice the largest difference of that row: there either choice is as right.
//!
//! It must not know what the sides are.

use crate::results::{Agreement, Gate};
use crate::side::{Interrupt, Sampling, Sequence, Shape, Side, SideError, Work};
use crate::workload::Encoded;

/// Bound on the logits' relative error over all rows. bf16 keeps 8 bits, a relative error of 2^-9 a rounding; the
/// roundings of a few dozen layers add up to one or two percent of the logits' spread. A wrong operator gives 50 and more.
pub const ERROR_BOUND: f64 = 0.05;
/// Bound on the relative error of one row.
pub const ROW_BOUND: f64 = 0.15;
/// Longest prompt that the gate takes, a longer one is cut: logits of every position are held in memory.
pub const LONGEST_PROMPT: usize = 64;
/// Greedy tokens of each prompt.
pub const NEW_TOKENS: usize = 16;

/// What the first side wrote for the gate's prompts.
pub struct Checked {
    /// The verdict on every pair.
    pub gate: Gate,
    /// The first side's tokens for each prompt.
    pub tokens: Vec<Vec<u32>>,
}

/// Compares the first of `sides` with each of the others on `prompts`, within the prepared shape.
///
/// # Errors
/// A side's own, or Ctrl-C.
pub fn check(
    sides: &mut [Box<dyn Side + '_>],
    prompts: &[Encoded],
    shape: Shape,
    interrupt: &Interrupt,
) -> Result<Checked, SideError> {
    let Some((tested, others)) = sides.split_first_mut() else {
        return Ok(Checked {
            gate: Gate {
                tested: String::new(),
                passed: true,
                comparisons: Vec::new(),
            },
            tokens: Vec::new(),
        });
    };
    let fitting: Vec<&Encoded> = prompts
        .iter()
        .filter(|prompt| prompt.tokens.len() + NEW_TOKENS <= shape.context)
        .collect();
    let tokens = greedy(tested.as_mut(), &fitting, shape, interrupt)?;
    let mut comparisons = Vec::new();
    for other in others {
        let theirs = greedy(other.as_mut(), &fitting, shape, interrupt)?;
        let mut tally = Tally::default();
        for (prompt, (ours, theirs)) in fitting.iter().zip(tokens.iter().zip(&theirs)) {
            if interrupt.is_set() {
                return Err(SideError::Interrupted);
            }
            // The last token is chosen, not fed.
            let mut fed = prompt.tokens.clone();
            fed.extend(ours.iter().take(ours.len().saturating_sub(1)));
            let from = prompt.tokens.len() - 1;
            let a = tested.logits(&fed, from)?;
            let b = other.logits(&fed, from)?;
            tally.sequence(&prompt.id, ours, theirs, &a, &b);
        }
        comparisons.push(tally.verdict(other.facts().key));
    }
    // A gate that compared nothing has not been passed.
    let passed = comparisons.iter().all(|comparison| comparison.passed);
    Ok(Checked {
        gate: Gate {
            tested: tested.facts().key,
            passed,
            comparisons,
        },
        tokens,
    })
}

fn greedy(
    side: &mut dyn Side,
    prompts: &[&Encoded],
    shape: Shape,
    interrupt: &Interrupt,
) -> Result<Vec<Vec<u32>>, SideError> {
    let mut tokens = Vec::new();
    for batch in prompts.chunks(shape.batch) {
        let sequences = batch
            .iter()
            .map(|prompt| Sequence {
                prompt: prompt.tokens.clone(),
                stream: 0,
            })
            .collect();
        let work = Work {
            sequences,
            max_tokens: NEW_TOKENS,
            sampling: Sampling {
                temperature: 0.0,
                top_p: 1.0,
                seed: 0,
            },
            stop_tokens: Vec::new(),
        };
        tokens.extend(side.generate(&work, interrupt)?.tokens);
    }
    Ok(tokens)
}

/// Sums over all sequences of one pair of sides.
#[derive(Default)]
struct Tally {
    sequences: usize,
    identical: usize,
    tokens: usize,
    rows: usize,
    squared_difference: f64,
    squared_spread: f64,
    worst_row: f64,
    failures: Vec<String>,
}

impl Tally {
    /// Takes one prompt: greedy tokens of both sides, and logits of both along our tokens.
    fn sequence(&mut self, prompt: &str, ours: &[u32], theirs: &[u32], a: &[f32], b: &[f32]) {
        self.sequences += 1;
        let rows = ours.len();
        if rows == 0
            || theirs.len() != rows
            || a.len() != b.len()
            || a.is_empty()
            || !a.len().is_multiple_of(rows)
        {
            let (theirs, a, b) = (theirs.len(), a.len(), b.len());
            self.failures.push(format!(
                "{prompt}: {rows} tokens against {theirs}, {a} logits against {b}"
            ));
            return;
        }
        let vocab = a.len() / rows;
        let differs = ours
            .iter()
            .zip(theirs)
            .position(|(our, their)| our != their);
        match differs {
            None => {
                self.identical += 1;
                self.tokens += rows;
            }
            Some(at) => self.tokens += at + 1,
        }
        for (row, (a, b)) in a.chunks(vocab).zip(b.chunks(vocab)).enumerate() {
            self.rows += 1;
            let mean = b.iter().map(|&logit| f64::from(logit)).sum::<f64>() / vocab as f64;
            let mut difference = 0.0;
            let mut spread = 0.0;
            let mut largest: f64 = 0.0;
            for (&a, &b) in a.iter().zip(b) {
                let delta = f64::from(a) - f64::from(b);
                difference += delta * delta;
                spread += (f64::from(b) - mean).powi(2);
                largest = largest.max(delta.abs());
            }
            self.squared_difference += difference;
            self.squared_spread += spread;
            let error = (difference / spread).sqrt();
            // A NaN must not pass as the smaller of two.
            if error.is_nan() || error > ROW_BOUND {
                self.failures.push(format!(
                    "{prompt}, new token {}: the logits differ by {error:.3} of their spread, at most {ROW_BOUND} is allowed",
                    row + 1
                ));
            }
            self.worst_row = if error.is_nan() {
                f64::INFINITY
            } else {
                self.worst_row.max(error)
            };
            if differs == Some(row) {
                let logit = |token: u32| {
                    b.get(token as usize)
                        .map_or(f64::NAN, |&logit| f64::from(logit))
                };
                let margin = logit(theirs[row]) - logit(ours[row]);
                if margin.is_nan() || margin > 2.0 * largest {
                    self.failures.push(format!(
                        "{prompt}, new token {}: {} against {}, though the logits are {margin:.3} apart and differ by {largest:.3} at most",
                        row + 1, ours[row], theirs[row]
                    ));
                }
            }
        }
    }

    fn verdict(mut self, side: String) -> Agreement {
        let error = (self.squared_difference / self.squared_spread).sqrt();
        if self.sequences == 0 {
            self.failures
                .push("nothing was compared: no prompt fits".to_owned());
        } else if error.is_nan() || error > ERROR_BOUND {
            self.failures.push(format!(
                "over all rows the logits differ by {error:.3} of their spread, at most {ERROR_BOUND} is allowed"
            ));
        }
        // JSON has no NaN and no infinity.
        let finite = |value: f64| if value.is_finite() { value } else { f64::MAX };
        Agreement {
            side,
            passed: self.failures.is_empty(),
            sequences: self.sequences,
            identical: self.identical,
            tokens: self.tokens,
            rows: self.rows,
            logit_error: finite(error),
            worst_row_error: finite(self.worst_row),
            failures: self.failures,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds one prompt of two new tokens over a vocabulary of three, and gives the verdict.
    fn check(ours: &[u32], theirs: &[u32], a: &[f32], b: &[f32]) -> Agreement {
        let mut tally = Tally::default();
        tally.sequence("x/1", ours, theirs, a, b);
        tally.verdict("b1".to_owned())
    }

    #[test]
    fn equal_sides_agree() {
        let logits = [1.0, 2.0, 3.0, 3.0, 2.0, 1.0];
        let agreement = check(&[2, 0], &[2, 0], &logits, &logits);
        assert!(agreement.passed, "{:?}", agreement.failures);
        assert_eq!(
            (agreement.identical, agreement.tokens, agreement.rows),
            (1, 2, 2)
        );
        assert_eq!(agreement.logit_error, 0.0);
    }

    #[test]
    fn a_near_tie_may_fall_either_way() {
        let a = [1.0, 3.01, 3.0, 3.0, 2.0, 1.0];
        let b = [1.0, 3.0, 3.01, 3.0, 2.0, 1.0];
        let agreement = check(&[1, 0], &[2, 0], &a, &b);
        assert!(agreement.passed, "{:?}", agreement.failures);
        assert_eq!((agreement.identical, agreement.tokens), (0, 1));
    }

    #[test]
    fn another_token_against_the_logits_fails() {
        let logits = [1.0, 2.0, 3.0, 3.0, 2.0, 1.0];
        let agreement = check(&[1, 0], &[2, 0], &logits, &logits);
        assert!(!agreement.passed);
        assert!(
            agreement.failures[0].starts_with("x/1, new token 1: 1 against 2"),
            "{:?}",
            agreement.failures
        );
    }

    #[test]
    fn logits_that_differ_fail() {
        let agreement = check(
            &[2, 0],
            &[2, 0],
            &[1.0, 2.0, 3.0, 3.0, 2.0, 1.0],
            &[1.0, 2.0, 4.0, 4.0, 2.0, 1.0],
        );
        assert!(!agreement.passed);
        assert_eq!(agreement.failures.len(), 3, "{:?}", agreement.failures);
    }

    #[test]
    fn nan_and_nothing_fail() {
        let nan = check(
            &[2, 0],
            &[2, 0],
            &[f32::NAN; 6],
            &[1.0, 2.0, 3.0, 3.0, 2.0, 1.0],
        );
        assert!(!nan.passed && nan.logit_error.is_finite());
        assert!(!check(&[], &[], &[], &[]).passed);
        assert!(!check(&[2], &[2, 0], &[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]).passed);
        assert!(!Tally::default().verdict("b1".to_owned()).passed);
    }
}
