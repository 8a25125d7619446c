//! Norms, RoPE, sums, and what attention keeps of a token.

use super::record::Op;
use super::{DTYPES, EPS, HEADS, HIDDEN, LATENT, NOPE, ROPE, zeros};
use candle_core::{DType, Tensor};
use candle_mmfp4::cpu::Pairing;
use candle_mmfp4::ops::{Add, LatentRows, RmsNorm, Rope, add_norm};
use serde_json::{Value, json};

pub fn works() -> Vec<Value> {
    let mut works = Vec::new();
    for dtype in DTYPES {
        for m in [1, 128] {
            works.extend([norm(dtype, m), added(dtype, m), sum(dtype, m)]);
            works.extend([rope(dtype, m), rows(dtype, m), rows_and_queries(dtype, m)]);
        }
    }
    works
}

pub fn norm_of(d: usize) -> RmsNorm {
    RmsNorm::new(vec![1.0; d], EPS).unwrap()
}

fn norm(dtype: DType, m: usize) -> Value {
    let (op, x) = (norm_of(HIDDEN), zeros(&[m, HIDDEN], dtype));
    Op::new("RMS norm", "rms_norm", dtype, m)
        .roles(&["norm", "x", "y"])
        .meta(json!({"eps": EPS}))
        .lies("x", &x)
        .record(|| op.forward(&x))
}

fn added(dtype: DType, m: usize) -> Value {
    let op = norm_of(HIDDEN);
    let [x, delta] = [zeros(&[m, HIDDEN], dtype), zeros(&[m, HIDDEN], dtype)];
    Op::new("sum and its norm", "add_norm", dtype, m)
        .roles(&["norm", "x", "delta", "y", "y.1"])
        .meta(json!({"eps": EPS}))
        .lies("x", &x)
        .lies("delta", &delta)
        .record(|| add_norm(&x, &delta, &op))
}

fn sum(dtype: DType, m: usize) -> Value {
    let [x, delta] = [zeros(&[m, HIDDEN], dtype), zeros(&[m, HIDDEN], dtype)];
    Op::new("sum", "add", dtype, m)
        .roles(&["x", "delta", "y"])
        .lies("x", &x)
        .lies("delta", &delta)
        .record(|| Add.forward(&x, &delta))
}

/// The rotary parts of queries, where they lie behind the others.
pub fn queries(dtype: DType, m: usize) -> Tensor {
    zeros(&[m, HEADS, NOPE + ROPE], dtype)
        .narrow(2, NOPE, ROPE)
        .unwrap()
}

/// Latents and rotary keys, where they lie behind q_a's output.
pub fn kv(dtype: DType, m: usize) -> Tensor {
    zeros(&[m, 768 + LATENT + ROPE], dtype)
        .narrow(1, 768, LATENT + ROPE)
        .unwrap()
}

pub fn angles(m: usize) -> [Tensor; 2] {
    [
        zeros(&[m, ROPE / 2], DType::F32),
        zeros(&[m, ROPE / 2], DType::F32),
    ]
}

fn rope(dtype: DType, m: usize) -> Value {
    let (queries, [cos, sin]) = (queries(dtype, m), angles(m));
    Op::new("RoPE", "rope", dtype, m)
        .roles(&["queries", "cos", "sin", "y"])
        .lies("queries", &queries)
        .record(|| Rope::new(Pairing::Interleaved).forward(&queries, &cos, &sin))
}

fn rows(dtype: DType, m: usize) -> Value {
    let op = LatentRows::new(norm_of(LATENT), Pairing::Interleaved);
    let (kv, [cos, sin]) = (kv(dtype, m), angles(m));
    Op::new("latent rows", "latent_rows", dtype, m)
        .roles(&["norm", "kv", "cos", "sin", "y"])
        .meta(json!({"eps": EPS, "latent": LATENT}))
        .lies("kv", &kv)
        .record(|| op.forward(&kv, &cos, &sin))
}

fn rows_and_queries(dtype: DType, m: usize) -> Value {
    let op = LatentRows::new(norm_of(LATENT), Pairing::Interleaved);
    let (kv, queries, [cos, sin]) = (kv(dtype, m), queries(dtype, m), angles(m));
    Op::new("latent rows and queries", "latent_rows", dtype, m)
        .roles(&["norm", "kv", "cos", "sin", "queries", "y", "y.1"])
        .meta(json!({"eps": EPS, "latent": LATENT}))
        .lies("kv", &kv)
        .lies("queries", &queries)
        .record(|| op.forward_with_queries(&kv, &queries, &cos, &sin))
}
