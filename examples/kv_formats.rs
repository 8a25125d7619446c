//! What a cache's formats do to the output of attention: prints the table of docs/kv-cache.md.
//!
//! `cargo run --release --example kv_formats -- tests/data/demo-model` (a model of GLM-4.7-Flash's architecture with
//! weights in BF16 or F32; `heldout.json` beside it is the text).
//!
//! The measure is the normalised mean-square error of MLA's output against a cache in F32: of the latents that heads
//! mix, for synthetic rows, and of the heads' values, for a model's. Synthetic latents are 512 wide and normal, in
//! each channel with a scale of its own, and 8 channels have one 10 or 30 times larger. Queries and errors are in
//! each channel's scale, as if the projections on both sides made up for it fully, or as they are, as if those knew
//! nothing of it; a trained model is between the two.

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_mmfp4::fp4::{Format, ScaleRule, quantize};
use candle_mmfp4::generation::Pipeline;
use candle_mmfp4::kv::{CacheFormat, RowLayout, ScaleGroup, codec, hadamard};
use candle_mmfp4::models::Site;
use candle_mmfp4::models::glm4_moe_lite::{Config, Logits, Sequence};
use candle_mmfp4::nn::RotaryEmbedding;
use std::collections::HashMap;
use std::path::Path;

/// Tokens of the synthetic sequences, and of the model's.
const TOKENS: usize = 1024;
const OF_MODEL: usize = 256;
/// Texts that the model reads.
const TEXTS: usize = 6;
/// Queries of the synthetic sequences, all of which see all tokens.
const QUERIES: usize = 64;
const HEADS: usize = 20;

fn main() -> Result<()> {
    let folder = std::env::args()
        .nth(1)
        .context("usage: kv_formats MODEL_FOLDER")?;
    let mut cases = Vec::new();
    for (factor, balanced) in [
        (1.0, true),
        (10.0, true),
        (30.0, true),
        (10.0, false),
        (30.0, false),
    ] {
        let name = match balanced {
            true => format!("outliers × {factor}"),
            false => format!("outliers × {factor}, as they are"),
        };
        cases.push((name, vec![synthetic(factor, balanced)?]));
    }
    cases.push(("demo model".to_string(), of_model(Path::new(&folder))?));

    print!("| format | bytes a token |");
    cases.iter().for_each(|(name, _)| print!(" {name} |"));
    print!("\n|---|---|");
    cases.iter().for_each(|_| print!("---|"));
    println!();
    for (name, way) in ways() {
        let bytes = way
            .layout(512)
            .map_or("-".into(), |layout| layout.row_bytes().to_string());
        print!("| {name} | {bytes} |");
        for (_, layers) in &cases {
            let mut total = Vec::new();
            for layer in layers {
                match way.error(layer)? {
                    Some(error) => total.push(error),
                    None => break,
                }
            }
            match total.is_empty() {
                true => print!(" - |"),
                false => print!(" {:.2e} |", total.iter().sum::<f64>() / total.len() as f64),
            }
        }
        println!();
    }
    Ok(())
}

/// How the numbers of a latent are rounded; the rotary key's are to BF16.
enum Way {
    /// As a cache does, in blocks of a rotation of its own.
    Cache(CacheFormat, Option<usize>),
    /// FP8 whose largest magnitude a group is 448 exactly, instead of a power of two's multiple of at most that.
    Fp8Exactly,
    /// As weights are, each row a tensor.
    Weights(Format, ScaleRule),
}

fn ways() -> Vec<(String, Way)> {
    use ScaleGroup::{Sixteen, ThirtyTwo};
    let mut ways = Vec::new();
    for format in [CacheFormat::F16, CacheFormat::BF16, CacheFormat::Fp8] {
        ways.push((format.to_string(), Way::Cache(format, None)));
    }
    ways.push(("fp8, any F32 for a scale".into(), Way::Fp8Exactly));
    for (group, name) in [(Sixteen, "fp4, 16"), (ThirtyTwo, "fp4, 32")] {
        let format = CacheFormat::Fp4 { group, rotate: false };
        ways.push((name.into(), Way::Cache(format, None)));
        for block in [64, 128, 256, 512] {
            ways.push((
                format!("{name}, rotated by {block}"),
                Way::Cache(format, Some(block)),
            ));
        }
    }
    let e8m0 = Format::mxfp4();
    let e4m3 = Format::nvfp4();
    ways.push((
        "fp4, 32, E8M0 of the OCP".into(),
        Way::Weights(e8m0, ScaleRule::Maximum),
    ));
    ways.push((
        "fp4, 32, E8M0 searched".into(),
        Way::Weights(e8m0, ScaleRule::SquaredError),
    ));
    ways.push((
        "fp4, 16, E4M3 and a factor a token".into(),
        Way::Weights(e4m3, ScaleRule::Maximum),
    ));
    ways.push((
        "the same, searched".into(),
        Way::Weights(e4m3, ScaleRule::SquaredError),
    ));
    ways
}

impl Way {
    fn layout(&self, latent: usize) -> Option<RowLayout> {
        match self {
            Self::Cache(format, _) => RowLayout::latent(*format, latent, 64).ok(),
            _ => None,
        }
    }

    /// The latents as they come back, rotated back; `None` where the rotation is wider than they are.
    fn round(&self, rows: &[Vec<f32>]) -> Result<Option<Vec<Vec<f32>>>> {
        let mut all = Vec::new();
        for row in rows {
            let mut row = row.clone();
            let format = match self {
                Self::Weights(format, rule) => {
                    all.push(quantize("row", &row, (1, row.len()), *format, *rule)?.dequantize());
                    continue;
                }
                Self::Fp8Exactly => CacheFormat::Fp8,
                Self::Cache(format, _) => *format,
            };
            let layout = RowLayout::latent(format, row.len(), 0)?;
            let mut bytes = vec![0; layout.row_bytes()];
            let mut through = |row: &mut Vec<f32>| -> Result<()> {
                codec::write(&layout, row, &mut bytes, 0)?;
                Ok(codec::decode(&layout, &bytes, row)?)
            };
            match self {
                Self::Cache(_, Some(block)) if *block > row.len() => return Ok(None),
                Self::Cache(_, Some(block)) => {
                    hadamard::rotate(&mut row, *block)?;
                    through(&mut row)?;
                    hadamard::unrotate(&mut row, *block)?;
                }
                Self::Fp8Exactly => {
                    let factors: Vec<_> = row.chunks(128).map(to_448).collect();
                    let by = |row: &mut Vec<f32>, invert: bool| {
                        for (group, factor) in row.chunks_mut(128).zip(&factors) {
                            let factor = if invert { 1.0 / factor } else { *factor };
                            group.iter_mut().for_each(|x| *x *= factor);
                        }
                    };
                    by(&mut row, false);
                    through(&mut row)?;
                    by(&mut row, true);
                }
                _ => through(&mut row)?,
            }
            all.push(row);
        }
        Ok(Some(all))
    }

    fn error(&self, layer: &Layer) -> Result<Option<f64>> {
        let Some(latents) = self.round(&layer.latents)? else {
            return Ok(None);
        };
        let of_keys = match self {
            Self::Cache(CacheFormat::F16, _) => DType::F16,
            _ => DType::BF16,
        };
        let keys = layer.keys.to_dtype(of_keys)?.to_dtype(DType::F32)?;
        let exact = layer.output(&rows(&layer.latents)?, &layer.keys)?;
        let rounded = layer.output(&rows(&latents)?, &keys)?;
        let square =
            |x: Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?) };
        Ok(Some(square((rounded - &exact)?)? / square(exact)?))
    }
}

/// What takes a group's largest magnitude to 448 times a power of two.
fn to_448(group: &[f32]) -> f32 {
    let largest = group.iter().fold(0f32, |m, x| m.max(x.abs()));
    448.0 / largest * (largest / 448.0).log2().ceil().exp2()
}

/// What attention of one layer and sequence reads.
struct Layer {
    /// After the norm.
    latents: Vec<Vec<f32>>,
    /// After the rotation, `[tokens, rope]`.
    keys: Tensor,
    /// In latent space and scaled, `[heads, n, latent]`, and `[heads, n, rope]`.
    queries: Tensor,
    rotary: Tensor,
    /// What is added to the scores, `[n, tokens]`.
    mask: Tensor,
    /// From mixed latents to what is measured, `[heads or 1, latent, values]`.
    project: Tensor,
}

impl Layer {
    /// `latents` is `[tokens, latent]`.
    fn output(&self, latents: &Tensor, keys: &Tensor) -> Result<Tensor> {
        let scores = (self.queries.broadcast_matmul(&latents.t()?)?
            + self.rotary.broadcast_matmul(&keys.t()?)?)?
        .broadcast_add(&self.mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let mixed = weights.broadcast_matmul(latents)?;
        Ok(mixed.broadcast_matmul(&self.project)?)
    }
}

fn rows(rows: &[Vec<f32>]) -> Result<Tensor> {
    let shape = (rows.len(), rows[0].len());
    Ok(Tensor::from_vec(rows.concat(), shape, &Device::Cpu)?)
}

/// Normal numbers, the same in every run.
struct Normal(u64);

impl Normal {
    fn uniform(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f32 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), self.uniform());
        (radius * (angle * std::f64::consts::TAU).cos()) as f32
    }

    fn tensor(&mut self, shape: (usize, usize, usize), scale: f32) -> Result<Tensor> {
        let numbers = (0..shape.0 * shape.1 * shape.2).map(|_| self.next() * scale);
        Ok(Tensor::from_iter(numbers, &Device::Cpu)?.reshape(shape)?)
    }
}

/// Where `balanced`, queries and what is measured are in each channel's scale.
fn synthetic(factor: f32, balanced: bool) -> Result<Layer> {
    const LATENT: usize = 512;
    const ROPE: usize = 64;
    let mut normal = Normal(1);
    let mut scales: Vec<f32> = (0..LATENT).map(|_| (0.3 * normal.next()).exp()).collect();
    for i in 0..8 {
        // Neither neighbours nor in step with groups.
        scales[17 + i * 59] *= factor;
    }
    let latents = (0..TOKENS)
        .map(|_| scales.iter().map(|scale| scale * normal.next()).collect())
        .collect();
    let mean = (scales.iter().map(|scale| scale * scale).sum::<f32>() / LATENT as f32).sqrt();
    let inverse: Vec<f32> = scales
        .iter()
        .map(|scale| 1.0 / if balanced { *scale } else { mean })
        .collect();
    let inverse = Tensor::from_vec(inverse, LATENT, &Device::Cpu)?;
    // Scores with a standard deviation of 3, some of it from the rotary parts.
    let scale = 3.0 / ((LATENT + ROPE) as f32).sqrt();
    Ok(Layer {
        latents,
        keys: normal.tensor((1, TOKENS, ROPE), 1.0)?.squeeze(0)?,
        queries: normal
            .tensor((HEADS, QUERIES, LATENT), scale)?
            .broadcast_mul(&inverse)?,
        rotary: normal.tensor((HEADS, QUERIES, ROPE), scale)?,
        mask: Tensor::zeros((QUERIES, TOKENS), DType::F32, &Device::Cpu)?,
        project: Tensor::eye(LATENT, DType::F32, &Device::Cpu)?
            .broadcast_mul(&inverse)?
            .unsqueeze(0)?,
    })
}

/// All layers of a model, over some texts.
fn of_model(folder: &Path) -> Result<Vec<Layer>> {
    let (pipeline, _) = Pipeline::from_folder(folder, &Default::default(), &Device::Cpu)?;
    let model = pipeline.model();
    let texts: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(folder.join("heldout.json"))?)?;
    let files: Vec<_> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect();
    let mut weights = HashMap::new();
    for file in files {
        weights.extend(candle_core::safetensors::load(file, &Device::Cpu)?);
    }
    let mut layers = Vec::new();
    for text in texts.iter().filter_map(|text| text["text"].as_str()) {
        let tokens = pipeline.tokenizer().encode(text)?;
        if tokens.len() < OF_MODEL {
            continue;
        }
        let mut seen = HashMap::new();
        let mut observe = |site: Site, _: &Tensor, output: &Tensor| {
            if let Some(layer) = site.layer {
                seen.insert((layer, site.op), output.to_dtype(DType::F32)?);
            }
            Ok(())
        };
        let mut alone = [Sequence {
            tokens: &tokens[..OF_MODEL],
            position: 0,
            cache: None,
        }];
        model.forward_batch(&mut alone, Logits::Last, Some(&mut observe))?;
        for layer in 0..model.config().layers.len() {
            let name = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
            let kv_b = weights.get(&name).with_context(|| name.clone())?;
            layers.push(layer_of(
                model.config(),
                &seen,
                layer,
                &kv_b.to_dtype(DType::F32)?,
            )?);
        }
        if layers.len() == TEXTS * model.config().layers.len() {
            return Ok(layers);
        }
    }
    anyhow::bail!("fewer than {TEXTS} texts of {OF_MODEL} tokens")
}

fn layer_of(
    config: &Config,
    seen: &HashMap<(usize, &'static str), Tensor>,
    layer: usize,
    kv_b: &Tensor,
) -> Result<Layer> {
    let get = |op: &'static str| seen.get(&(layer, op)).context(op);
    let (heads, nope, rope) = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
    );
    let rotary = RotaryEmbedding::new(rope, config.rope_theta, config.rope_pairing);
    let angles = rotary.angles(&(0..OF_MODEL).collect::<Vec<_>>(), &Device::Cpu)?;
    let key = get("kv_a_proj_with_mqa")?.narrow(1, config.kv_lora_rank, rope)?;
    let keys = rotary.forward(&key.unsqueeze(1)?, &angles)?.squeeze(1)?;
    let query = get("q_b_proj")?.reshape((OF_MODEL, heads, nope + rope))?;
    let turned = rotary.forward(&query.narrow(2, nope, rope)?, &angles)?;
    let scale = 1.0 / ((nope + rope) as f64).sqrt();
    // Of each head the rows of its keys, then those of its values.
    let kv_b = kv_b.reshape((heads, nope + config.v_head_dim, config.kv_lora_rank))?;
    let of_keys = kv_b.narrow(1, 0, nope)?.contiguous()?;
    let of_values = kv_b.narrow(1, nope, config.v_head_dim)?.transpose(1, 2)?;
    let by_head = |x: Tensor| -> Result<Tensor> { Ok((x.transpose(0, 1)?.contiguous()? * scale)?) };
    let causal = (0..OF_MODEL * OF_MODEL).map(|i| match i % OF_MODEL > i / OF_MODEL {
        true => f32::NEG_INFINITY,
        false => 0.0,
    });
    Ok(Layer {
        latents: get("kv_a_layernorm")?.to_vec2()?,
        keys: keys.contiguous()?,
        queries: by_head(query.narrow(2, 0, nope)?)?.matmul(&of_keys)?,
        rotary: by_head(turned)?,
        mask: Tensor::from_iter(causal, &Device::Cpu)?.reshape((OF_MODEL, OF_MODEL))?,
        project: of_values.contiguous()?,
    })
}
