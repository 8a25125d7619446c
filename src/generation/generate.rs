//! From a prompt to events.

use super::pipeline::Pipeline;
use super::session::{Held, Session, common};
use super::{Detokenizer, History, Sampler, Sampling, StopStrings};
use crate::models::glm4_moe_lite::Logits;
use crate::models::{Observer, Site, check_finite};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How to generate.
#[derive(Debug, Clone)]
pub struct Options {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The most tokens to generate; `None` goes on until the model ends or its context is full.
    pub max_tokens: Option<usize>,
    /// Texts that end the generation; they are not part of the output.
    pub stop: Vec<String>,
    /// Whether special tokens are left out of the text. They are kept by default, so that reasoning and tool
    /// calls can be told from the answer (see [`OutputParser`](super::OutputParser)); those that end a text
    /// never appear.
    pub skip_special: bool,
    /// Whether what has been computed is kept from token to token. Without, every token computes all before it anew: a
    /// slow reference with the same results. A session is then left alone.
    pub use_cache: bool,
    /// Prompt tokens a step; more need more memory for attention's scores, and with a few, keys of the past are expanded
    /// anew for each. On the CPU, over a cache of blocks, the numbers are the same bits for any.
    pub prefill_chunk: usize,
    /// Ends the generation from elsewhere.
    pub cancel: Cancel,
    /// Whether every op's output is searched for NaN and infinity, which end the generation with an error that
    /// names the layer and the op ([`Error::NonFiniteOutput`]); slower, off by default.
    pub check_finite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sampling: Sampling::default(),
            max_tokens: None,
            stop: Vec::new(),
            skip_special: false,
            use_cache: true,
            prefill_chunk: 512,
            cancel: Cancel::default(),
            check_finite: false,
        }
    }
}

/// A handle that ends a generation within one step, from any thread; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Ends every generation that was started with this handle.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happens while text is generated.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A part of the prompt has been computed.
    Prefill {
        /// Prompt tokens computed or found in the cache so far.
        done: usize,
        /// Prompt tokens in all.
        total: usize,
    },
    /// A token was chosen.
    Token {
        /// The token.
        id: u32,
        /// What it adds to the text: nothing while a character, or what may become a stop text, is incomplete.
        text: String,
        /// Its log-probability under the model.
        logprob: f32,
        /// The most probable tokens, if [`Sampling::top_logprobs`] asks for them.
        top: Vec<(u32, f32)>,
    },
    /// The end; nothing comes after.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What had been held back.
        text: String,
        /// How much was computed, and how fast.
        statistics: Statistics,
    },
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its text, or a stop text came.
    Stop,
    /// As many tokens as asked for, or the context is full.
    Length,
    /// [`Cancel::cancel`].
    Cancelled,
}

/// How much was computed, and how fast.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Statistics {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the cache: the session's, or of any sequence that began alike.
    pub cached_tokens: usize,
    /// Tokens generated, without the one that ends the text.
    pub generated_tokens: usize,
    /// From the start to the first token.
    pub prefill: Duration,
    /// From the first token to the end.
    pub decode: Duration,
}

impl Statistics {
    /// Prompt tokens computed a second; 0 where none were.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens - self.cached_tokens, self.prefill)
    }

    /// Tokens generated a second, the first not counted, which belongs to the prompt; 0 for fewer than two.
    pub fn decode_rate(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 || time.is_zero() {
        0.0
    } else {
        tokens as f64 / time.as_secs_f64()
    }
}

/// One sequence under way.
struct Active<'a> {
    session: Held<'a>,
    /// Whether the session holds what the cache has of the prompt's beginning: not before the sequence's first step, when
    /// others may have computed what it needs.
    begun: bool,
    /// The prompt and what has been generated.
    tokens: Vec<u32>,
    /// How many of them the model has seen.
    computed: usize,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopStrings,
    statistics: Statistics,
    first_token: Option<Instant>,
    finished: bool,
}

impl Active<'_> {
    fn prompt(&self) -> usize {
        self.statistics.prompt_tokens
    }
}

/// The sequences of a batch, advanced together: a step runs a chunk of every prompt that is not done and the
/// next token of all others through the model at once.
pub(super) struct Batch<'a> {
    pipeline: &'a Pipeline,
    options: Options,
    sequences: Vec<Active<'a>>,
    started: Instant,
    observer: Option<Box<Observer<'a>>>,
}

impl<'a> Batch<'a> {
    fn new(
        pipeline: &'a Pipeline,
        prompts: &[&[u32]],
        options: &Options,
        lent: Option<&'a mut Session>,
    ) -> Result<Self> {
        if options.prefill_chunk == 0 {
            return Err(Error::argument("generate", "prefill_chunk", "at least 1", "0"));
        }
        let limit = pipeline.model().config().max_position_embeddings;
        let vocab_size = pipeline.model().config().vocab_size;
        let mut lent = lent;
        let mut sequences = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            if prompt.is_empty() {
                return Err(Error::EmptyPrompt);
            }
            if prompt.len() > limit {
                return Err(Error::ContextLength {
                    tokens: prompt.len(),
                    limit,
                });
            }
            if let Some(index) = prompt.iter().position(|id| *id as usize >= vocab_size) {
                return Err(Error::TokenId {
                    id: prompt[index],
                    index,
                    vocab_size,
                });
            }
            let sampler = Sampler::new(options.sampling.clone())?;
            let stops = StopStrings::new(options.stop.clone())?;
            let session = match lent.take().filter(|_| options.use_cache) {
                Some(session) => Held::Lent(pipeline.own(session)?),
                None => Held::Own(pipeline.new_session()),
            };
            sequences.push(Active {
                session,
                begun: false,
                tokens: prompt.to_vec(),
                computed: 0,
                sampler,
                detokenizer: Detokenizer::new(pipeline.tokenizer()).skip_special(options.skip_special),
                stops,
                statistics: Statistics {
                    prompt_tokens: prompt.len(),
                    ..Statistics::default()
                },
                first_token: None,
                finished: false,
            });
        }
        Ok(Self {
            pipeline,
            options: options.clone(),
            sequences,
            started: Instant::now(),
            observer: None,
        })
    }

    /// Runs one step; gives what happened, by sequence. Nothing happens once all are finished.
    fn step(&mut self) -> Result<Vec<(usize, Event)>> {
        let mut events = Vec::new();
        let stop_now = self.options.cancel.is_cancelled();
        for index in 0..self.sequences.len() {
            if stop_now {
                self.finish(index, FinishReason::Cancelled, &mut events)?;
            } else if self.options.max_tokens == Some(0) {
                self.finish(index, FinishReason::Length, &mut events)?;
            }
        }
        let chosen = self.choose_inputs()?;
        if chosen.is_empty() {
            return Ok(events);
        }
        let logits = self.forward(&chosen)?;
        for (row, (index, n)) in chosen.into_iter().enumerate() {
            let sequence = &mut self.sequences[index];
            let before = sequence.computed;
            sequence.computed = match self.options.use_cache {
                true => before + n,
                false => n,
            };
            if before < sequence.prompt() {
                events.push((
                    index,
                    Event::Prefill {
                        done: sequence.computed,
                        total: sequence.prompt(),
                    },
                ));
            }
            if sequence.computed == sequence.tokens.len() {
                let logits: Vec<f32> = logits.get(row)?.to_vec1()?;
                self.choose(index, &logits, &mut events)?;
            }
        }
        Ok(events)
    }

    /// Which sequences have how many tokens in the next pass.
    fn choose_inputs(&mut self) -> Result<Vec<(usize, usize)>> {
        let (mut chosen, mut budget) = (Vec::new(), self.options.prefill_chunk);
        for index in 0..self.sequences.len() {
            if self.sequences[index].finished {
                continue;
            }
            if !self.options.use_cache {
                let sequence = &mut self.sequences[index];
                sequence.session.get().reset();
                chosen.push((index, sequence.tokens.len()));
                continue;
            }
            if !self.sequences[index].begun {
                if self.waits(index) {
                    continue;
                }
                let sequence = &mut self.sequences[index];
                let cached = sequence.session.get().take_up(&sequence.tokens)?;
                (sequence.computed, sequence.statistics.cached_tokens) = (cached, cached);
                sequence.begun = true;
            }
            let sequence = &self.sequences[index];
            let waiting = sequence.tokens.len() - sequence.computed;
            if waiting > 1 && budget == 0 {
                continue; // This prompt's turn comes when those before it are done.
            }
            let n = waiting.min(budget.max(1));
            budget = budget.saturating_sub(n);
            chosen.push((index, n));
        }
        Ok(chosen)
    }

    /// Whether another sequence is about to compute what this one begins with, so that it need not.
    fn waits(&self, index: usize) -> bool {
        let prompt = &self.sequences[index].tokens;
        let Some((block, cached)) = self.pipeline.shared(prompt) else {
            return false;
        };
        let others = self
            .sequences
            .iter()
            .filter(|other| other.begun && !other.finished);
        others.into_iter().any(|other| {
            let common = common(&prompt[..prompt.len() - 1], &other.tokens);
            let whole = common - common % block;
            whole > cached && whole > other.computed
        })
    }

    /// Runs a pass over the next tokens of these sequences.
    fn forward(&mut self, chosen: &[(usize, usize)]) -> Result<Tensor> {
        let (pipeline, check) = (self.pipeline, self.options.check_finite);
        let mut inputs = Vec::with_capacity(chosen.len());
        for (index, n) in chosen {
            let sequence = &self.sequences[*index];
            let from = match self.options.use_cache {
                true => sequence.computed,
                false => 0,
            };
            inputs.push((sequence.session.id(), &sequence.tokens[from..from + n]));
        }
        let observer = &mut self.observer;
        let watched = check || observer.is_some();
        let mut watch = |site: Site, input: &Tensor, output: &Tensor| {
            if let Some(observer) = observer {
                observer(site, input, output)?;
            }
            match check {
                true => check_finite(site, input, output),
                false => Ok(()),
            }
        };
        let watch: &mut Observer<'_> = &mut watch;
        let watch = watched.then_some(watch);
        let logits = pipeline
            .model()
            .forward_cached(&mut pipeline.cache(), &inputs, Logits::Last, watch)?;
        for (index, n) in chosen {
            let sequence = &mut self.sequences[*index];
            let session = sequence.session.get();
            let from = session.tokens().len();
            session.extend(&sequence.tokens[from..from + n]);
        }
        Ok(logits)
    }

    /// Chooses a sequence's next token.
    fn choose(&mut self, index: usize, logits: &[f32], events: &mut Vec<(usize, Event)>) -> Result<()> {
        let sequence = &mut self.sequences[index];
        let history = History {
            tokens: &sequence.tokens,
            prompt: sequence.prompt(),
        };
        let sampled = sequence.sampler.sample(logits, history)?;
        if sequence.first_token.is_none() {
            let now = Instant::now();
            sequence.first_token = Some(now);
            sequence.statistics.prefill = now - self.started;
        }
        if self.pipeline.defaults().eos_token_id.contains(&sampled.id) {
            return self.finish(index, FinishReason::Stop, events);
        }
        sequence.tokens.push(sampled.id);
        sequence.statistics.generated_tokens += 1;
        let text = sequence.detokenizer.push(sampled.id)?.unwrap_or_default();
        let progress = sequence.stops.push(&text);
        let token = Event::Token {
            id: sampled.id,
            text: progress.emit,
            logprob: sampled.logprob,
            top: sampled.top,
        };
        events.push((index, token));
        let generated = sequence.statistics.generated_tokens;
        let full = sequence.tokens.len() > self.pipeline.model().config().max_position_embeddings;
        if progress.stopped {
            self.finish(index, FinishReason::Stop, events)
        } else if self.options.max_tokens.is_some_and(|max| generated >= max) || full {
            self.finish(index, FinishReason::Length, events)
        } else {
            Ok(())
        }
    }

    fn finish(&mut self, index: usize, reason: FinishReason, events: &mut Vec<(usize, Event)>) -> Result<()> {
        let sequence = &mut self.sequences[index];
        if std::mem::replace(&mut sequence.finished, true) {
            return Ok(());
        }
        let rest = sequence.detokenizer.finish()?;
        let progress = sequence.stops.push(&rest);
        let text = progress.emit + &sequence.stops.finish();
        if let Some(first) = sequence.first_token {
            sequence.statistics.decode = first.elapsed();
        }
        events.push((
            index,
            Event::Finished {
                reason,
                text,
                statistics: sequence.statistics,
            },
        ));
        Ok(())
    }
}

/// The events of one generation, as they happen; each is computed when it is asked for.
///
/// Ends after [`Event::Finished`] or the first error.
pub struct Generation<'a> {
    batch: Batch<'a>,
    ready: VecDeque<Event>,
    ended: bool,
}

impl<'a> Generation<'a> {
    pub(super) fn new(
        pipeline: &'a Pipeline,
        prompt: &[u32],
        options: &Options,
        session: Option<&'a mut Session>,
    ) -> Result<Self> {
        let batch = Batch::new(pipeline, &[prompt], options, session)?;
        Ok(Self {
            batch,
            ready: VecDeque::new(),
            ended: false,
        })
    }

    /// Lets `observer` see every op's result from now on; an error of it ends the generation. It is called within a pass,
    /// for which the pipeline's cache is taken: what it asks of the pipeline's cache or sessions would wait for ever.
    pub fn observe(mut self, observer: impl FnMut(Site, &Tensor, &Tensor) -> Result<()> + 'a) -> Self {
        self.batch.observer = Some(Box::new(observer));
        self
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.ended {
            match self.batch.step() {
                Ok(events) => {
                    self.ended = self.batch.sequences.iter().all(|sequence| sequence.finished);
                    self.ready.extend(events.into_iter().map(|(_, event)| event));
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

/// What a finished sequence of a batch came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The tokens generated.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
    /// How much was computed, and how fast.
    pub statistics: Statistics,
}

impl Pipeline {
    /// Continues several prompts of any lengths together: each weight is read once for all of them. Each
    /// gives what it gives alone, up to rounding. `on_event` sees events as they happen, with the prompt's
    /// index.
    ///
    /// # Errors
    /// As [`generate`](Self::generate), and what happens on the way.
    pub fn generate_batch(
        &self,
        prompts: &[&[u32]],
        options: &Options,
        mut on_event: impl FnMut(usize, &Event),
    ) -> Result<Vec<Output>> {
        let mut batch = Batch::new(self, prompts, options, None)?;
        let mut outputs: Vec<Option<Output>> = vec![None; prompts.len()];
        let mut partial: Vec<(Vec<u32>, String)> = vec![Default::default(); prompts.len()];
        while outputs.iter().any(Option::is_none) {
            for (index, event) in batch.step()? {
                on_event(index, &event);
                let (tokens, so_far) = &mut partial[index];
                match event {
                    Event::Prefill { .. } => {}
                    Event::Token { id, text, .. } => {
                        tokens.push(id);
                        so_far.push_str(&text);
                    }
                    Event::Finished {
                        reason,
                        text,
                        statistics,
                    } => {
                        so_far.push_str(&text);
                        let (tokens, text) = std::mem::take(&mut partial[index]);
                        outputs[index] = Some(Output {
                            tokens,
                            text,
                            reason,
                            statistics,
                        });
                    }
                }
            }
        }
        Ok(outputs.into_iter().flatten().collect())
    }
}
