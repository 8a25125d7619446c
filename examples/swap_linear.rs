//! A Llama-style block as one writes it with candle_nn, and the same block in FP4: what the swap takes, what
//! it costs and what it saves.
//!
//! `cargo run --release --example swap_linear`
//!
//! In code that names its layers, the swap is the `use` line:
//!
//! ```ignore
//! use candle_nn::{Linear, linear_no_bias};                              // before
//! use candle_mmfp4::nn::{MmfP4Linear as Linear, linear_no_bias};        // after
//! ```
//!
//! Here the block is generic over its layer instead, so that both can run side by side.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_mmfp4::fp4::{Weight, validate};
use candle_mmfp4::nn::{Mask, MmfP4Linear};
use candle_nn::{RmsNorm, VarBuilder, VarMap, ops::softmax_last_dim, rms_norm, rotary_emb::rope};

const HIDDEN: usize = 512;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD: usize = HIDDEN / HEADS;
const MLP: usize = 1408;

struct Block<L> {
    attention_norm: RmsNorm,
    q: L,
    k: L,
    v: L,
    o: L,
    mlp_norm: RmsNorm,
    gate: L,
    up: L,
    down: L,
}

impl<L: Module> Block<L> {
    fn new(linear_no_bias: fn(usize, usize, VarBuilder) -> Result<L>, vb: VarBuilder) -> Result<Self> {
        let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        Ok(Self {
            attention_norm: rms_norm(HIDDEN, 1e-5, vb.pp("input_layernorm"))?,
            q: linear_no_bias(HIDDEN, HEADS * HEAD, attention.pp("q_proj"))?,
            k: linear_no_bias(HIDDEN, KV_HEADS * HEAD, attention.pp("k_proj"))?,
            v: linear_no_bias(HIDDEN, KV_HEADS * HEAD, attention.pp("v_proj"))?,
            o: linear_no_bias(HEADS * HEAD, HIDDEN, attention.pp("o_proj"))?,
            mlp_norm: rms_norm(HIDDEN, 1e-5, vb.pp("post_attention_layernorm"))?,
            gate: linear_no_bias(HIDDEN, MLP, mlp.pp("gate_proj"))?,
            up: linear_no_bias(HIDDEN, MLP, mlp.pp("up_proj"))?,
            down: linear_no_bias(MLP, HIDDEN, mlp.pp("down_proj"))?,
        })
    }

    /// `[batch, tokens, HIDDEN]` to the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.attention_norm.forward(x)?)?)?;
        let normed = self.mlp_norm.forward(&x)?;
        let gated = (self.gate.forward(&normed)?.silu()? * self.up.forward(&normed)?)?;
        x + self.down.forward(&gated)?
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let by_head = |x: Tensor, heads| {
            x.reshape((batch, tokens, heads, HEAD))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (cos, sin) = rotary_angles(tokens, x.device())?;
        let q = rope(&by_head(self.q.forward(x)?, HEADS)?, &cos, &sin)?;
        let k = rope(&by_head(self.k.forward(x)?, KV_HEADS)?, &cos, &sin)?;
        let v = by_head(self.v.forward(x)?, KV_HEADS)?;

        // Several query heads share a head of keys and values.
        let shared = (batch, KV_HEADS, HEADS / KV_HEADS * tokens, HEAD);
        let scores = (q.reshape(shared)?.matmul(&k.t()?)? / (HEAD as f64).sqrt())?;
        let scores = scores.reshape((batch, HEADS, tokens, tokens))?;
        let mask = Mask::causal().tensor(0..tokens, 0..tokens, x.dtype(), x.device())?;
        let weights = softmax_last_dim(&scores.broadcast_add(&mask)?)?;
        let mixed = weights.reshape((batch, KV_HEADS, (), tokens))?.matmul(&v)?;
        let mixed = mixed.reshape((batch, HEADS, tokens, HEAD))?.transpose(1, 2)?;
        self.o.forward(&mixed.reshape((batch, tokens, HIDDEN))?)
    }

    fn linears(&self) -> [&L; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }
}

fn rotary_angles(tokens: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let frequencies: Vec<f32> = (0..HEAD / 2)
        .map(|i| 10_000f32.powf(-2.0 * i as f32 / HEAD as f32))
        .collect();
    let positions = Tensor::arange(0, tokens as u32, device)?
        .to_dtype(DType::F32)?
        .unsqueeze(1)?;
    let angles = positions.matmul(&Tensor::from_vec(frequencies, (1, HEAD / 2), device)?)?;
    Ok((angles.cos()?, angles.sin()?))
}

fn main() -> anyhow::Result<()> {
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let dense: Block<candle_nn::Linear> = Block::new(candle_nn::linear_no_bias, vb.clone())?;
    let fp4: Block<MmfP4Linear> = Block::new(candle_mmfp4::nn::linear_no_bias, vb)?; // the swap

    let x = Tensor::randn(0f32, 1f32, (1, 64, HIDDEN), &Device::Cpu)?;
    let (exact, rounded) = (dense.forward(&x)?, fp4.forward(&x)?);
    // Of what the block adds to its input, which itself passes by untouched.
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f32::sqrt);
    let error = norm(&(&exact - &rounded)?)? / norm(&(&exact - &x)?)?;

    let (mut in_bf16, mut in_fp4, mut worst) = (0, 0, 0f64);
    for (dense, packed) in dense.linears().into_iter().zip(fp4.linears()) {
        let values = dense.weight().flatten_all()?.to_vec1::<f32>()?;
        in_bf16 += 2 * values.len();
        in_fp4 += packed.weight().size_in_bytes();
        if let Weight::Fp4(packed) = packed.weight() {
            worst = worst.max(validate(&values, packed)?.relative_rmse);
        }
    }
    println!(
        "a layer's weights are at most {:.1} % off (relative RMSE)",
        100.0 * worst
    );
    println!(
        "what the block adds is {:.1} % off (relative RMSE, random weights)",
        100.0 * error
    );
    let (bf16, fp4) = (in_bf16 as f64 / 1024.0, in_fp4 as f64 / 1024.0);
    println!(
        "{bf16:.0} KiB in BF16 became {fp4:.0} KiB, {:.2} times less",
        bf16 / fp4
    );
    Ok(())
}
