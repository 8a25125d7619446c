//! What `tools/gpu-check` runs on an NVIDIA GPU: the launches of real ops at GLM-4.7-Flash's shapes, as JSON.
//!
//! Each family of kernels adds its ops here, their operands' roles, and a reference to `tools/gpu-check/references.py`.

use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::HeadRows;
use candle_mmfp4::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts, ScaleKind, Weight};
use candle_mmfp4::metal::host::Host;
use candle_mmfp4::metal::plan::{Binding, Constant, Launch};
use candle_mmfp4::ops::{JoinedLinear, Linear, NormedLinear, Orientation, PerHead, RmsNorm};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Writes `target/gpu-check/works.json`, or to the folder that `MMFP4_GPU_WORKS` names.
#[test]
#[ignore = "a step of tools/gpu-check/make.py"]
fn gpu_works() {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/gpu-check");
    let folder = std::env::var_os("MMFP4_GPU_WORKS").map_or(usual, Into::into);
    std::fs::create_dir_all(&folder).unwrap();
    let works = linear();
    std::fs::write(folder.join("works.json"), serde_json::to_string(&works).unwrap()).unwrap();
    println!("{} works", works.len());
}

const MMFP4: &str = "MMFP4";
/// Name, format, the tensor's factor.
const FORMATS: [(&str, Format, Factor); 3] = [
    (MMFP4, Format::mmfp4(), Factor::None),
    ("MXFP4", Format::mxfp4(), Factor::None),
    ("NVFP4", Format::nvfp4(), Factor::Mul(0.37)),
];
const F16: DType = DType::F16;
const DTYPES: [DType; 3] = [F16, DType::F32, DType::BF16];
const EPS: f64 = 1e-5;
/// kv_b of 20 heads: 192 rows that take a query to the latent space, and 256 that take the latent to values.
const HEADS: usize = 20;
const KEYS: HeadRows = HeadRows {
    heads: HEADS,
    stride: 448,
    start: 0,
    len: 192,
};
const VALUES: HeadRows = HeadRows {
    heads: HEADS,
    stride: 448,
    start: 192,
    len: 256,
};
const LATENT: usize = 512;

fn linear() -> Vec<Value> {
    let mut works = Vec::new();
    for (format, ..) in FORMATS {
        for dtype in DTYPES {
            // What moves 64 MB and more: lm_head, and as many rows as 64 experts have.
            for (name, n, k) in [
                ("lm_head", 154_880, 2048),
                ("gate and up, 64", 196_608, 2048),
                ("down, 64", 131_072, 1536),
            ] {
                works.push(product(name, format, dtype, 1, (n, k)));
            }
            // As many rows as four experts have.
            works.push(product("gate and up, 4", format, dtype, 1, (12_288, 2048)));
            works.push(product("down, 4", format, dtype, 1, (8192, 1536)));
            layer(&mut works, format, dtype, 1);
        }
    }
    for m in [2, 4, 8] {
        for dtype in DTYPES {
            works.push(product("lm_head", MMFP4, dtype, m, (154_880, 2048)));
            layer(&mut works, MMFP4, dtype, m);
        }
    }
    // Prefill: right, not fast (no tensor cores).
    for m in [33, 128] {
        for dtype in DTYPES {
            for (format, ..) in FORMATS {
                works.push(untimed(product("q_b", format, dtype, m, (5120, 768))));
                works.push(untimed(product("o", format, dtype, m, (2048, 5120))));
                works.push(untimed(per_head(
                    "kv_b, queries",
                    format,
                    dtype,
                    m,
                    KEYS,
                    Orientation::Transposed,
                )));
                works.push(untimed(per_head(
                    "kv_b, values",
                    format,
                    dtype,
                    m,
                    VALUES,
                    Orientation::Ordinary,
                )));
            }
        }
    }
    works
}

/// The products of a layer's attention.
fn layer(works: &mut Vec<Value>, format: &str, dtype: DType, m: usize) {
    works.extend([
        joined("q_a and kv_a", format, dtype, m, [768, 576], 2048),
        normed("q_a's norm and q_b", format, dtype, m, (5120, 768)),
        product("q_b", format, dtype, m, (5120, 768)),
        product("o", format, dtype, m, (2048, 5120)),
        per_head("kv_b, queries", format, dtype, m, KEYS, Orientation::Transposed),
        per_head("kv_b, values", format, dtype, m, VALUES, Orientation::Ordinary),
    ]);
}

fn product(name: &str, format: &str, dtype: DType, m: usize, (n, k): (usize, usize)) -> Value {
    let op = Linear::new(weight(format, (n, k)), None).unwrap();
    let meta = json!({"m": m, "k": k, "n": [n]});
    let x = x(&[m, k], dtype);
    work(
        name,
        format,
        dtype,
        "linear",
        meta,
        &["codes", "scales", "x", "y"],
        || op.forward(&x),
    )
}

fn joined(name: &str, format: &str, dtype: DType, m: usize, n: [usize; 2], k: usize) -> Value {
    let op = JoinedLinear::new(
        n.map(|n| Linear::new(weight(format, (n, k)), None).unwrap())
            .into(),
    )
    .unwrap();
    let meta = json!({"m": m, "k": k, "n": n});
    let roles = ["codes", "scales", "codes.1", "scales.1", "x", "y"];
    let x = x(&[m, k], dtype);
    work(name, format, dtype, "linear", meta, &roles, || op.forward(&x))
}

fn normed(name: &str, format: &str, dtype: DType, m: usize, (n, k): (usize, usize)) -> Value {
    let linear = Linear::new(weight(format, (n, k)), None).unwrap();
    let op = NormedLinear::new(RmsNorm::new(vec![1.0; k], EPS).unwrap(), linear).unwrap();
    let meta = json!({"m": m, "k": k, "n": [n], "eps": EPS});
    let x = x(&[m, k], dtype);
    work(
        name,
        format,
        dtype,
        "linear",
        meta,
        &["codes", "scales", "norm", "x", "y"],
        || op.forward(&x),
    )
}

fn per_head(
    name: &str,
    format: &str,
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
    let op = PerHead::new(weight(format, (heads * stride, LATENT)), rows, orientation).unwrap();
    let transposed = orientation == Orientation::Transposed;
    let meta = json!({
        "m": m, "k": LATENT, "heads": heads, "stride": stride, "start": start, "len": len, "transposed": transposed,
    });
    let x = x(&[m, heads, if transposed { len } else { LATENT }], dtype);
    work(
        name,
        format,
        dtype,
        "per_head",
        meta,
        &["codes", "scales", "x", "y"],
        || op.forward(&x),
    )
}

fn untimed(mut work: Value) -> Value {
    work["timed"] = json!(false);
    work
}

fn x(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// A weight of which only the size matters.
fn weight(format: &str, (n, k): (usize, usize)) -> Weight {
    let (_, Format { group, kind }, factor) = FORMATS.into_iter().find(|(name, ..)| *name == format).unwrap();
    let zeros = |size: usize| Bytes::copy_from(&vec![0; size]).unwrap();
    let parts = Parts {
        shape: (n, k),
        group,
        codes: zeros(n * k / 2),
        scales: zeros(n * k / group * kind.size()),
        kind,
        factor,
    };
    Fp4Tensor::new("w", parts).unwrap().into()
}

/// An op's launches and operands; `roles` are those of its plan's operands, in order.
fn work(
    name: &str,
    format: &str,
    dtype: DType,
    op: &str,
    mut meta: Value,
    roles: &[&str],
    forward: impl FnOnce() -> candle_core::Result<Tensor>,
) -> Value {
    let host = Arc::new(Host::recorder(false));
    host.install(forward).unwrap();
    let [recorded] = host.recorded().try_into().expect("one plan");
    assert_eq!(recorded.operands.len(), roles.len(), "{name}: operands");
    let operands = recorded.operands.iter().zip(roles).map(|(operand, role)| {
        let weight = role.starts_with("codes") || role.starts_with("scales");
        json!({"role": role, "len": operand.len, "weight": weight})
    });
    let (_, Format { group, kind }, factor) = FORMATS.into_iter().find(|(name, ..)| *name == format).unwrap();
    let of_format = json!({
        "dtype": dtype.as_str(),
        "group": group,
        "scales": match kind {
            ScaleKind::F16 => "f16",
            ScaleKind::BF16 => "bf16",
            ScaleKind::E8M0 => "e8m0",
            ScaleKind::E4M3 => "e4m3",
        },
        "factor": match factor {
            Factor::None => Value::Null,
            Factor::Mul(factor) => json!(["mul", factor]),
            Factor::Div(factor) => json!(["div", factor]),
        },
    });
    let (Value::Object(meta_fields), Value::Object(of_format)) = (&mut meta, of_format) else {
        unreachable!("objects")
    };
    meta_fields.extend(of_format);
    let m = &meta["m"];
    json!({
        "name": format!("{name}, {format}, {}, {m}", dtype.as_str()),
        "op": op,
        "timed": true,
        "operands": operands.collect::<Vec<_>>(),
        "launches": recorded.plan.launches.iter().map(launch).collect::<Vec<_>>(),
        "meta": meta,
    })
}

fn launch(launch: &Launch) -> Value {
    let constants = launch.constants.iter().map(|(index, constant)| match constant {
        Constant::Bool(on) => json!([index, u16::from(*on)]),
        Constant::U16(value) => json!([index, value]),
    });
    let bindings = launch.bindings.iter().map(|(index, binding)| match binding {
        Binding::Read { operand, offset } | Binding::Write { operand, offset } => {
            json!([index, {"operand": operand, "offset": offset}])
        }
        Binding::Bytes(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            json!([index, {"bytes": hex}])
        }
    });
    let work = launch.work;
    json!({
        "kernel": launch.kernel,
        "constants": constants.collect::<Vec<_>>(),
        "grid": launch.threadgroups,
        "threads": launch.threads,
        "bindings": bindings.collect::<Vec<_>>(),
        "bytes": work.weights + work.read + work.written,
    })
}
