//! The second half of a layer: gated MLPs, each run over the tokens that it really sees.

use super::moments::Moments;
use super::weights::Weights;
use super::{Calibration, Streams};
use crate::Result;
use crate::checkpoint::Loader;
use crate::models::glm4_moe_lite::config::Layer;
use crate::models::glm4_moe_lite::experts::load_router;
use crate::nn::{MmfP4Linear, Router};
use candle_core::{Device, Module, Tensor};

/// Tokens that run together.
const TOGETHER: usize = 4096;

/// A token that an MLP sees.
#[derive(Clone, Copy)]
struct Token {
    row: usize,
    /// What its output is multiplied by.
    weight: f32,
}

/// `down(silu(gate x) · up x)`.
struct Mlp {
    gate: MmfP4Linear,
    up: MmfP4Linear,
    down: MmfP4Linear,
}

impl Calibration<'_> {
    /// Runs the MLPs of layer `index`, which read `read`, and has their weights rounded. The residual streams then are those behind
    /// the layer.
    pub(super) fn transform(&mut self, index: usize, read: Streams, weights: &mut Weights<'_>) -> Result<()> {
        let config = &self.config;
        let name = format!("model.layers.{index}.mlp");
        let tokens = self.windows.iter().sum();
        let every = || (0..tokens).map(|row| Token { row, weight: 1.0 }).collect();
        let inner = config.moe_intermediate_size;
        match config.layers[index] {
            Layer::Dense => {
                let inner = config.intermediate_size;
                self.run(&name, inner, &read, [every(), every()], weights)
            }
            Layer::Sparse => {
                let loader = Loader::new(self.checkpoint, &self.options, config.layers.len())?;
                let router = load_router(&loader, &name, config)?;
                let shared = config.n_shared_experts;
                let original = self.route(&router, &read.original)?;
                let quantized = self.route(&router, &read.quantized)?;
                for (id, tokens) in original.into_iter().zip(quantized).enumerate() {
                    let name = format!("{name}.experts.{id}");
                    self.run(&name, inner, &read, [tokens.0, tokens.1], weights)?;
                }
                if shared > 0 {
                    let name = format!("{name}.shared_experts");
                    self.run(&name, inner * shared, &read, [every(), every()], weights)?;
                }
                Ok(())
            }
        }
    }

    /// The tokens of each expert.
    fn route(&self, router: &Router, rows: &[f32]) -> Result<Vec<Vec<Token>>> {
        let mut chosen = vec![Vec::new(); self.config.n_routed_experts];
        let width = self.config.hidden_size;
        let mut row = 0;
        for rows in rows.chunks(TOGETHER * width) {
            let x = Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu)?;
            let routed = router.forward(&x)?;
            let (ids, weights) = (routed.ids.to_vec2::<u32>()?, routed.weights.to_vec2::<f32>()?);
            for (ids, weights) in ids.iter().zip(&weights) {
                for (id, &weight) in ids.iter().zip(weights) {
                    chosen[*id as usize].push(Token { row, weight });
                }
                row += 1;
            }
        }
        Ok(chosen)
    }

    /// Has an MLP's weights rounded by the tokens that it sees in the quantised model, and adds to each residual stream what it gives
    /// for the tokens that it sees there, those of the original model first.
    fn run(
        &mut self,
        name: &str,
        inner: usize,
        read: &Streams,
        tokens: [Vec<Token>; 2],
        weights: &mut Weights<'_>,
    ) -> Result<()> {
        let width = self.config.hidden_size;
        let part = |part: &str| format!("{name}.{part}");
        let load = |weights: &Weights<'_>| -> Result<Mlp> {
            let loader = Loader::new(self.checkpoint, &self.options, self.config.layers.len())?;
            let loader = loader.replacing(&weights.rounded);
            Ok(Mlp {
                gate: loader.linear(&part("gate_proj"), inner, width, false)?,
                up: loader.linear(&part("up_proj"), inner, width, false)?,
                down: loader.linear(&part("down_proj"), width, inner, false)?,
            })
        };
        let original = load(weights)?;
        // Of the same tokens in both models.
        let seen = || tokens[1].chunks(TOGETHER);

        let modules = [part("gate_proj"), part("up_proj")];
        let mut moments = Moments::new(width);
        if weights.are_open(&modules) {
            for tokens in seen() {
                let x = rows(&read.original, tokens, width)?;
                let z = rows(&read.quantized, tokens, width)?;
                moments.add(&x, &z)?;
            }
        }
        weights.round(&modules, moments)?;

        let modules = [part("down_proj")];
        let mut moments = Moments::new(inner);
        if weights.are_open(&modules) {
            let quantized = load(weights)?;
            for tokens in seen() {
                let x = original.inner(&rows(&read.original, tokens, width)?)?;
                let z = quantized.inner(&rows(&read.quantized, tokens, width)?)?;
                moments.add(&x, &z)?;
            }
        }
        weights.round(&modules, moments)?;

        let quantized = load(weights)?;
        let [of_original, of_quantized] = tokens;
        let streams = &mut self.streams;
        original.add(&read.original, &of_original, &mut streams.original, width)?;
        quantized.add(&read.quantized, &of_quantized, &mut streams.quantized, width)
    }
}

impl Mlp {
    /// What `down` reads.
    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        Ok((self.gate.forward(x)?.silu()? * self.up.forward(x)?)?)
    }

    /// Adds to a residual stream what tokens that read `read` give.
    fn add(&self, read: &[f32], tokens: &[Token], stream: &mut [f32], width: usize) -> Result<()> {
        for tokens in tokens.chunks(TOGETHER) {
            let y = self.down.forward(&self.inner(&rows(read, tokens, width)?)?)?;
            let y = y.flatten_all()?.to_vec1::<f32>()?;
            for (token, output) in tokens.iter().zip(y.chunks_exact(width)) {
                let sums = &mut stream[token.row * width..][..width];
                for (sum, value) in sums.iter_mut().zip(output) {
                    *sum += token.weight * value;
                }
            }
        }
        Ok(())
    }
}

/// Some tokens' inputs, `[tokens, width]`.
fn rows(read: &[f32], tokens: &[Token], width: usize) -> Result<Tensor> {
    let rows = tokens
        .iter()
        .flat_map(|token| &read[token.row * width..][..width]);
    let rows: Vec<f32> = rows.copied().collect();
    Ok(Tensor::from_vec(rows, (tokens.len(), width), &Device::Cpu)?)
}
