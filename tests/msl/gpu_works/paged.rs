//! Attention over a paged cache, and its tokens as numbers.

use super::record::Op;
use super::{DTYPES, F16, HEADS, LATENT, ROPE, zeros};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::PagedSequence;
use candle_mmfp4::kv::{CacheFormat, Encoding, RowKind, RowLayout, ScaleGroup};
use candle_mmfp4::ops::{PagedAttention, PagedBatch, gather_paged};
use serde_json::{Value, json};

const FORMATS: [CacheFormat; 5] = [
    CacheFormat::BF16,
    CacheFormat::F16,
    CacheFormat::Fp8,
    CacheFormat::fp4(),
    CacheFormat::Fp4 {
        group: ScaleGroup::ThirtyTwo,
        rotate: true,
    },
];
/// Tokens in the cache.
const DEEP: usize = 4096;

pub fn works() -> Vec<Value> {
    let mut works = Vec::new();
    for format in FORMATS {
        let glm = RowLayout::latent(format, LATENT, ROPE).unwrap();
        let grouped = RowLayout::heads(format, 8, 128, 128).unwrap();
        for dtype in DTYPES {
            works.push(attention(&glm, HEADS, dtype, 1, DEEP));
            works.push(attention(&grouped, 32, dtype, 1, DEEP));
            works.push(gather(&glm, dtype));
        }
        works.push(attention(&glm, HEADS, F16, 1, 200));
        works.push(attention(&glm, HEADS, F16, 33, 1025));
        works.push(attention(&grouped, 32, F16, 33, 1025));
        works.push(gather(&grouped, F16));
    }
    // The other shares of heads, and widths.
    for dtype in DTYPES {
        let layout = |kv_heads, width| RowLayout::heads(CacheFormat::BF16, kv_heads, width, width).unwrap();
        works.push(attention(&layout(16, 64), 16, dtype, 1, DEEP));
        works.push(attention(&layout(8, 128), 64, dtype, 1, DEEP));
        works.push(attention(&layout(16, 256), 16, dtype, 1, DEEP));
        works.push(attention(&layout(4, 256), 16, dtype, 1, DEEP));
        let demo = RowLayout::latent(CacheFormat::BF16, 128, 32).unwrap();
        works.push(attention(&demo, 4, dtype, 1, DEEP));
    }
    works
}

/// A pool, and the batch of a sequence of `len` tokens, of which `m` are new.
fn pool_and_batch(layout: &RowLayout, m: usize, len: usize) -> (Tensor, PagedBatch) {
    let blocks = len.div_ceil(layout.block_tokens());
    // In no order: by a step that shares no factor with them.
    let table: Vec<_> = (0..blocks).map(|i| ((i * 7919 + 5) % blocks) as u32).collect();
    let sequence = PagedSequence {
        table: &table,
        len,
        queries: m,
    };
    let batch = PagedBatch::new(&[sequence], layout.block_tokens(), &Device::Cpu).unwrap();
    (zeros(&[layout.pool_bytes(blocks).unwrap()], DType::U8), batch)
}

fn op(name: &str, op: &'static str, layout: &RowLayout, dtype: DType, m: usize) -> Op {
    let parts: Vec<_> = layout
        .parts()
        .iter()
        .map(|part| {
            let encoding = match part.encoding {
                Encoding::F16 => "f16",
                Encoding::BF16 => "bf16",
                Encoding::Fp8 => "fp8",
                Encoding::Fp4 { .. } => "fp4",
            };
            let group = match part.encoding {
                Encoding::Fp4 { group } => group,
                _ => 128,
            };
            let rotary = matches!(layout.kind(), RowKind::Latent { .. }) && part.codes > 0;
            let rotation = layout.rotation(part.width).filter(|_| !rotary);
            json!([
                encoding,
                group,
                rotation,
                part.width,
                part.codes,
                part.code_stride,
                part.scales,
                part.scale_stride
            ])
        })
        .collect();
    let kind = match layout.kind() {
        RowKind::Latent { .. } => json!(0),
        RowKind::Heads { kv_heads, .. } => json!(kv_heads),
    };
    Op::new(&format!("{name}, {}", layout.format()), op, dtype, m).meta(
        json!({"parts": parts, "block": [layout.block_tokens(), layout.block_bytes()], "kv_heads": kind}),
    )
}

fn attention(layout: &RowLayout, heads: usize, dtype: DType, m: usize, len: usize) -> Value {
    let (name, roles, widths) = match layout.kind() {
        RowKind::Latent { latent, rope } => (
            format!("paged attention, {heads} heads over latents of {latent}"),
            vec!["queries", "rotary", "pool", "index", "y"],
            vec![latent, rope],
        ),
        RowKind::Heads {
            kv_heads, key_dim, ..
        } => (
            format!("paged attention, {heads} heads over {kv_heads} of {key_dim}"),
            vec!["queries", "pool", "index", "y"],
            vec![key_dim],
        ),
    };
    let scale = 1.0 / (widths.iter().sum::<usize>() as f32).sqrt();
    let queries: Vec<_> = widths
        .iter()
        .map(|width| zeros(&[m, heads, *width], dtype))
        .collect();
    let attend = PagedAttention::new(layout.clone(), heads, scale, None).unwrap();
    op(
        &format!("{name}, {len} tokens"),
        "paged_attention",
        layout,
        dtype,
        m,
    )
    .roles(&roles)
    .meta(json!({"heads": heads, "scale": scale}))
    .record(|| {
        let (pool, batch) = pool_and_batch(layout, m, len);
        let parts: Vec<_> = queries.iter().collect();
        Ok(attend.forward(&parts, &pool, &batch)?)
    })
}

fn gather(layout: &RowLayout, dtype: DType) -> Value {
    let name = match layout.kind() {
        RowKind::Latent { .. } => "tokens of latents gathered",
        RowKind::Heads { .. } => "tokens of heads gathered",
    };
    op(name, "gather_paged", layout, dtype, 1)
        .roles(&["pool", "index", "y"])
        .meta(json!({"positions": [5, DEEP]}))
        .record(|| {
            let (pool, batch) = pool_and_batch(layout, 1, DEEP);
            Ok(gather_paged(layout, &pool, &batch, 0, 5..DEEP, dtype)?)
        })
}
