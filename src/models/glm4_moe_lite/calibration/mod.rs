//! What the layers of a floating-point model see of a text, and what they see of it once the layers before them are quantised.

mod attended;
mod gated;
mod moments;
mod weights;

use super::config::Config;
use crate::checkpoint::{Checkpoint, LayerInputs, LoadOptions, Loader, Rounding};
use crate::cpu::Arithmetic;
use crate::nn::{Embedding, RotaryEmbedding};
use crate::{Error, Result};
use candle_core::Device;
use serde_json::{Value, json};
use weights::Weights;

/// What `config.json` says of how weights are rounded: an interrupted run of another method begins anew.
const METHOD: &str = "GPTAQ, natural order, static groups";

/// What is added to the squares of inputs, beside their mean: more than the 0.01 of GPTQ's authors, as an expert sees few tokens;
/// 0.03 gave the same divergence (docs/quantize.md).
const DAMPING: f64 = 0.1;

/// The inputs that a checkpoint's linear layers have while its model reads a text, for
/// [`quantize_calibrated`](crate::checkpoint::quantize_calibrated).
///
/// The text's windows go layer by layer through two models: the original one, and the one that has been quantised so far, whose
/// linear layers are rounded one after the other, each with the inputs that it has behind those before it. It is to give what the
/// original gives for the inputs that it has there ([`Feedback`](crate::fp4::Feedback)). Of an expert the tokens count that the
/// quantised model routes to it. Both compute in floating point.
///
/// One layer is run at a time: beside the original's weights, which are mapped, and what they have become, four numbers (F32) a
/// token and element of the residual stream are held in memory, for a linear layer with K inputs up to 24·K² bytes (two sums in
/// F64, and on the way to them two copies of a product in F32), and what some thousand tokens need on their way.
pub struct Calibration<'a> {
    checkpoint: &'a Checkpoint,
    config: Config,
    options: LoadOptions,
    rotary: RotaryEmbedding,
    windows: Vec<usize>,
    note: Value,
    /// The residual streams `[tokens, hidden]` before the layer that is next.
    streams: Streams,
    next: usize,
}

/// The same of all tokens, `[tokens, hidden]`, in the original model and in the quantised one.
struct Streams {
    original: Vec<f32>,
    quantized: Vec<f32>,
}

impl Streams {
    fn with_capacity(len: usize) -> Self {
        Self {
            original: Vec::with_capacity(len),
            quantized: Vec::with_capacity(len),
        }
    }
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
        let options = LoadOptions {
            arithmetic: Arithmetic::Exact,
            ..LoadOptions::default()
        };
        let loader = Loader::new(checkpoint, &options, config.layers.len())?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Embedding::new(loader.kept_weight("model.embed_tokens", vocab, hidden)?);
        let embedded: Vec<f32> = embedding
            .forward(&tokens, &Device::Cpu)?
            .flatten_all()?
            .to_vec1()?;
        Ok(Self {
            checkpoint,
            rotary: RotaryEmbedding::new(config.qk_rope_head_dim, config.rope_theta, config.rope_pairing),
            note: json!({
                "method": METHOD,
                "damping": DAMPING,
                "text": name,
                "windows": windows.len(),
                "tokens": tokens.len(),
                "hash": format!("{:016x}", hash(windows)),
            }),
            windows: windows.iter().map(Vec::len).collect(),
            streams: Streams {
                original: embedded.clone(),
                quantized: embedded,
            },
            next: 0,
            options,
            config,
        })
    }
}

impl LayerInputs for Calibration<'_> {
    fn note(&self) -> Value {
        self.note.clone()
    }

    fn layers(&self) -> usize {
        self.config.layers.len()
    }

    fn round_layer(&mut self, index: usize, rounding: &mut dyn Rounding) -> Result<()> {
        if index != self.next || index >= self.layers() {
            let expected = format!("each of {} layers once, layer {} now", self.layers(), self.next);
            let found = format!("layer {index}");
            return Err(Error::argument("quantize", "calibrate", expected, found));
        }
        let mut weights = Weights::new(rounding);
        let read = self.attend(index, &mut weights)?;
        self.transform(index, read, &mut weights)?;
        self.next += 1;
        Ok(())
    }
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
