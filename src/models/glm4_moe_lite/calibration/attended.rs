//! The first half of a layer: attention, whose linear layers are rounded one after the other.

use super::moments::Moments;
use super::weights::Weights;
use super::{Calibration, Streams};
use crate::Result;
use crate::checkpoint::Loader;
use crate::models::glm4_moe_lite::Config;
use crate::models::glm4_moe_lite::attention::{Attention, AttentionPath, Segment};
use crate::models::observe::{Site, Trace};
use crate::nn::{Angles, RotaryEmbedding};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// Tokens that run together, whole windows of them but for longer ones.
const TOGETHER: usize = 4096;

/// Windows that run together, each alone.
struct Batch {
    /// Of all tokens.
    tokens: Range<usize>,
    segments: Vec<Segment>,
    angles: Angles,
}

impl Calibration<'_> {
    /// Runs attention of layer `index` and has its weights rounded. The residual streams then are those in the middle of the layer;
    /// gives what the layer's second half reads.
    pub(super) fn attend(&mut self, index: usize, weights: &mut Weights<'_>) -> Result<Streams> {
        let config = &self.config;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps);
        let layer = format!("model.layers.{index}");
        let loader = Loader::new(self.checkpoint, &self.options, config.layers.len())?;
        let before = loader.rms_norm(&format!("{layer}.input_layernorm"), width, eps)?;
        let after = loader.rms_norm(&format!("{layer}.post_attention_layernorm"), width, eps)?;
        let prefix = format!("{layer}.self_attn");
        let name = |part: &str| format!("{prefix}.{part}");
        let load = |weights: &Weights<'_>| {
            let loader = Loader::new(self.checkpoint, &self.options, config.layers.len())?;
            Attention::load(&loader.replacing(&weights.rounded), &prefix, config)
        };
        let original = Attention::load(&loader, &prefix, config)?;
        let batches = batches(&self.windows, config, &self.rotary)?;
        let streams = &mut self.streams;
        let rows = |stream: &[f32], batch: &Batch| {
            let rows = &stream[batch.tokens.start * width..batch.tokens.end * width];
            Ok::<_, crate::Error>(Tensor::from_slice(
                rows,
                (batch.tokens.len(), width),
                &Device::Cpu,
            )?)
        };
        let inputs = |streams: &Streams, batch: &Batch| -> Result<[Tensor; 2]> {
            let [x, z] = [&streams.original, &streams.quantized].map(|stream| rows(stream, batch));
            Ok([before.forward(&x?)?, before.forward(&z?)?])
        };

        // What queries and latents are made of, from the layer's input.
        let query = match config.q_lora_rank {
            Some(_) => "q_a_proj",
            None => "q_proj",
        };
        let modules = [name(query), name("kv_a_proj_with_mqa")];
        let mut moments = Moments::new(width);
        if weights.are_open(&modules) {
            for batch in &batches {
                let [x, z] = inputs(streams, batch)?;
                moments.add(&x, &z)?;
            }
        }
        weights.round(&modules, moments)?;

        // What they become, behind those.
        let modules = [name("kv_b_proj"), name("q_b_proj")];
        let mut latent = Moments::new(config.kv_lora_rank);
        let mut low_rank = config.q_lora_rank.map(Moments::new);
        if weights.are_open(&modules) {
            let quantized = load(weights)?;
            for batch in &batches {
                let [x, z] = inputs(streams, batch)?;
                let (x, z) = (original.low_rank_inputs(&x)?, quantized.low_rank_inputs(&z)?);
                latent.add(&x.latent, &z.latent)?;
                if let (Some(moments), Some(x), Some(z)) = (&mut low_rank, x.query, z.query) {
                    moments.add(&x, &z)?;
                }
            }
        }
        weights.round(&modules[..1], latent)?;
        if let Some(moments) = low_rank {
            weights.round(&modules[1..], moments)?;
        }

        // What attention's results become, behind all of these. The original model is through here.
        let modules = [name("o_proj")];
        let mut moments = Moments::new(config.num_attention_heads * config.v_head_dim);
        let quantized = match weights.are_open(&modules) {
            true => Some(load(weights)?),
            false => None,
        };
        for batch in &batches {
            let [x, z] = inputs(streams, batch)?;
            let (mixed, y) = run(&original, &x, batch)?;
            if let Some(quantized) = &quantized {
                moments.add(&mixed, &run(quantized, &z, batch)?.0)?;
            }
            let start = batch.tokens.start * width;
            add(&mut streams.original[start..], &y)?;
        }
        weights.round(&modules, moments)?;

        // The quantised one, now that it is whole.
        let quantized = load(weights)?;
        let mut read = Streams::with_capacity(streams.original.len());
        for batch in &batches {
            let start = batch.tokens.start * width;
            let z = before.forward(&rows(&streams.quantized, batch)?)?;
            add(&mut streams.quantized[start..], &run(&quantized, &z, batch)?.1)?;
            for (stream, read) in [
                (&streams.original, &mut read.original),
                (&streams.quantized, &mut read.quantized),
            ] {
                let normed = after.forward(&rows(stream, batch)?)?;
                read.extend(normed.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        Ok(read)
    }
}

/// What `o_proj` reads of inputs, and what it gives.
fn run(attention: &Attention, x: &Tensor, batch: &Batch) -> Result<(Tensor, Tensor)> {
    let mut mixed = None;
    let mut see = |site: Site, input: &Tensor, _: &Tensor| {
        if site.op == "o_proj" {
            mixed = Some(input.clone());
        }
        Ok(())
    };
    let mut trace = Trace::new(Some(&mut see));
    let cached = |_: usize, rows: &Tensor| Ok(rows.contiguous()?);
    let y = attention.forward(x, &batch.angles, &batch.segments, cached, &mut trace)?;
    let mixed = mixed.ok_or_else(|| crate::Error::tensor("o_proj", None, "attention without it"))?;
    Ok((mixed, y))
}

/// Adds to the first rows of a residual stream.
fn add(stream: &mut [f32], y: &Tensor) -> Result<()> {
    for (sum, value) in stream.iter_mut().zip(y.flatten_all()?.to_vec1::<f32>()?) {
        *sum += value;
    }
    Ok(())
}

fn batches(windows: &[usize], config: &Config, rotary: &RotaryEmbedding) -> Result<Vec<Batch>> {
    let mut start = 0;
    let batches = together(windows).map(|windows| {
        let (segments, positions) = segments(windows, config);
        let tokens = start..start + positions.len();
        start = tokens.end;
        Ok(Batch {
            tokens,
            segments,
            angles: rotary.angles(&positions, &Device::Cpu)?,
        })
    });
    batches.collect()
}

/// Windows that run together.
fn together(windows: &[usize]) -> impl Iterator<Item = &[usize]> {
    let mut rest = windows;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = |window: &&usize| {
            tokens += **window;
            tokens <= TOGETHER
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (taken, left) = rest.split_at_checked(count)?;
        rest = left;
        Some(taken)
    })
}

/// Of windows that run together, each alone.
fn segments(windows: &[usize], config: &Config) -> (Vec<Segment>, Vec<usize>) {
    let (mut segments, mut positions) = (Vec::with_capacity(windows.len()), Vec::new());
    for &n in windows {
        segments.push(Segment {
            start: positions.len(),
            n,
            position: 0,
            path: AttentionPath::Auto.decide(config, n, n),
        });
        positions.extend(0..n);
    }
    (segments, positions)
}
