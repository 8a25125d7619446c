//! Experts, the dense MLP of the first layer, and the router.

use super::record::Op;
use super::{BF16, DTYPES, F16, FORMATS, HIDDEN, MMFP4, Stored, zeros};
use candle_core::DType;
use candle_mmfp4::cpu::{Expert, Routing};
use candle_mmfp4::fp4::FloatKind;
use candle_mmfp4::ops::{FusedMoe, GatedMlp, Linear, Route, Router};
use serde_json::{Value, json};

const EXPERTS: usize = 64;
const TOP_K: usize = 4;
const WIDTH: usize = 1536;
const DENSE_WIDTH: usize = 10_240;

pub fn works() -> Vec<Value> {
    let mut works = Vec::new();
    for stored in FORMATS {
        let (moe, mlp) = (mixture_of(stored), gated(stored));
        let is_plain = stored.name() == MMFP4.name();
        for dtype in DTYPES {
            // A token, and one that goes to all experts: each slot an expert of its own, as many bytes as there are.
            works.push(mixture("experts", &moe, stored, dtype, 1, TOP_K));
            works.push(mixture("all experts", &moe, stored, dtype, 1, EXPERTS));
            works.push(mlp_of("dense MLP", &mlp, stored, dtype, 1));
            if is_plain {
                works.push(mixture("experts", &moe, stored, dtype, 2, TOP_K));
                works.push(mixture("experts", &moe, stored, dtype, 8, TOP_K));
            }
            // Prompts: right, not fast (no tensor cores). Of 16 tokens each slot is an expert's only one.
            if is_plain || dtype == F16 {
                works.push(mixture("experts", &moe, stored, dtype, 16, TOP_K));
                works.push(mixture("experts", &moe, stored, dtype, 33, TOP_K));
                works.push(mixture("experts", &moe, stored, dtype, 128, TOP_K));
                works.push(mlp_of("dense MLP", &mlp, stored, dtype, 33));
            }
        }
    }
    for dtype in DTYPES {
        for m in [1, 8, 33, 128] {
            works.push(router(BF16, dtype, m));
        }
        for kind in [FloatKind::F16, FloatKind::F32] {
            works.push(router(Stored::Dense(kind), dtype, 1));
        }
    }
    works
}

fn expert(stored: Stored, width: usize) -> Expert {
    Expert {
        gate: stored.weight((width, HIDDEN)),
        up: stored.weight((width, HIDDEN)),
        down: stored.weight((HIDDEN, width)),
    }
}

/// A sparse layer's experts, one of them shared.
fn mixture_of(stored: Stored) -> FusedMoe {
    let routed = (0..EXPERTS).map(|_| expert(stored, WIDTH)).collect();
    FusedMoe::new(routed, vec![expert(stored, WIDTH)]).unwrap()
}

fn gated(stored: Stored) -> GatedMlp {
    GatedMlp::new(expert(stored, DENSE_WIDTH)).unwrap()
}

fn mixture(name: &str, moe: &FusedMoe, stored: Stored, dtype: DType, m: usize, top_k: usize) -> Value {
    let (x, ids) = (zeros(&[m, HIDDEN], dtype), zeros(&[m, top_k], DType::U32));
    let weights = zeros(&[m, top_k], DType::F32);
    Op::new(name, "experts", dtype, m)
        .weights(stored, 1)
        .roles(&["places", "x", "ids", "weights", "y"])
        .places(moe.experts(), moe.shared())
        .meta(json!({"k": HIDDEN, "experts": EXPERTS, "shared": 1, "top_k": top_k, "widths": [WIDTH, WIDTH]}))
        .record(|| moe.forward(&x, &ids, &weights))
}

fn mlp_of(name: &str, mlp: &GatedMlp, stored: Stored, dtype: DType, m: usize) -> Value {
    let x = zeros(&[m, HIDDEN], dtype);
    Op::new(name, "experts", dtype, m)
        .weights(stored, 1)
        .roles(&["places", "x", "y"])
        .places(&[], std::slice::from_ref(mlp.weights()))
        .meta(json!({"k": HIDDEN, "experts": 0, "shared": 1, "top_k": 0, "widths": [0, DENSE_WIDTH]}))
        .record(|| mlp.forward(&x))
}

fn router(stored: Stored, dtype: DType, m: usize) -> Value {
    let routing = Routing {
        top_k: TOP_K,
        n_group: 1,
        topk_group: 1,
        normalize: true,
        scaling_factor: 1.8,
    };
    let gate = Linear::new(stored.weight((EXPERTS, HIDDEN)), None).unwrap();
    let op = Router::new(gate, Route::new(routing, vec![0.0; EXPERTS]).unwrap());
    let x = zeros(&[m, HIDDEN], dtype);
    Op::new("router", "router", dtype, m)
        .weights(stored, 1)
        .roles(&["bias", "x", "y", "y.ids", "y.weights"])
        .meta(json!({"k": HIDDEN, "experts": EXPERTS, "top_k": TOP_K, "scaling": routing.scaling_factor}))
        .meta(json!({"outputs": ["f32", "u32", "f32"]}))
        .record(|| op.forward(&x))
}
