//! How well a model predicts a text.

use super::pipeline::Pipeline;
use super::session::Session;
use super::softmax::{exp, sum_of};
use crate::models::glm4_moe_lite::Logits;
use crate::{Error, Result};
use std::ops::Range;

/// How many logits (F32) a pass may leave: 128 MiB of them. A small vocabulary has several windows run together.
const LOGITS: usize = 1 << 25;

/// How a text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that the model sees together.
    pub size: usize,
    /// How far a window begins after the one before. As far as its size, windows are disjoint; less, and they overlap:
    /// a token then has more context, and counts in the first window that holds it alone.
    pub stride: usize,
}

impl Windows {
    /// Disjoint windows of `size` tokens.
    pub fn disjoint(size: usize) -> Self {
        Self { size, stride: size }
    }

    fn validate(&self, context: usize) -> Result<()> {
        if self.size < 2 || self.size > context {
            let expected = format!("a size from 2 to the model's context of {context}");
            return Err(Error::argument(
                "perplexity",
                "window",
                expected,
                self.size.to_string(),
            ));
        }
        if self.stride == 0 || self.stride > self.size {
            let expected = format!("from 1 to the window's {} tokens", self.size);
            return Err(Error::argument(
                "perplexity",
                "stride",
                expected,
                self.stride.to_string(),
            ));
        }
        Ok(())
    }

    /// The windows of a text of `len` tokens, each with those of its tokens whose predictions count.
    fn cut(&self, len: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let (size, stride) = (self.size, self.stride);
        let mut counted = 0;
        (0..len).step_by(stride).map_while(move |start| {
            if counted == len {
                return None;
            }
            let end = len.min(start + size);
            // Nothing comes before a window's first token that would predict it.
            let predicted = counted.max(start + 1)..end;
            counted = end;
            Some((start..end, predicted))
        })
    }
}

impl Default for Windows {
    /// Disjoint windows of 512 tokens.
    fn default() -> Self {
        Self::disjoint(512)
    }
}

/// The loss of a model over texts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// The sum of the predicted tokens' losses: natural logarithms of their probabilities, negated.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows run.
    pub windows: usize,
}

impl Perplexity {
    /// e to the power of the mean loss; NaN where no token was predicted.
    pub fn value(&self) -> f64 {
        (self.loss / self.tokens as f64).exp()
    }
}

impl Pipeline {
    /// Measures how well the model predicts documents: each on its own, as plain text without special tokens, cut
    /// into windows that are run without a past, through the pipeline's cache. A window in which nothing is predicted, such as one of a single
    /// token, is left out. `on_progress` is told how many windows of how many are done.
    ///
    /// Windows may run together where the vocabulary is small; they do not see each other.
    ///
    /// # Errors
    /// [`Error::Argument`] for windows that make no sense, and where the documents are too short to predict anything;
    /// [`Error::Logits`] where the model computes NaN; those of [`Tokenizer::encode_plain`](super::Tokenizer::encode_plain)
    /// and of the model.
    pub fn perplexity(
        &self,
        documents: &[impl AsRef<str>],
        windows: Windows,
        mut on_progress: impl FnMut(usize, usize),
    ) -> Result<Perplexity> {
        let config = self.model().config();
        windows.validate(config.max_position_embeddings)?;
        let documents = documents
            .iter()
            .map(|text| self.tokenizer().encode_plain(text.as_ref()))
            .collect::<Result<Vec<_>>>()?;
        let mut jobs = Vec::new();
        for tokens in &documents {
            let cut = windows.cut(tokens.len());
            jobs.extend(
                cut.filter(|(_, predicted)| !predicted.is_empty())
                    .map(|(window, predicted)| Job {
                        tokens: &tokens[window.clone()],
                        predicted: predicted.start - window.start..predicted.end - window.start,
                    }),
            );
        }
        if jobs.is_empty() {
            let expected = "a text of two tokens at least";
            return Err(Error::argument("perplexity", "documents", expected, "none"));
        }
        let room = self.cache().room_for(windows.size).unwrap_or(usize::MAX);
        let together = (LOGITS / config.vocab_size / windows.size).min(room).max(1);
        let mut result = Perplexity::default();
        for jobs_of_a_pass in jobs.chunks(together) {
            result.loss += self.loss(jobs_of_a_pass)?;
            result.tokens += jobs_of_a_pass
                .iter()
                .map(|job| job.predicted.len())
                .sum::<usize>();
            result.windows += jobs_of_a_pass.len();
            on_progress(result.windows, jobs.len());
        }
        Ok(result)
    }

    fn loss(&self, jobs: &[Job<'_>]) -> Result<f64> {
        let sessions: Vec<_> = jobs.iter().map(|_| self.new_session()).collect();
        let ids = sessions.iter().map(Session::id);
        let inputs: Vec<_> = ids.zip(jobs).map(|(id, job)| (id, job.tokens)).collect();
        let logits = self
            .model()
            .forward_cached(&mut self.cache(), &inputs, Logits::All, None)?;
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let mut rows = logits.chunks_exact(self.model().config().vocab_size);
        let mut sum = 0.0;
        for job in jobs {
            for (index, row) in rows.by_ref().take(job.tokens.len()).enumerate() {
                if job.predicted.contains(&(index + 1)) {
                    sum += loss(row, job.tokens[index + 1])?;
                }
            }
        }
        Ok(sum)
    }
}

/// A window: its tokens, and which of them count.
struct Job<'a> {
    tokens: &'a [u32],
    predicted: Range<usize>,
}

/// The negated log-softmax of one token.
fn loss(logits: &[f32], token: u32) -> Result<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum = sum_of(logits, |logit| exp(logit - largest));
    let loss = sum.ln() + f64::from(largest) - f64::from(logits[token as usize]);
    if loss.is_nan() {
        let problem =
            "expected finite numbers, found NaN or infinity; the weights or an earlier op are at fault";
        return Err(Error::Logits(problem.into()));
    }
    Ok(loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(size: usize, stride: usize, len: usize) -> Vec<(Range<usize>, Range<usize>)> {
        Windows { size, stride }.cut(len).collect()
    }

    #[test]
    fn disjoint_windows_lose_their_first_token() {
        assert_eq!(cut(4, 4, 8), [(0..4, 1..4), (4..8, 5..8)]);
        // A last window of one token predicts nothing.
        assert_eq!(cut(4, 4, 5), [(0..4, 1..4), (4..5, 5..5)]);
        assert_eq!(cut(4, 4, 3), [(0..3, 1..3)]);
        assert!(cut(4, 4, 0).is_empty());
    }

    #[test]
    fn overlapping_windows_count_each_token_once() {
        assert_eq!(cut(4, 2, 7), [(0..4, 1..4), (2..6, 4..6), (4..7, 6..7)]);
        // The second window reaches the end: there is no third.
        assert_eq!(cut(4, 2, 6), [(0..4, 1..4), (2..6, 4..6)]);
        for (size, stride, len) in [(5, 1, 12), (7, 3, 40), (512, 511, 1000)] {
            let counted: Vec<usize> = cut(size, stride, len).into_iter().flat_map(|(_, p)| p).collect();
            assert_eq!(counted, (1..len).collect::<Vec<_>>(), "{size} {stride} {len}");
        }
    }

    #[test]
    fn a_loss_is_a_negated_logarithm() {
        let found = loss(&[1.0, 2.0, 3.0], 1).unwrap();
        let exponentials: f64 = [1f64, 2.0, 3.0].map(f64::exp).iter().sum();
        assert!((found - (exponentials.ln() - 2.0)).abs() < 1e-6, "{found}");
        // Uniform over four: ln 4, however large the logits.
        assert!((loss(&[1e6; 4], 0).unwrap() - 4f64.ln()).abs() < 1e-6);
        for odd in [f32::NAN, f32::INFINITY] {
            assert!(loss(&[0.0, odd], 0).is_err(), "{odd}");
        }
    }

    #[test]
    fn windows_out_of_range_are_refused() {
        for (size, stride, named) in [
            (1, 1, "window"),
            (99, 1, "window"),
            (8, 0, "stride"),
            (8, 9, "stride"),
        ] {
            let error = Windows { size, stride }.validate(98).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(Windows { size: 98, stride: 1 }.validate(98).is_ok());
    }
}
