//! `Rope`: rotary position embedding (Su et al., arXiv:2104.09864) in the rotate-half form of the Hugging Face checkpoints:
//! element `i` of a head's first half turns with element `i` of its second half.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use super::{Cost, Inferred, Load, Scope, Type, TypedOp, heads, mismatch, product};
use crate::diagnostics::Diagnostic;
use crate::graph::{Expr, Spanned};

/// As written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotaryEmbedding {
    /// `[heads, head_dim]`.
    pub input: Spanned<String>,
    /// Base of the frequencies.
    pub theta: Spanned<Expr>,
    /// Llama-3's change of the low frequencies.
    #[serde(default)]
    pub llama3: Option<Spanned<Scaling>>,
}

/// As written: `rope_scaling` of type `llama3` in config.json. A factor of 1 changes nothing.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    /// Divisor of the lowest frequencies.
    pub factor: Spanned<Expr>,
    /// Wavelengths above `original_context / low_freq_factor` are divided by `factor`.
    pub low_freq_factor: Spanned<Expr>,
    /// Wavelengths below `original_context / high_freq_factor` stay.
    pub high_freq_factor: Spanned<Expr>,
    /// Context of the first training.
    pub original_context: Spanned<Expr>,
}

/// Rotary position embedding: pair `i` of a head turns by `position * inv_freq(i)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies: `inv_freq(i) = theta^(-2i / head_dim)`.
    pub theta: f64,
    /// Llama-3's change of the low frequencies.
    pub scaling: Option<Llama3Scaling>,
}

/// `rope_scaling` of type `llama3` in config.json.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Llama3Scaling {
    /// Divisor of the lowest frequencies.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are divided by `factor`.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` stay.
    pub high_freq_factor: f64,
    /// Context of the first training (`original_max_position_embeddings`).
    pub original_context: f64,
}

impl Rope {
    /// Radians that each of the `head_dim / 2` pairs turns by for one position. Made in f64 and rounded to f32, the
    /// precision that the checkpoints' authors keep them in.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let frequency = |pair: usize| self.theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let scaled = |f: f64| self.scaling.map_or(f, |scaling| scaling.apply(f));
        (0..head_dim / 2)
            .map(|pair| scaled(frequency(pair)) as f32)
            .collect()
    }
}

impl Llama3Scaling {
    /// Keeps high frequencies, divides low ones, and goes linearly from one to the other in between
    /// (Llama 3.1's reference code; the same as transformers' `_compute_llama3_parameters`).
    fn apply(&self, frequency: f64) -> f64 {
        let wavelength = TAU / frequency;
        if wavelength < self.original_context / self.high_freq_factor {
            frequency
        } else if wavelength > self.original_context / self.low_freq_factor {
            frequency / self.factor
        } else {
            let keep = (self.original_context / wavelength - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - keep) * frequency / self.factor + keep * frequency
        }
    }
}

/// With concrete sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct TypedRope {
    /// Heads of the input.
    pub heads: usize,
    /// Elements of a head, even.
    pub head_dim: usize,
    /// The frequencies.
    pub rope: Rope,
}

impl RotaryEmbedding {
    /// `[heads, head_dim]` with even `head_dim` to the same shape.
    pub(super) fn infer(&self, scope: &Scope<'_>, input: &Type) -> Result<Inferred, Diagnostic> {
        let (heads, head_dim) = heads("Rope", self.input.span, input)?;
        if head_dim % 2 != 0 {
            return Err(mismatch(
                self.input.span,
                "Rope",
                "heads of an even number of elements",
                input,
            )
            .help("make `head_dim` even"));
        }
        let theta = positive(scope, &self.theta)?;
        let scaling = self
            .llama3
            .as_ref()
            .map(|scaling| scaling.evaluate(scope))
            .transpose()?;
        let rope = Rope {
            theta,
            scaling: scaling.filter(|scaling| scaling.factor != 1.0),
        };
        if !rope
            .inverse_frequencies(head_dim)
            .iter()
            .all(|f| f.is_finite())
        {
            let message = format!("with theta {theta} a frequency is no finite number");
            return Err(Diagnostic::new("invalid-value", self.theta.span, message)
                .help("theta is 10000 or more in most models; check it and `rope_scaling` in config.json"));
        }
        Ok(Inferred {
            op: TypedOp::Rope(TypedRope {
                heads,
                head_dim,
                rope,
            }),
            weight: None,
        })
    }
}

impl Scaling {
    fn evaluate(&self, scope: &Scope<'_>) -> Result<Llama3Scaling, Diagnostic> {
        let scaling = Llama3Scaling {
            factor: positive(scope, &self.factor)?,
            low_freq_factor: positive(scope, &self.low_freq_factor)?,
            high_freq_factor: positive(scope, &self.high_freq_factor)?,
            original_context: positive(scope, &self.original_context)?,
        };
        if scaling.high_freq_factor <= scaling.low_freq_factor {
            let (high, low) = (scaling.high_freq_factor, scaling.low_freq_factor);
            return Err(Diagnostic::new(
                "invalid-value",
                self.high_freq_factor.span,
                format!("high_freq_factor ({high}) must be above low_freq_factor ({low})"),
            )
            .related(self.low_freq_factor.span, "the lower one")
            .help("check `rope_scaling` in config.json"));
        }
        Ok(scaling)
    }
}

fn positive(scope: &Scope<'_>, expr: &Spanned<Expr>) -> Result<f64, Diagnostic> {
    let value = scope.symbols.real(expr)?;
    if value > 0.0 {
        return Ok(value);
    }
    Err(Diagnostic::new(
        "invalid-value",
        expr.span,
        format!("`{}` is {value}", expr.value),
    )
    .help("a frequency's parameter must be above 0"))
}

impl TypedRope {
    /// Turns every head to `position`. Angles are made in f64, so that they are exact at any context.
    pub fn run(&self, input: &[f32], position: usize) -> Vec<f32> {
        let turns: Vec<(f32, f32)> = self
            .rope
            .inverse_frequencies(self.head_dim)
            .into_iter()
            .map(|frequency| (position as f64 * f64::from(frequency)).sin_cos())
            .map(|(sin, cos)| (sin as f32, cos as f32))
            .collect();
        let half = self.head_dim / 2;
        let mut output = input.to_vec();
        for head in output.chunks_exact_mut(self.head_dim) {
            for (pair, (sin, cos)) in turns.iter().enumerate() {
                let (a, b) = (head[pair], head[pair + half]);
                head[pair] = a * cos - b * sin;
                head[pair + half] = b * cos + a * sin;
            }
        }
        output
    }

    /// Four multiplications and two additions for each pair.
    pub(super) fn cost(&self, load: Load) -> Cost {
        Cost {
            flops: 3 * product(&[self.heads, self.head_dim]) * load.tokens,
            ..Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Rope = Rope {
        theta: 10_000.0,
        scaling: None,
    };

    #[test]
    fn turns_pairs_of_the_two_halves() {
        let op = TypedRope {
            heads: 1,
            head_dim: 4,
            rope: PLAIN,
        };
        assert_eq!(op.run(&[1.0, 2.0, 3.0, 4.0], 0), [1.0, 2.0, 3.0, 4.0]);
        let out = op.run(&[1.0, 0.0, 0.0, 1.0], 1);
        // Frequencies 1 and 0.01.
        let want = [1f32.cos(), -(0.01f32.sin()), 1f32.sin(), 0.01f32.cos()];
        for (got, want) in out.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{out:?}");
        }
    }

    #[test]
    fn llama3_divides_only_low_frequencies() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let rope = Rope {
            theta: 500_000.0,
            scaling: Some(scaling),
        };
        let plain = Rope {
            theta: 500_000.0,
            scaling: None,
        }
        .inverse_frequencies(128);
        let scaled = rope.inverse_frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] * 8.0 / plain[63] - 1.0).abs() < 1e-6);
        let between = (0..64)
            .filter(|i| scaled[*i] < plain[*i] * 0.999 && scaled[*i] > plain[*i] / 7.99)
            .count();
        assert!(between > 0, "{scaled:?}");
        assert!(
            scaled.windows(2).all(|pair| pair[0] > pair[1]),
            "frequencies must keep falling"
        );
    }
}
