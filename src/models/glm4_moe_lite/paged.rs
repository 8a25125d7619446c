//! Attention of a pass over a paged cache.

use super::attention::{Attention, AttentionPath, Segment, scale};
use super::config::Config;
use crate::Result;
use crate::cpu::PagedSequence;
use crate::models::observe::Trace;
use crate::nn::{Angles, PagedKvCache, Pairing};
use crate::ops::{AppendLatents, PagedAttention, PagedBatch, gather_paged};
use candle_core::{D, Tensor};

/// What all layers of a pass share.
pub(super) struct PagedPass<'a> {
    cache: &'a PagedKvCache,
    attend: PagedAttention,
    pairing: Pairing,
    /// The sequences of the cache's batch, in its order.
    segments: Vec<Segment>,
    /// Those that are attended to as latents, where others are not.
    absorbed: Option<PagedBatch>,
}

impl<'a> PagedPass<'a> {
    /// Of the pass that the cache has begun.
    pub fn new(config: &Config, path: AttentionPath, cache: &'a PagedKvCache) -> Result<Self> {
        let (mut segments, mut absorbed, mut start) = (Vec::new(), Vec::new(), 0);
        for sequence in cache.pass() {
            let n = sequence.tokens.len();
            let len = sequence.position + n;
            // A prompt is one decision, whichever part of it this is.
            let (work, end) = match &sequence.prompt {
                Some(prompt) => (prompt.len(), prompt.end.max(len)),
                None => (n, len),
            };
            let path = path.decide(config, work, end);
            if path == AttentionPath::Absorbed {
                absorbed.push(PagedSequence {
                    table: sequence.table,
                    len,
                    queries: n,
                });
            }
            segments.push(Segment {
                start,
                n,
                position: sequence.position,
                path,
            });
            start += n;
        }
        let layout = cache.layout();
        let absorbed = match absorbed.is_empty() || absorbed.len() == segments.len() {
            true => None,
            false => Some(PagedBatch::new(&absorbed, layout.block_tokens(), cache.device())?),
        };
        Ok(Self {
            cache,
            attend: PagedAttention::new(layout.clone(), config.num_attention_heads, scale(config), None)?,
            pairing: config.rope_pairing,
            segments,
            absorbed,
        })
    }

    /// The sequences' shares of the pass.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    fn absorbing(&self) -> impl Iterator<Item = &Segment> {
        let absorbs = |segment: &&Segment| segment.path == AttentionPath::Absorbed;
        self.segments.iter().filter(absorbs)
    }

    /// The rows of a pass's tensor that belong to the sequences that absorb.
    fn of_absorbing(&self, x: &Tensor) -> Result<Tensor> {
        if self.absorbed.is_none() {
            return Ok(x.clone());
        }
        let parts = self
            .absorbing()
            .map(|segment| x.narrow(0, segment.start, segment.n));
        Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}

impl Attention {
    /// As [`forward`](Self::forward), over the sequences of a pass: its tokens are appended first, and what is attended to
    /// is what the cache holds of them and of those before.
    pub fn forward_paged(
        &self,
        x: &Tensor,
        angles: &Angles,
        pass: &PagedPass<'_>,
        layer: usize,
        trace: &mut Trace<'_, '_>,
    ) -> Result<Tensor> {
        let projected = self.project(x, trace)?;
        let (query, kv) = (&projected.query, &projected.kv);
        let (layout, pool) = (pass.cache.layout(), pass.cache.pool(layer)?);
        let append = AppendLatents::new(self.rows.norm().clone(), pass.pairing, layout.clone())?;
        let nope = query.narrow(D::Minus1, 0, self.nope)?;
        let rope = query.narrow(D::Minus1, self.nope, self.rope)?;
        let (cos, sin) = (angles.cos(), angles.sin());
        let rope = append.forward_with_queries(pool, kv, &rope, cos, sin, pass.cache.batch())?;
        let rope = trace.see("kv_append", kv, rope)?;

        let absorbed = match pass.absorbing().next() {
            None => None,
            Some(_) => Some(self.absorbed_paged(&nope, &rope, pool, pass)?),
        };
        let attended = match (absorbed, &pass.absorbed) {
            (Some(all), None) => all,
            (absorbed, _) => {
                let mut taken = 0;
                let mut outputs = Vec::with_capacity(pass.segments.len());
                for (index, segment) in pass.segments.iter().enumerate() {
                    let rows = |x: &Tensor| x.narrow(0, segment.start, segment.n);
                    outputs.push(match (&absorbed, segment.path) {
                        (Some(absorbed), AttentionPath::Absorbed) => {
                            taken += segment.n;
                            absorbed.narrow(0, taken - segment.n, segment.n)?
                        }
                        _ => {
                            let all = 0..segment.position + segment.n;
                            let held =
                                gather_paged(layout, pool, pass.cache.batch(), index, all, kv.dtype())?;
                            self.materialised(&rows(&nope)?, &rows(&rope)?, &held, segment.position)?
                        }
                    });
                }
                Tensor::cat(&outputs, 0)?
            }
        };
        self.project_out(query, attended, trace)
    }

    /// Attends over the latents of all sequences that absorb: `[their tokens, H · value]`.
    fn absorbed_paged(
        &self,
        nope: &Tensor,
        rope: &Tensor,
        pool: &Tensor,
        pass: &PagedPass<'_>,
    ) -> Result<Tensor> {
        let (nope, rope) = (pass.of_absorbing(nope)?, pass.of_absorbing(rope)?);
        let batch = pass.absorbed.as_ref().unwrap_or(pass.cache.batch());
        let query = self.kv_b.absorb_query.forward(&nope)?;
        let values = pass
            .attend
            .forward_expanded(&[&query, &rope], pool, batch, &self.kv_b.expand_value)?;
        Ok(values.reshape((nope.dim(0)?, self.heads * self.value))?)
    }
}
