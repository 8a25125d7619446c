//! New tokens into a paged cache.

use super::norm_rope::{angles, kv, norm_of, queries};
use super::record::Op;
use super::{DTYPES, EPS, LATENT, ROPE, zeros};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{PagedSequence, Pairing};
use candle_mmfp4::kv::{CacheFormat, Encoding, RowLayout};
use candle_mmfp4::ops::{AppendHeads, AppendLatents, PagedBatch};
use serde_json::{Value, json};

/// Heads of keys and values, as wide as Llama's.
const KV_HEADS: usize = 8;
const HEAD: usize = 128;

pub fn works() -> Vec<Value> {
    let mut works = Vec::new();
    for dtype in DTYPES {
        for m in [1, 128] {
            for format in CacheFormat::ALL {
                works.extend([latents(dtype, m, format), heads(dtype, m, format)]);
            }
        }
    }
    works
}

/// A pool, and tokens in blocks from the last one on: the first half of one sequence, the others of a second one.
fn pool_and_batch(layout: &RowLayout, m: usize) -> (Tensor, PagedBatch) {
    let (first, tokens) = (m.div_ceil(2), layout.block_tokens());
    let blocks = (first + 7).div_ceil(tokens) + (m - first).div_ceil(tokens);
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let (table, second) = table.split_at((first + 7).div_ceil(tokens));
    let of = |table, len, queries| PagedSequence { table, len, queries };
    let sequences = [of(table, 7 + first, first), of(second, m - first, m - first)];
    let batch = PagedBatch::new(&sequences, tokens, &Device::Cpu).unwrap();
    (zeros(&[layout.pool_bytes(blocks).unwrap()], DType::U8), batch)
}

/// What a reference has to know of the pool.
fn meta(layout: &RowLayout, outputs: &[&str]) -> Value {
    let parts = layout.parts().iter().map(|part| {
        json!({
            "width": part.width,
            "codes": part.codes,
            "code_stride": part.code_stride,
            "scales": part.scales,
            "scale_stride": part.scale_stride,
            // A rotary key is not rotated, as wide as a block or not.
            "rotation": match part.encoding {
                Encoding::F16 | Encoding::BF16 => 1,
                _ => layout.rotation(part.width).unwrap_or(1),
            },
        })
    });
    json!({
        "cache": layout.format().to_string(),
        "block_bytes": layout.block_bytes(),
        "block_tokens": layout.block_tokens(),
        "parts": parts.collect::<Vec<_>>(),
        "outputs": outputs,
    })
}

fn latents(dtype: DType, m: usize, format: CacheFormat) -> Value {
    let layout = RowLayout::latent(format, LATENT, ROPE).unwrap();
    let op = AppendLatents::new(norm_of(LATENT), Pairing::Interleaved, layout.clone()).unwrap();
    let (kv, queries, [cos, sin]) = (kv(dtype, m), queries(dtype, m), angles(m));
    Op::new(&format!("append latents, {format}"), "append_latents", dtype, m)
        .roles(&["norm", "kv", "cos", "sin", "index", "queries", "y.pool", "y"])
        .meta(json!({"eps": EPS, "latent": LATENT}))
        // What is on the border between two codes may go either way.
        .meta(meta(&layout, &["most bytes", dtype.as_str()]))
        .lies("kv", &kv)
        .lies("queries", &queries)
        .record(|| {
            let (pool, batch) = pool_and_batch(&layout, m);
            op.forward_with_queries(&pool, &kv, &queries, &cos, &sin, &batch)
        })
}

fn heads(dtype: DType, m: usize, format: CacheFormat) -> Value {
    let layout = RowLayout::heads(format, KV_HEADS, HEAD, HEAD).unwrap();
    let op = AppendHeads::new(layout.clone()).unwrap();
    let [keys, values] = [(); 2].map(|()| zeros(&[m, KV_HEADS, HEAD], dtype));
    Op::new(&format!("append heads, {format}"), "append_heads", dtype, m)
        .roles(&["x.keys", "x.values", "index", "y.pool"])
        .meta(json!({"heads": KV_HEADS}))
        .meta(meta(&layout, &["bytes"]))
        .record(|| {
            let (pool, batch) = pool_and_batch(&layout, m);
            op.forward(&pool, &keys, &values, &batch)
        })
}
