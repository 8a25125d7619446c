//! What a pass reads of a model's weights.

use super::config::Config;
use crate::fp4::Weight;

/// Bytes of a model's weights, by what reads them.
#[derive(Debug, Clone, Default)]
pub(super) struct Reads {
    /// Whatever the tokens are: projections, MLPs, shared experts, routers, norms, output head.
    pub always: usize,
    /// Of each layer's routed experts, all of them together.
    pub experts: Vec<usize>,
    /// How many routed experts a layer has.
    pub of: usize,
    /// How many of them a token chooses.
    pub top_k: usize,
    /// A row of the embedding.
    pub row: usize,
}

impl Reads {
    /// Of a model without weights but the embedding.
    pub fn of_model(config: &Config, embedding: &Weight) -> Self {
        Self {
            of: config.n_routed_experts,
            top_k: config.num_experts_per_tok,
            row: embedding.size_in_bytes() / embedding.shape().0,
            ..Self::default()
        }
    }

    /// Bytes that a pass over so many tokens reads at least, each weight once: experts as many as the tokens choose if no two
    /// choose alike, up to all of them, and a row of the embedding a token.
    pub fn of_tokens(&self, tokens: usize) -> u64 {
        let chosen = tokens.saturating_mul(self.top_k).min(self.of);
        // A checkpoint may keep some experts in floating point: their mean counts.
        let routed = self.experts.iter().map(|all| all * chosen / self.of.max(1));
        (self.row * tokens + self.always + routed.sum::<usize>()) as u64
    }
}
