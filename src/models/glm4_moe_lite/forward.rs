//! A pass of the model: over caches of single sequences, or over a paged cache of many.

use super::attention::{Attention, AttentionPath, Segment};
use super::decoder::Model;
use super::paged::PagedPass;
use crate::cpu::Executor;
use crate::kv::SequenceId;
use crate::models::observe::{Observer, Trace};
use crate::nn::{Angles, PagedKvCache, TokenCache};
use crate::{Error, Result, ops};
use candle_core::{DType, Module, Tensor};

/// For which tokens logits are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Each sequence's last: `[sequences, vocabulary]`.
    Last,
    /// All: `[tokens of all sequences, vocabulary]`.
    All,
}

/// One sequence's share of a forward pass over contiguous caches.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// The new tokens, at least one.
    pub tokens: &'a [u32],
    /// Where the first of them stands: 0 for a new sequence, or the number of tokens cached.
    pub position: usize,
    /// What earlier passes left; `None` computes from the tokens alone, which must then begin at 0.
    pub cache: Option<&'a mut TokenCache>,
}

/// The tokens of a pass, of all sequences.
#[derive(Default)]
struct Tokens {
    ids: Vec<u32>,
    positions: Vec<usize>,
}

impl Tokens {
    /// Adds a sequence's.
    fn add(&mut self, ids: &[u32], position: usize, limit: usize) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let total = position.saturating_add(ids.len());
        if total > limit {
            return Err(Error::ContextLength { tokens: total, limit });
        }
        self.ids.extend_from_slice(ids);
        self.positions.extend(position..total);
        Ok(())
    }
}

impl Model {
    /// Runs `tokens` of one sequence from `position` on and adds them to `cache`; gives logits
    /// `[1 or tokens, vocabulary]`, F32.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TokenId`], [`Error::Position`], [`Error::ContextLength`]; the cache is
    /// then as it was.
    pub fn forward(
        &self,
        tokens: &[u32],
        position: usize,
        cache: &mut TokenCache,
        logits: Logits,
    ) -> Result<Tensor> {
        self.forward_batch(
            &mut [Sequence {
                tokens,
                position,
                cache: Some(cache),
            }],
            logits,
            None,
        )
    }

    /// Runs several sequences in one pass, each at its own position and with its own cache: weights are read
    /// once for all. There is no padding. An `observer` sees every op's result.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); all caches are then as they were.
    pub fn forward_batch(
        &self,
        sequences: &mut [Sequence<'_>],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Tensor> {
        let (mut tokens, mut segments) = (Tokens::default(), Vec::with_capacity(sequences.len()));
        for sequence in sequences.iter() {
            let (n, position) = (sequence.tokens.len(), sequence.position);
            if sequence.cache.is_none() && position != 0 {
                return Err(Error::Position { position, cached: 0 });
            }
            let start = tokens.ids.len();
            tokens.add(sequence.tokens, position, self.config.max_position_embeddings)?;
            if let Some(cache) = &sequence.cache {
                // Before any cache begins, which at position 0 forgets what it holds.
                cache.check(position, n)?;
            }
            segments.push(Segment {
                start,
                n,
                position,
                path: self.path.decide(&self.config, n, position + n),
            });
        }
        let mut trace = Trace::new(observer);
        let pass = || self.batch_pass(sequences, &tokens, &segments, logits, &mut trace);
        on_kernels(self.is_form_forced(), pass)
    }

    fn batch_pass(
        &self,
        sequences: &mut [Sequence<'_>],
        tokens: &Tokens,
        segments: &[Segment],
        logits: Logits,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let x = self.embed(tokens, trace)?;
        for sequence in sequences.iter_mut() {
            if let Some(cache) = &mut sequence.cache {
                cache.begin(sequence.position, sequence.tokens.len())?;
            }
        }
        let attend = |layer: usize, attention: &Attention, x: &Tensor, angles: &Angles, trace: &mut _| {
            let cached = |segment: usize, rows: &Tensor| match &mut sequences[segment].cache {
                Some(cache) => cache.append(layer, rows),
                None => Ok(rows.contiguous()?),
            };
            attention.forward(x, angles, segments, cached, trace)
        };
        let logits = self.layers(x, tokens, segments, logits, attend, trace)?;
        for sequence in sequences.iter_mut() {
            if let Some(cache) = &mut sequence.cache {
                cache.commit();
            }
        }
        Ok(logits)
    }

    /// Runs new tokens of sequences of a paged cache in one pass, each behind what the cache holds of it, and adds them to
    /// it: weights are read once for all. There is no padding. An `observer` sees every op's result. Gives logits
    /// `[sequences, vocabulary]` or `[tokens of all, vocabulary]`, F32.
    ///
    /// What a token's key and value are is what the cache holds of it, also for the pass that computes it. A prompt that the
    /// cache knows, because a sequence was [started](PagedKvCache::start) with it or it was
    /// [announced](PagedKvCache::announce), has one form of attention: so its logits, and what is cached of it, are the
    /// same bits on the CPU however passes cut it, and whatever else they bring. Of tokens that nobody announced each pass
    /// takes the form that costs it less; unless it is [forced](Self::set_attention_path), numbers then differ by rounding.
    ///
    /// ```
    /// use candle_core::Device;
    /// use candle_mmfp4::kv::CacheFormat;
    /// use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
    /// use candle_mmfp4::nn::CacheSize;
    ///
    /// let (model, _) = Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
    /// let mut cache = model.new_paged_cache(CacheFormat::Fp8, CacheSize::Tokens(1024))?;
    /// let prompts: [Vec<u32>; 2] = [(1..40).collect(), (1..30).collect()];
    /// let (first, _) = cache.start(&prompts[0]);
    /// model.forward_paged(&mut cache, &[(first, &prompts[0])], Logits::Last, None)?;
    /// // The second begins as the first did: 16 of its tokens are there, and both go on in one pass.
    /// let (second, cached) = cache.start(&prompts[1]);
    /// let next: [(_, &[u32]); 2] = [(first, &[7]), (second, &prompts[1][cached..])];
    /// let logits = model.forward_paged(&mut cache, &next, Logits::Last, None)?;
    /// assert_eq!((cached, logits.dims()), (16, [2, 4096].as_slice()));
    /// # Ok::<(), candle_mmfp4::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TokenId`], [`Error::ContextLength`], [`Error::OutOfBlocks`]; [`Error::Argument`]
    /// for a sequence that is not there or is there twice, and a cache of another model's rows. All sequences are then as
    /// they were.
    pub fn forward_paged(
        &self,
        cache: &mut PagedKvCache,
        sequences: &[(SequenceId, &[u32])],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Tensor> {
        let mut tokens = Tokens::default();
        for (id, new) in sequences {
            tokens.add(new, cache.len(*id)?, self.config.max_position_embeddings)?;
        }
        let mut trace = Trace::new(observer);
        let x = self.embed(&tokens, &mut trace)?;
        cache.begin(sequences)?;
        let prompts = cache.pass().any(|sequence| sequence.prompt.is_some());
        let pass = || self.paged_pass(x, &tokens, cache, logits, &mut trace);
        let passed = on_kernels(prompts || self.is_form_forced(), pass);
        match passed.is_ok() {
            true => cache.commit(),
            false => cache.forget(),
        }
        passed
    }

    fn is_form_forced(&self) -> bool {
        self.path != AttentionPath::Auto
    }

    fn paged_pass(
        &self,
        x: Tensor,
        tokens: &Tokens,
        cache: &PagedKvCache,
        logits: Logits,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let pass = PagedPass::new(&self.config, self.path, cache)?;
        let attend = |layer: usize, attention: &Attention, x: &Tensor, angles: &Angles, trace: &mut _| {
            attention.forward_paged(x, angles, &pass, layer, trace)
        };
        self.layers(x, tokens, pass.segments(), logits, attend, trace)
    }

    fn embed(&self, tokens: &Tokens, trace: &mut Trace<'_, '_>) -> Result<Tensor> {
        if tokens.ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let embedded = self
            .embedding
            .forward(&tokens.ids, &self.device)?
            .to_dtype(self.dtype)?;
        trace.see("embed_tokens", &embedded, embedded.clone())
    }

    /// From embeddings to logits; `attend` is a layer's attention.
    fn layers<'a, 'b>(
        &self,
        mut x: Tensor,
        tokens: &Tokens,
        segments: &[Segment],
        logits: Logits,
        mut attend: impl FnMut(usize, &Attention, &Tensor, &Angles, &mut Trace<'a, 'b>) -> Result<Tensor>,
        trace: &mut Trace<'a, 'b>,
    ) -> Result<Tensor> {
        let angles = self.rotary.angles(&tokens.positions, &self.device)?;
        // Each sum of the residual stream is made with the norm that follows it: one pass over it, and one dispatch.
        let first = self.layers.first().map_or(&self.norm, |layer| &layer.input_norm);
        let mut normed = first.forward(&x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            trace.enter(Some(index));
            let input = x;
            let attention_input = trace.see("input_layernorm", &input, normed)?;
            let attended = attend(index, &layer.attention, &attention_input, &angles, trace)?;
            let (middle, experts_input) = ops::add_norm(&input, &attended, &layer.post_attention_norm)?;
            let experts_input = trace.see("post_attention_layernorm", &middle, experts_input)?;
            let mixed = layer.feed_forward.forward(&experts_input, trace)?;
            let next = self
                .layers
                .get(index + 1)
                .map_or(&self.norm, |layer| &layer.input_norm);
            let (output, next_normed) = ops::add_norm(&middle, &mixed, next)?;
            x = trace.see("layer", &input, output)?;
            normed = next_normed;
        }
        trace.enter(None);

        if logits == Logits::Last {
            let last: Vec<_> = segments.iter().map(|s| (s.start + s.n - 1) as u32).collect();
            let last = Tensor::new(last, &self.device)?;
            (x, normed) = (x.index_select(&last, 0)?, normed.index_select(&last, 0)?);
        }
        let normed = trace.see("norm", &x, normed)?;
        let logits = self.head.forward(&normed)?.to_dtype(DType::F32)?;
        trace.see("lm_head", &normed, logits)
    }
}

/// Runs a pass: where its kernels are to be uniform, on those that sum in one order for any number of rows, so that its
/// numbers depend on nothing but a sequence's tokens and the form of attention.
fn on_kernels<R>(uniform: bool, pass: impl FnOnce() -> Result<R>) -> Result<R> {
    match uniform {
        true => Executor::current()?.uniform().install(pass),
        false => pass(),
    }
}
