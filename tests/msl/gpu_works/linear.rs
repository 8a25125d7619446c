//! Products with a weight: attention's, the output head, and as many rows as experts have.

use super::record::Op;
use super::{BF16, DTYPES, EPS, FORMATS, HEADS, HIDDEN, LATENT, MMFP4, NOPE, Stored, zeros};
use candle_core::DType;
use candle_mmfp4::cpu::HeadRows;
use candle_mmfp4::fp4::FloatKind;
use candle_mmfp4::ops::{JoinedLinear, Linear, NormedLinear, Orientation, PerHead, RmsNorm};
use serde_json::{Value, json};

const LM_HEAD: (usize, usize) = (154_880, HIDDEN);
const Q_A: usize = 768;
const KV_A: usize = 576;
const Q_B: (usize, usize) = (5120, Q_A);
const O: (usize, usize) = (HIDDEN, 5120);
/// kv_b's rows of a head: those that take a query to the latent space, and those that take the latent to values.
const KEYS: HeadRows = HeadRows {
    heads: HEADS,
    stride: NOPE + 256,
    start: 0,
    len: NOPE,
};
const VALUES: HeadRows = HeadRows {
    start: NOPE,
    len: 256,
    ..KEYS
};

/// Weights in FP4.
pub fn fp4() -> Vec<Value> {
    let mut works = Vec::new();
    for stored in FORMATS {
        for dtype in DTYPES {
            // What moves 64 MB and more: lm_head, and as many rows as 64 experts have.
            for (name, shape) in [
                ("lm_head", LM_HEAD),
                ("gate and up, 64", (196_608, HIDDEN)),
                ("down, 64", (131_072, 1536)),
            ] {
                works.push(product(name, stored, dtype, 1, shape));
            }
            // As many rows as four experts have.
            works.push(product("gate and up, 4", stored, dtype, 1, (12_288, HIDDEN)));
            works.push(product("down, 4", stored, dtype, 1, (8192, 1536)));
            layer(&mut works, stored, dtype, 1);
            works.push(normed("q_a's norm and q_b", stored, dtype, 1, Q_B));
        }
    }
    for m in [2, 4, 8] {
        for dtype in DTYPES {
            works.push(product("lm_head", MMFP4, dtype, m, LM_HEAD));
            layer(&mut works, MMFP4, dtype, m);
            works.push(normed("q_a's norm and q_b", MMFP4, dtype, m, Q_B));
        }
    }
    // Prefill: right, not fast (no tensor cores).
    for m in [33, 128] {
        for dtype in DTYPES {
            for stored in FORMATS {
                both_ways(&mut works, stored, dtype, m);
                works.extend([
                    product("o", stored, dtype, m, O),
                    per_head("kv_b, values", stored, dtype, m, VALUES, Orientation::Ordinary),
                ]);
            }
        }
    }
    works
}

/// Weights that a checkpoint keeps in floating point.
pub fn dense() -> Vec<Value> {
    let mut works = Vec::new();
    for dtype in DTYPES {
        works.push(product("lm_head", BF16, dtype, 1, LM_HEAD));
        layer(&mut works, BF16, dtype, 1);
        for m in [2, 4, 8, 33, 128] {
            both_ways(&mut works, BF16, dtype, m);
        }
        for m in [2, 4, 8] {
            works.push(merged(BF16, dtype, m));
        }
        for kind in [FloatKind::F16, FloatKind::F32] {
            both_ways(&mut works, Stored::Dense(kind), dtype, 1);
            both_ways(&mut works, Stored::Dense(kind), dtype, 33);
            works.push(merged(Stored::Dense(kind), dtype, 1));
        }
    }
    works
}

fn both_ways(works: &mut Vec<Value>, stored: Stored, dtype: DType, m: usize) {
    works.extend([
        product("q_b", stored, dtype, m, Q_B),
        per_head("kv_b, queries", stored, dtype, m, KEYS, Orientation::Transposed),
    ]);
}

/// Splits of attention over 8,192 tokens.
const SPLITS: usize = 27;

/// MLA's values, of parts of attention.
fn merged(stored: Stored, dtype: DType, m: usize) -> Value {
    let HeadRows {
        heads,
        stride,
        start,
        len,
    } = VALUES;
    let op = PerHead::new(
        stored.weight((heads * stride, LATENT)),
        VALUES,
        Orientation::Ordinary,
    )
    .unwrap();
    let [parts, stats] = [LATENT, 2].map(|last| zeros(&[m, heads, SPLITS, last], DType::F32));
    Op::new("kv_b, values of parts", "merged", dtype, m)
        .weights(stored, 1)
        .roles(&["parts", "stats", "y"])
        .meta(json!({
            "k": LATENT, "heads": heads, "stride": stride, "start": start, "len": len, "splits": SPLITS,
        }))
        .record(|| Ok(op.forward_merged(&parts, &stats, dtype)?))
}

/// The products of a layer's attention.
fn layer(works: &mut Vec<Value>, stored: Stored, dtype: DType, m: usize) {
    works.extend([
        joined("q_a and kv_a", stored, dtype, m, [Q_A, KV_A], HIDDEN),
        product("q_b", stored, dtype, m, Q_B),
        product("o", stored, dtype, m, O),
        per_head("kv_b, queries", stored, dtype, m, KEYS, Orientation::Transposed),
        per_head("kv_b, values", stored, dtype, m, VALUES, Orientation::Ordinary),
        merged(stored, dtype, m),
    ]);
}

fn product(name: &str, stored: Stored, dtype: DType, m: usize, (n, k): (usize, usize)) -> Value {
    let op = Linear::new(stored.weight((n, k)), None).unwrap();
    let x = zeros(&[m, k], dtype);
    Op::new(name, "linear", dtype, m)
        .weights(stored, 1)
        .roles(&["x", "y"])
        .meta(json!({"k": k, "n": [n]}))
        .record(|| op.forward(&x))
}

fn joined(name: &str, stored: Stored, dtype: DType, m: usize, n: [usize; 2], k: usize) -> Value {
    let part = |n| Linear::new(stored.weight((n, k)), None).unwrap();
    let op = JoinedLinear::new(n.map(part).into()).unwrap();
    let x = zeros(&[m, k], dtype);
    Op::new(name, "linear", dtype, m)
        .weights(stored, 2)
        .roles(&["x", "y"])
        .meta(json!({"k": k, "n": n}))
        .record(|| op.forward(&x))
}

fn normed(name: &str, stored: Stored, dtype: DType, m: usize, (n, k): (usize, usize)) -> Value {
    let linear = Linear::new(stored.weight((n, k)), None).unwrap();
    let op = NormedLinear::new(RmsNorm::new(vec![1.0; k], EPS).unwrap(), linear).unwrap();
    let x = zeros(&[m, k], dtype);
    Op::new(name, "linear", dtype, m)
        .weights(stored, 1)
        .roles(&["norm", "x", "y"])
        .meta(json!({"k": k, "n": [n], "eps": EPS}))
        .record(|| op.forward(&x))
}

fn per_head(
    name: &str,
    stored: Stored,
    dtype: DType,
    m: usize,
    rows: HeadRows,
    orientation: Orientation,
) -> Value {
    let HeadRows {
        heads,
        stride,
        start,
        len,
    } = rows;
    let op = PerHead::new(stored.weight((heads * stride, LATENT)), rows, orientation).unwrap();
    let transposed = orientation == Orientation::Transposed;
    let x = zeros(&[m, heads, if transposed { len } else { LATENT }], dtype);
    Op::new(name, "per_head", dtype, m)
        .weights(stored, 1)
        .roles(&["x", "y"])
        .meta(json!({
            "k": LATENT, "heads": heads, "stride": stride, "start": start, "len": len, "transposed": transposed,
        }))
        .record(|| op.forward(&x))
}
