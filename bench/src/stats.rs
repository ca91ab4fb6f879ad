//! Statistics of measured series: summaries, percentiles, bootstrap intervals, means of ratios.
//!
//! Owns numbers only. It must not know what was measured, and it draws its random numbers from a fixed seed, so that one
//! series always gives one interval.
//!
//! Intervals are percentile bootstraps (Efron, 1979) with the levels widened for small samples: the plain percentile
//! interval of five values is too narrow by sqrt((n-1)/n) and by using a normal where Student's t belongs. So each tail is
//! Φ(-sqrt(n/(n-1)) · t(0.975, n-1)) in place of 0.025 (Hesterberg, "What Teachers Should Know about the Bootstrap", 2015,
//! the "expanded percentile interval").

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, Normal, StudentsT};

/// Resamples of a bootstrap.
const RESAMPLES: usize = 4000;
/// Probability of each tail that a 95 % interval leaves out.
const TAIL: f64 = 0.025;

/// What a series of values comes to. Units are those of the values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Number of values.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Sample standard deviation (n - 1); 0 for a single value.
    pub std: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// 50th percentile.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Summary {
    /// Summarises a series; `None` for an empty one or one with a value that is not finite.
    pub fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted = values.to_vec();
        if sorted.is_empty() || sorted.iter().any(|value| !value.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let mean = mean(&sorted);
        let squares: f64 = sorted.iter().map(|value| (value - mean).powi(2)).sum();
        let std = match sorted.len() {
            1 => 0.0,
            n => (squares / (n - 1) as f64).sqrt(),
        };
        Some(Summary {
            count: sorted.len(),
            mean,
            std,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            median: percentile(&sorted, 0.5),
            p90: percentile(&sorted, 0.9),
            p95: percentile(&sorted, 0.95),
            p99: percentile(&sorted, 0.99),
        })
    }
}

/// A value with the interval that holds it with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// The value of the whole sample.
    pub value: f64,
    /// The 95 % interval, low and high; none where there are too few values for one.
    pub interval: Option<(f64, f64)>,
}

impl Estimate {
    /// How sure it is on which side of `reference` the value lies.
    pub fn against(&self, reference: f64) -> Side {
        match self.interval {
            Some((low, _)) if low > reference => Side::Above,
            Some((_, high)) if high < reference => Side::Below,
            _ => Side::Undecided,
        }
    }
}

/// Where an interval lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// All of it above.
    Above,
    /// All of it below.
    Below,
    /// On both sides, or there is none.
    Undecided,
}

/// Arithmetic mean; NaN for no values.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Geometric mean of positive values; `None` for no values or one that is not positive.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let positive = values.iter().all(|value| value.is_finite() && *value > 0.0);
    if values.is_empty() || !positive {
        return None;
    }
    let logarithms: f64 = values.iter().map(|value| value.ln()).sum();
    Some((logarithms / values.len() as f64).exp())
}

/// The value below which the share `p` of `sorted` lies, linear between neighbours (R's type 7, NumPy's default).
///
/// # Panics
/// For no values.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = p.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (at - below as f64) * (sorted[above] - sorted[below])
}

/// A paired series: what two sides took for the same work, run side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs(pub Vec<(f64, f64)>);

impl Pairs {
    fn ratio(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
        let (above, below) = pairs.fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
        above / below
    }

    /// Sum of the first values over the sum of the second ones. Pairs are resampled together, so what both sides share
    /// (a long prompt, a slow minute) does not widen the interval. `None` for no pairs or values that are not positive.
    pub fn ratio_of_sums(&self) -> Option<Estimate> {
        geometric_mean_of_ratios(std::slice::from_ref(self))
    }

    fn usable(&self) -> bool {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        !self.0.is_empty()
            && self
                .0
                .iter()
                .all(|pair| positive(pair.0) && positive(pair.1))
    }
}

/// Geometric mean, over several paired series, of each one's ratio of sums. Every series is resampled in every resample.
/// `None` where one of them has no pairs or a value that is not positive.
pub fn geometric_mean_of_ratios(series: &[Pairs]) -> Option<Estimate> {
    if series.is_empty() || !series.iter().all(Pairs::usable) {
        return None;
    }
    let whole: Vec<f64> = series
        .iter()
        .map(|pairs| Pairs::ratio(pairs.0.iter().copied()))
        .collect();
    let value = geometric_mean(&whole)?;
    let smallest = series.iter().map(|pairs| pairs.0.len()).min()?;
    let interval = bootstrap(smallest, |random| {
        let ratios: Vec<f64> = series
            .iter()
            .map(|pairs| {
                let n = pairs.0.len();
                Pairs::ratio((0..n).map(|_| pairs.0[random.below(n)]))
            })
            .collect();
        geometric_mean(&ratios).unwrap_or(value)
    });
    Some(Estimate { value, interval })
}

/// Ratio of the means of two series that were measured apart, `above` over `below`. `None` where one is empty or a value
/// is not positive.
pub fn ratio_of_means(above: &[f64], below: &[f64]) -> Option<Estimate> {
    let positive = |values: &[f64]| values.iter().all(|value| value.is_finite() && *value > 0.0);
    if above.is_empty() || below.is_empty() || !positive(above) || !positive(below) {
        return None;
    }
    let value = mean(above) / mean(below);
    let interval = bootstrap(above.len().min(below.len()), |random| {
        let mut draw = |values: &[f64]| {
            let sum: f64 = (0..values.len())
                .map(|_| values[random.below(values.len())])
                .sum();
            sum / values.len() as f64
        };
        draw(above) / draw(below)
    });
    Some(Estimate { value, interval })
}

/// The widened percentile interval of a statistic that `resample` computes from one resample; `n` is the sample's size.
fn bootstrap(n: usize, mut resample: impl FnMut(&mut Random) -> f64) -> Option<(f64, f64)> {
    if n < 2 {
        return None;
    }
    let tail = widened_tail(n);
    let mut random = Random(0x6d69_7261_6765);
    let mut values: Vec<f64> = (0..RESAMPLES).map(|_| resample(&mut random)).collect();
    values.sort_by(f64::total_cmp);
    Some((percentile(&values, tail), percentile(&values, 1.0 - tail)))
}

/// The tail to cut off on each side for `n` values, see the module's head.
fn widened_tail(n: usize) -> f64 {
    let n = n as f64;
    // Parameters are valid by construction: one degree of freedom at least, scale 1.
    let (Ok(t), Ok(normal)) = (StudentsT::new(0.0, 1.0, n - 1.0), Normal::new(0.0, 1.0)) else {
        return TAIL;
    };
    normal.cdf(-(n / (n - 1.0)).sqrt() * t.inverse_cdf(1.0 - TAIL))
}

/// SplitMix64 (Steele, Lea, Flood, 2014): small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0. Its bias, n / 2^64, does not matter here.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Puts `items` into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() <= 1e-9 * expected.abs().max(1.0),
            "{found} is not {expected}"
        );
    }

    #[test]
    fn summary_is_numpys() {
        // numpy: mean, std(ddof=1), percentile(50, 90, 95, 99) of these.
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0, 10.0]).expect("values");
        close(summary.mean, 4.0);
        close(summary.std, 12.5f64.sqrt());
        close(summary.median, 3.0);
        close(summary.p90, 7.6);
        close(summary.p95, 8.8);
        close(summary.p99, 9.76);
        assert_eq!((summary.min, summary.max, summary.count), (1.0, 10.0, 5));
    }

    #[test]
    fn summary_of_little() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
        let one = Summary::of(&[7.0]).expect("a value");
        assert_eq!((one.std, one.median, one.p99), (0.0, 7.0, 7.0));
    }

    #[test]
    fn tails_are_those_of_the_paper() {
        // By hand: t(0.975, 4) = 2.776, times sqrt(5/4) is 3.104, and Φ(-3.104) = 0.00096.
        assert!(
            (widened_tail(5) - 0.00096).abs() < 1e-5,
            "{}",
            widened_tail(5)
        );
        // t(0.975, 19) = 2.093, times sqrt(20/19) is 2.147, and Φ(-2.147) = 0.0159.
        assert!(
            (widened_tail(20) - 0.0159).abs() < 1e-4,
            "{}",
            widened_tail(20)
        );
        assert!((widened_tail(100_000) - TAIL).abs() < 1e-4);
    }

    #[test]
    fn pairs_cancel_what_both_share() {
        // Work that varies tenfold, but one side is always twice as slow, give or take a percent.
        let pairs = Pairs(
            (1..=10)
                .map(|i| (f64::from(i) * (2.0 + 0.02 * f64::from(i % 2)), f64::from(i)))
                .collect(),
        );
        let estimate = pairs.ratio_of_sums().expect("pairs");
        let (low, high) = estimate.interval.expect("an interval");
        assert!(
            2.0 <= low && high <= 2.02 && high - low < 0.02,
            "{low} {high}"
        );
        assert_eq!(estimate.against(1.0), Side::Above);
        assert_eq!(estimate.against(3.0), Side::Below);
        assert_eq!(estimate.against(estimate.value), Side::Undecided);
    }

    #[test]
    fn intervals_hold_the_truth_about_as_often_as_they_say() {
        // Two noisy sides of equal mean, 8 pairs, 400 experiments: 95 % nominal. The plain percentile interval reaches
        // about 90 here, which this would catch.
        let mut random = Random(1);
        let mut noisy = || {
            // Irwin-Hall: the sum of 12 uniforms has a variance of 1.
            let sum: f64 = (0..12)
                .map(|_| random.bits() as f64 / u64::MAX as f64)
                .sum();
            100.0 + 2.0 * (sum - 6.0)
        };
        let holds = (0..400)
            .filter(|_| {
                let pairs = Pairs((0..8).map(|_| (noisy(), noisy())).collect());
                let interval = pairs.ratio_of_sums().and_then(|ratio| ratio.interval);
                interval.is_some_and(|(low, high)| low <= 1.0 && 1.0 <= high)
            })
            .count();
        assert!((372..=396).contains(&holds), "{holds} of 400");
    }

    #[test]
    fn too_few_or_bad_values_have_no_interval() {
        let one = Pairs(vec![(3.0, 2.0)]).ratio_of_sums().expect("a pair");
        assert_eq!(
            one,
            Estimate {
                value: 1.5,
                interval: None
            }
        );
        assert_eq!(one.against(1.0), Side::Undecided);
        assert_eq!(Pairs::default().ratio_of_sums(), None);
        assert_eq!(Pairs(vec![(1.0, 0.0)]).ratio_of_sums(), None);
        assert_eq!(ratio_of_means(&[1.0], &[]), None);
    }

    #[test]
    fn means_of_ratios() {
        close(geometric_mean(&[2.0, 0.5]).expect("positive"), 1.0);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
        let series = [Pairs(vec![(4.0, 1.0); 3]), Pairs(vec![(1.0, 1.0); 5])];
        let estimate = geometric_mean_of_ratios(&series).expect("positive");
        close(estimate.value, 2.0);
        assert_eq!(estimate.interval, Some((estimate.value, estimate.value)));
        close(
            ratio_of_means(&[2.0, 4.0], &[1.0, 2.0])
                .expect("positive")
                .value,
            2.0,
        );
    }

    #[test]
    fn shuffles_keep_every_item() {
        let mut items: Vec<u32> = (0..50).collect();
        Random(3).shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
