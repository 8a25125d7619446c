//! Choosing the next token from a row of logits.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};

use super::softmax::{exp, sum_of};
use crate::random::Random;
use crate::{Error, Result};

/// How to choose tokens. The default is greedy: the token of the largest logit.
///
/// What is set works in this order, as in transformers and vLLM: repetition, presence and frequency
/// penalties, logit bias, temperature, top-k, top-p, min-p. Greedy choice comes after the bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only the `k` largest logits stay, and those equal to the smallest of them; 0 keeps all.
    pub top_k: usize,
    /// Only the fewest tokens whose probabilities sum to this stay, and one at least; 1 keeps all.
    pub top_p: f32,
    /// Only tokens stay that are this many times as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output, not the prompt (OpenAI's rule); 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for each time a token stands in the output, not the prompt; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The same seed chooses the same tokens from the same logits; `None` is different each time.
    pub seed: Option<u64>,
    /// How many of the most probable tokens to report with each choice.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: None,
            top_logprobs: 0,
        }
    }
}

impl Sampling {
    /// Checks that every field is in its range. [`Sampler::new`] does this too; a server can ask
    /// before it queues a request.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field, its range and its value.
    pub fn validate(&self) -> Result<()> {
        let check = |field, value: f32, valid: bool, range: &str| {
            // A comparison with NaN is false, so NaN is in no range.
            if valid && value.is_finite() {
                Ok(())
            } else {
                Err(Error::argument("Sampling", field, range, value.to_string()))
            }
        };
        let Self {
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = *self;
        check(
            "temperature",
            temperature,
            temperature >= 0.0,
            "a number, 0 (greedy) or more",
        )?;
        check(
            "top_p",
            top_p,
            top_p > 0.0 && top_p <= 1.0,
            "a number above 0, at most 1 (off)",
        )?;
        check(
            "min_p",
            min_p,
            (0.0..=1.0).contains(&min_p),
            "a number from 0 (off) to 1",
        )?;
        check(
            "repetition_penalty",
            repetition_penalty,
            repetition_penalty > 0.0,
            "a number above 0 (1 is off)",
        )?;
        check("presence_penalty", presence_penalty, true, "a finite number")?;
        check("frequency_penalty", frequency_penalty, true, "a finite number")?;
        self.logit_bias
            .values()
            .try_for_each(|&bias| check("logit_bias", bias, true, "finite numbers"))
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// The tokens before the one to be chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// The prompt and then what has been generated.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt: usize,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its natural log-probability under the model: the log-softmax of the logits as they came, before
    /// penalties, temperature and filters.
    pub logprob: f32,
    /// The [`Sampling::top_logprobs`] most probable tokens with theirs, the most probable first, lower
    /// ids first where they are equal.
    pub top: Vec<(u32, f32)>,
}

/// Chooses tokens for one sequence: the settings, the random numbers and the counts for penalties.
///
/// ```
/// # fn main() -> candle_mmfp4::Result<()> {
/// use candle_mmfp4::generation::{History, Sampler, Sampling};
///
/// let mut greedy = Sampler::new(Sampling::default())?;
/// let chosen = greedy.sample(&[0.0, 2.0, 1.0], History::default())?;
/// assert_eq!(chosen.id, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    counts: Counts,
    /// The adjusted logits; kept to spare an allocation a token.
    adjusted: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn new(sampling: Sampling) -> Result<Self> {
        sampling.validate()?;
        let seed = sampling
            .seed
            // The standard library's only source of randomness.
            .unwrap_or_else(|| RandomState::new().build_hasher().finish());
        Ok(Self {
            sampling,
            random: Random::new(seed),
            counts: Counts::default(),
            adjusted: Vec::new(),
        })
    }

    /// The settings it was made with.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses from one row of logits, `[vocabulary]`. A logit of -∞ is a token that cannot be chosen.
    ///
    /// The history matters to penalties alone; only what has been added to it since the last call
    /// is counted, and a history that does not continue the last one is counted afresh.
    ///
    /// # Errors
    /// [`Error::Logits`] where a logit is NaN or +∞ or none is finite; [`Error::TokenId`] or
    /// [`Error::Argument`] where the history or the bias names a token that the logits lack.
    pub fn sample(&mut self, logits: &[f32], history: History<'_>) -> Result<Sampled> {
        check(logits)?;
        self.adjust(logits, history)?;
        let id = if self.sampling.temperature == 0.0 {
            argmax(&self.adjusted)
        } else {
            self.draw()
        };
        Ok(self.describe(logits, id))
    }

    /// Fills `adjusted`: the logits after penalties and bias.
    fn adjust(&mut self, logits: &[f32], history: History<'_>) -> Result<()> {
        self.adjusted.clear();
        self.adjusted.extend_from_slice(logits);
        let sampling = &self.sampling;
        if sampling.has_penalties() {
            self.counts.update(history, logits.len())?;
            for (&id, &generated) in &self.counts.generated {
                let logit = &mut self.adjusted[id as usize];
                if *logit > 0.0 {
                    *logit /= sampling.repetition_penalty;
                } else {
                    *logit *= sampling.repetition_penalty;
                }
                if generated > 0 {
                    *logit -= sampling.presence_penalty + sampling.frequency_penalty * generated as f32;
                }
            }
        }
        for (&id, &bias) in &sampling.logit_bias {
            *self.adjusted.get_mut(id as usize).ok_or_else(|| {
                Error::argument(
                    "Sampler::sample",
                    "logit_bias",
                    format!("token ids below {}", logits.len()),
                    id.to_string(),
                )
            })? += bias;
        }
        Ok(())
    }

    /// Temperature, top-k, top-p, min-p, and a draw from what is left.
    fn draw(&mut self) -> u32 {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let largest = self.adjusted[argmax(&self.adjusted) as usize];
        let least = match top_k {
            0 => f32::NEG_INFINITY,
            k if k >= self.adjusted.len() => f32::NEG_INFINITY,
            k => {
                let mut values = self.adjusted.clone();
                *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
            }
        };
        // Weights are probabilities relative to the most probable token, whose weight is 1: the
        // largest logit is subtracted before the division, so that no temperature can overflow.
        let weight = |&logit: &f32| {
            if logit >= least {
                exp((logit - largest) / temperature)
            } else {
                0.0
            }
        };
        let weights: Vec<f32> = self.adjusted.iter().map(weight).collect();
        let min_weight = min_p.max(f32::MIN_POSITIVE);
        let candidates = if top_p < 1.0 {
            let mut candidates = most_probable(&weights, top_p);
            candidates.retain(|&(_, weight)| weight >= min_weight);
            candidates
        } else {
            at_least(&weights, min_weight)
        };

        let mut left = self.random.uniform() * total(&candidates);
        candidates
            .iter()
            .find(|&&(_, weight)| {
                left -= f64::from(weight);
                left < 0.0
            })
            // Rounding may leave a trace of the total beyond the last token.
            .or(candidates.last())
            .map_or_else(|| argmax(&self.adjusted), |&(id, _)| id)
    }

    /// The choice with its log-probabilities under the model.
    fn describe(&self, logits: &[f32], id: u32) -> Sampled {
        let largest = logits[argmax(logits) as usize];
        let sum = sum_of(logits, |logit| exp(logit - largest));
        let log_sum = sum.ln() as f32;
        let logprob = |id: u32| logits[id as usize] - largest - log_sum;

        let wanted = self.sampling.top_logprobs.min(logits.len());
        let mut top: Vec<(u32, f32)> = Vec::new();
        if wanted > 0 {
            top = (0u32..).zip(logits.iter().copied()).collect();
            keep_largest(&mut top, wanted);
            for (id, value) in &mut top {
                *value = logprob(*id);
            }
        }
        Sampled {
            id,
            logprob: logprob(id),
            top,
        }
    }
}

/// How often each token of the history was generated; 0 for one that stands in the prompt alone.
#[derive(Debug, Clone, Default)]
struct Counts {
    counted: Vec<u32>,
    prompt: usize,
    generated: HashMap<u32, u32>,
}

impl Counts {
    fn update(&mut self, history: History<'_>, vocab_size: usize) -> Result<()> {
        let History { tokens, prompt } = history;
        if let Some(index) = tokens.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::TokenId {
                id: tokens[index],
                index,
                vocab_size,
            });
        }
        if self.prompt != prompt || !tokens.starts_with(&self.counted) {
            *self = Self {
                prompt,
                ..Self::default()
            };
        }
        for (index, &id) in tokens.iter().enumerate().skip(self.counted.len()) {
            *self.generated.entry(id).or_default() += u32::from(index >= prompt);
        }
        self.counted.extend_from_slice(&tokens[self.counted.len()..]);
        Ok(())
    }
}

fn check(logits: &[f32]) -> Result<()> {
    if let Some(index) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        return Err(Error::Logits(format!(
            "expected finite numbers, found {} for token {index}; the weights or an earlier op are at fault",
            logits[index]
        )));
    }
    if !logits.iter().any(|l| l.is_finite()) {
        return Err(Error::Logits(format!(
            "expected one finite number at least, found none among {}",
            logits.len()
        )));
    }
    Ok(())
}

/// The index of the largest value, the first of equals.
fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &value) in values.iter().enumerate() {
        if value > values[best] {
            best = index;
        }
    }
    best as u32
}

fn total(candidates: &[(u32, f32)]) -> f64 {
    candidates.iter().map(|&(_, weight)| f64::from(weight)).sum()
}

/// The larger value first, the lower id first of equals.
fn descending(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the `count` largest, sorted, without sorting the others.
fn keep_largest(candidates: &mut Vec<(u32, f32)>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, descending);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(descending);
}

fn at_least(weights: &[f32], least: f32) -> Vec<(u32, f32)> {
    (0u32..)
        .zip(weights.iter().copied())
        .filter(|&(_, weight)| weight >= least)
        .collect()
}

/// The fewest tokens whose weights reach `top_p` of the total, the most probable first.
fn most_probable(weights: &[f32], top_p: f32) -> Vec<(u32, f32)> {
    let goal = sum_of(weights, |weight| weight) * f64::from(top_p);
    // Only tokens that together reach the goal need sorting, and mostly these are few.
    let mut candidates = Vec::new();
    for least in [1e-2, 1e-4, 1e-6, f32::MIN_POSITIVE] {
        candidates = at_least(weights, least);
        if total(&candidates) >= goal {
            break;
        }
    }
    candidates.sort_unstable_by(descending);
    let mut sum = 0.0;
    let reached = candidates.iter().position(|&(_, weight)| {
        sum += f64::from(weight);
        sum >= goal
    });
    candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
    candidates
}

#[cfg(test)]
mod tests;
