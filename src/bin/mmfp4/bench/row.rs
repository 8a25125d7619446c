//! What is measured, as it is reported.

use candle_mmfp4::models::ProfileReport;
use serde::{Deserialize, Serialize};

/// A bandwidth that spreads by more than this tells that other programs ran.
const NOISY: f64 = 0.15;

/// What a process hands to the one that started it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Rows(Vec<Row>),
    Failed(String),
}

/// One line of the report. Rates and shares are of medians; loading, which has no tokens, has 0 of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// `pp`, `tg`, or the name of a latency.
    pub test: String,
    #[serde(flatten)]
    pub setup: Setup,
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    pub depth: usize,
    /// What the cache stores.
    pub kv_cache: String,
    pub tokens_per_s: f64,
    /// The largest less the smallest of the repetitions, as a share of the median.
    pub spread: f64,
    /// The median of a repetition's time.
    pub latency_ms: f64,
    /// The time of the repetition that comes first and does not count, where there is one.
    pub first_ms: Option<f64>,
    pub bytes_per_token: u64,
    /// Bytes the cache holds at the end.
    pub cache_bytes: u64,
    pub read_bandwidth_gb_s: f64,
    pub bandwidth_spread: f64,
    pub share_of_bandwidth: f64,
    pub noisy: bool,
    /// Its speed as a share of that at depth 0, both measured in turn.
    pub of_depth_0: Option<f64>,
    /// Products of floats, measured like the bandwidth, and what attention takes of them; on the CPU.
    pub float_peak_gop_s: Option<f64>,
    /// What a repetition takes at least: as long as at depth 0, and the larger of what the cache's bytes and what
    /// attention's products take at the machine's limits.
    pub bound_ms: Option<f64>,
    /// The median of a repetition's time, by that.
    pub of_bound: Option<f64>,
    /// With the pages of mapped files; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Without them.
    pub private_memory_bytes: Option<u64>,
    /// The repetitions that count.
    pub repetitions: usize,
    /// The time of each.
    pub samples_ms: Vec<f64>,
    /// Of one more repetition, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileReport>,
}

/// What all rows of a report share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    pub model: String,
    pub fused_moe: bool,
    /// Whether the output head was rounded to eight bits.
    pub int8_head: bool,
    /// Whether activations were f32.
    pub exact: bool,
    /// The instruction set of the kernels.
    pub cpu: String,
    pub threads: usize,
}

/// Several measurements of one thing.
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// The middle one, or the mean of the two; NaN of none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
        }
    }

    /// The largest less the smallest, as a share of the median.
    pub fn spread(&self) -> f64 {
        let largest = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let smallest = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        (largest - smallest) / self.median()
    }
}

/// Whether a run with such a spread of the bandwidth was disturbed.
pub fn is_noisy(bandwidth_spread: f64) -> bool {
    bandwidth_spread > NOISY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_spread() {
        let samples = Samples(vec![5.0, 1.0, 4.0]);
        assert_eq!((samples.median(), samples.spread()), (4.0, 1.0));
        let samples = Samples(vec![2.0, 8.0, 4.0, 6.0]);
        assert_eq!((samples.median(), samples.spread()), (5.0, 1.2));
        assert!(is_noisy(0.151) && !is_noisy(0.15));
    }
}
