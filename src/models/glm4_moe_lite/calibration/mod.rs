//! What the layers of a floating-point model see of a text.

mod gated;
mod moments;

use super::attention::{Attention, AttentionPath, Segment};
use super::config::{Config, Layer};
use super::experts::load_router;
use crate::checkpoint::{Checkpoint, LayerInputs, LoadOptions, Loader};
use crate::fp4::Feedback;
use crate::models::observe::{Site, Trace};
use crate::nn::{Embedding, RotaryEmbedding};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use gated::{Gated, Rows};
use moments::Moments;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Tokens that run together, whole windows of them but for longer ones.
const TOGETHER: usize = 4096;

/// The inputs that a checkpoint's linear layers have while its model reads a text, for
/// [`quantize_calibrated`](crate::checkpoint::quantize_calibrated).
///
/// The text's windows go through the model layer by layer, in floating point, and of each linear layer the second moments of
/// its inputs are summed; of an expert those of the tokens that were routed to it. One layer is run at a time: beside its
/// weights, which are mapped, two numbers (F32) a token and element of the residual stream are held in memory, `XᵀX` (F64) of
/// attention's inputs and of one expert's or MLP's, and what some thousand tokens need on their way. Of GLM-4.7-Flash 65,536 tokens
/// take 1.1 GB and the rest less than 3 GB, which its dense layer needs; layers with experts need 1 GB.
pub struct Calibration<'a> {
    checkpoint: &'a Checkpoint,
    config: Config,
    options: LoadOptions,
    rotary: RotaryEmbedding,
    windows: Vec<usize>,
    note: Value,
    /// The residual stream `[tokens, hidden]` before the layer that is next.
    hidden: Vec<f32>,
    next: usize,
    reached: Option<Reached>,
}

/// A layer whose attention has run.
struct Reached {
    prefix: String,
    /// By the linear layer; of those that read the same, by the first.
    attention: BTreeMap<&'static str, Inputs>,
    gated: Gated,
}

/// Of a linear layer.
enum Inputs {
    Summed(Moments),
    Known(Option<Feedback>),
}

impl<'a> Calibration<'a> {
    /// Begins to let the model of `checkpoint` read `windows` of tokens, each on its own; `name` says in `config.json` what
    /// text it was.
    ///
    /// # Errors
    /// [`Error::Argument`] for no tokens at all, [`Error::EmptyPrompt`] for an empty window, [`Error::ContextLength`] for one
    /// beyond the model's context, [`Error::TokenId`] for a token that the model does not know; [`Error::Tensor`] where the embedding
    /// is missing or malformed.
    pub fn new(checkpoint: &'a Checkpoint, config: Config, windows: &[Vec<u32>], name: &str) -> Result<Self> {
        let tokens: Vec<u32> = windows.concat();
        if tokens.is_empty() {
            let expected = "a text of at least one token";
            return Err(Error::argument("quantize", "calibrate", expected, "none"));
        }
        let limit = config.max_position_embeddings;
        for window in windows {
            match window.len() {
                0 => return Err(Error::EmptyPrompt),
                tokens if tokens > limit => return Err(Error::ContextLength { tokens, limit }),
                _ => {}
            }
        }
        let options = LoadOptions::default();
        let loader = Loader::new(checkpoint, &options, config.layers.len())?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Embedding::new(loader.kept_weight("model.embed_tokens", vocab, hidden)?);
        let embedded = embedding.forward(&tokens, &Device::Cpu)?;
        Ok(Self {
            checkpoint,
            rotary: RotaryEmbedding::new(config.qk_rope_head_dim, config.rope_theta, config.rope_pairing),
            note: json!({
                "text": name,
                "windows": windows.len(),
                "tokens": tokens.len(),
                "hash": format!("{:016x}", hash(windows)),
            }),
            windows: windows.iter().map(Vec::len).collect(),
            hidden: embedded.flatten_all()?.to_vec1()?,
            next: 0,
            reached: None,
            options,
            config,
        })
    }

    /// Runs the layers before layer `index`, and its attention.
    fn reach(&mut self, index: usize) -> Result<&mut Reached> {
        while self.next <= index {
            if let Some(done) = self.reached.take() {
                self.hidden = done.gated.finish()?;
            }
            self.reached = Some(self.attend(self.next)?);
            self.next += 1;
        }
        match &mut self.reached {
            Some(reached) if self.next == index + 1 => Ok(reached),
            _ => {
                let expected = format!("layers in the order of their numbers, {} or later", self.next - 1);
                let found = format!("layer {index}");
                Err(Error::argument("quantize", "calibrate", expected, found))
            }
        }
    }

    /// Runs attention of layer `index`; `hidden` goes over to what is reached.
    fn attend(&mut self, index: usize) -> Result<Reached> {
        let config = &self.config;
        let loader = Loader::new(self.checkpoint, &self.options, config.layers.len())?;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps);
        let prefix = format!("model.layers.{index}.");
        let name = |part: &str| format!("{prefix}{part}");
        let attention = Attention::load(&loader, &name("self_attn"), config)?;
        let before = loader.rms_norm(&name("input_layernorm"), width, eps)?;
        let after = loader.rms_norm(&name("post_attention_layernorm"), width, eps)?;
        let mut sums: BTreeMap<&'static str, Moments> = BTreeMap::new();
        let mut normed = Vec::with_capacity(self.hidden.len());
        let mut start = 0;
        for windows in together(&self.windows) {
            let (segments, positions) = segments(windows, config);
            let end = start + positions.len() * width;
            let stream = &mut self.hidden[start..end];
            let x = Tensor::from_slice(stream, (positions.len(), width), &Device::Cpu)?;
            let angles = self.rotary.angles(&positions, &Device::Cpu)?;
            let mut see = |site: Site, input: &Tensor, output: &Tensor| {
                let (module, x) = match site.op {
                    "q_proj" | "q_a_proj" => ("q_a_proj", input),
                    "q_b_proj" => ("q_b_proj", input),
                    "kv_a_layernorm" => ("kv_b_proj", output),
                    "o_proj" => ("o_proj", input),
                    _ => return Ok(()),
                };
                let k = x.dim(1)?;
                sums.entry(module).or_insert_with(|| Moments::new(k)).add(x)
            };
            let mut trace = Trace::new(Some(&mut see));
            let cached = |_: usize, rows: &Tensor| Ok(rows.contiguous()?);
            let y = attention.forward(&before.forward(&x)?, &angles, &segments, cached, &mut trace)?;
            let sum = (x + y)?;
            normed.extend(after.forward(&sum)?.flatten_all()?.to_vec1::<f32>()?);
            stream.copy_from_slice(&sum.flatten_all()?.to_vec1::<f32>()?);
            start = end;
        }
        let rows = Rows::new(normed, std::mem::take(&mut self.hidden), width);
        let gated = match config.layers[index] {
            Layer::Dense => Gated::dense(rows, &loader, name("mlp"), config)?,
            Layer::Sparse => {
                let router = load_router(&loader, &name("mlp"), config)?;
                Gated::sparse(rows, &loader, &name("mlp"), config, &router)?
            }
        };
        let attention = sums
            .into_iter()
            .map(|(module, moments)| (module, Inputs::Summed(moments)));
        Ok(Reached {
            attention: attention.collect(),
            prefix,
            gated,
        })
    }
}

impl LayerInputs for Calibration<'_> {
    fn note(&self) -> Value {
        self.note.clone()
    }

    fn feedback(&mut self, module: &str) -> Result<Option<&Feedback>> {
        let unknown = || Error::tensor(module, None, "expected a linear layer of this model's decoder");
        let layer = module
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'));
        let index: usize = layer
            .and_then(|(index, _)| index.parse().ok())
            .ok_or_else(unknown)?;
        if index >= self.config.layers.len() {
            // It predicts tokens after the next one, and reads what only its predecessor's output makes.
            return Ok(None);
        }
        let reached = self.reach(index)?;
        let part = module.strip_prefix(&reached.prefix).ok_or_else(unknown)?;
        let Some(linear) = part.strip_prefix("self_attn.") else {
            return reached.gated.feedback(module);
        };
        let key = match linear {
            "q_proj" | "kv_a_proj_with_mqa" => "q_a_proj",
            other => other,
        };
        let inputs = reached.attention.get_mut(key).ok_or_else(unknown)?;
        inputs.feedback(module)
    }
}

impl Inputs {
    fn feedback(&mut self, module: &str) -> Result<Option<&Feedback>> {
        if let Self::Summed(_) = self
            && let Self::Summed(moments) = std::mem::replace(self, Self::Known(None))
        {
            *self = Self::Known(moments.into_feedback(module)?);
        }
        match self {
            Self::Known(feedback) => Ok(feedback.as_ref()),
            Self::Summed(_) => Ok(None),
        }
    }
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

/// FNV-1a, 64 bits: the same in every release.
fn hash(windows: &[Vec<u32>]) -> u64 {
    let words = windows.iter().flat_map(|window| {
        let length = window.len() as u32;
        std::iter::once(length).chain(window.iter().copied())
    });
    let bytes = words.flat_map(u32::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
