//! What `tools/gpu-check` runs on an NVIDIA GPU: the launches of real ops at GLM-4.7-Flash's shapes, as JSON.
//!
//! Each family of kernels adds its ops here, their operands' roles, and a reference to `tools/gpu-check/references.py`.

mod append;
mod linear;
mod moe;
mod norm_rope;
mod paged;
mod record;

use candle_core::{DType, Device, Tensor};
use candle_mmfp4::fp4::{Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Parts, ScaleKind, Weight};
use candle_mmfp4::metal::every_kernel;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Writes `target/gpu-check/works.json`, or to the folder that `MMFP4_GPU_WORKS` names.
#[test]
#[ignore = "a step of tools/gpu-check/make.py"]
fn gpu_works() {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/gpu-check");
    let folder = std::env::var_os("MMFP4_GPU_WORKS").map_or(usual, Into::into);
    std::fs::create_dir_all(&folder).unwrap();
    let families = [
        linear::fp4(),
        linear::dense(),
        moe::works(),
        norm_rope::works(),
        append::works(),
        paged::works(),
    ];
    let works = families.concat();
    std::fs::write(folder.join("works.json"), serde_json::to_string(&works).unwrap()).unwrap();
    let missing = unlaunched(&works);
    println!("{} works; kernels in none: {missing:?}", works.len());
}

/// Kernels that no work launches.
fn unlaunched(works: &[Value]) -> BTreeSet<String> {
    let launches = works
        .iter()
        .flat_map(|work| work["launches"].as_array().into_iter().flatten());
    let launched: BTreeSet<_> = launches.filter_map(|launch| launch["kernel"].as_str()).collect();
    let plans = DTYPES.map(|dtype| every_kernel(Format::mmfp4(), dtype).unwrap());
    let all = plans.into_iter().flatten().flat_map(|plan| plan.launches);
    all.map(|launch| launch.kernel)
        .filter(|kernel| !launched.contains(kernel.as_str()))
        .collect()
}

const F16: DType = DType::F16;
const DTYPES: [DType; 3] = [F16, DType::F32, DType::BF16];
/// Elements of a token, and heads.
const HIDDEN: usize = 2048;
const HEADS: usize = 20;
/// What attention keeps of a token, and of a head's query the part that is turned and the other.
const LATENT: usize = 512;
const ROPE: usize = 64;
const NOPE: usize = 192;
/// Of norms.
const EPS: f64 = 1e-5;

/// How a weight is stored; only its size matters.
#[derive(Clone, Copy)]
enum Stored {
    Fp4 {
        name: &'static str,
        format: Format,
        factor: Factor,
    },
    Dense(FloatKind),
}

const MMFP4: Stored = Stored::Fp4 {
    name: "MMFP4",
    format: Format::mmfp4(),
    factor: Factor::None,
};
const FORMATS: [Stored; 3] = [
    MMFP4,
    Stored::Fp4 {
        name: "MXFP4",
        format: Format::mxfp4(),
        factor: Factor::None,
    },
    // As small as it takes for outputs of experts to be numbers of f16.
    Stored::Fp4 {
        name: "NVFP4",
        format: Format::nvfp4(),
        factor: Factor::Mul(7e-4),
    },
];
const BF16: Stored = Stored::Dense(FloatKind::BF16);

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Self::Fp4 { name, .. } => name,
            Self::Dense(kind) => kind_name(kind),
        }
    }

    fn weight(self, (n, k): (usize, usize)) -> Weight {
        let zeros = |size: usize| Bytes::copy_from(&vec![0; size]).unwrap();
        match self {
            Self::Fp4 {
                format: Format { group, kind },
                factor,
                ..
            } => {
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
            Self::Dense(kind) => DenseTensor::new("w", (n, k), kind, zeros(n * k * kind.size()))
                .unwrap()
                .into(),
        }
    }

    /// Of the operands of the weight with this index.
    fn roles(self, index: usize) -> Vec<String> {
        let parts: &[_] = match self {
            Self::Fp4 { .. } => &["codes", "scales"],
            Self::Dense(_) => &["w"],
        };
        let end = if index == 0 {
            String::new()
        } else {
            format!(".{index}")
        };
        parts.iter().map(|part| format!("{part}{end}")).collect()
    }

    fn meta(self) -> Map<String, Value> {
        let meta = match self {
            Self::Fp4 {
                format: Format { group, kind },
                factor,
                ..
            } => json!({
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
            }),
            Self::Dense(kind) => json!({"weight": kind_name(kind).to_lowercase()}),
        };
        match meta {
            Value::Object(fields) => fields,
            _ => unreachable!("an object"),
        }
    }
}

fn kind_name(kind: FloatKind) -> &'static str {
    match kind {
        FloatKind::F32 => "F32",
        FloatKind::F16 => "F16",
        FloatKind::BF16 => "BF16",
    }
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}
