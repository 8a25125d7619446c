//! Other libraries' files as this crate writes the same codes: what they store is taken apart here once more, by the
//! formats' definitions alone.

use super::draft::{Draft, Stored};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_mmfp4::checkpoint::{Checkpoint, StoredTensor};
use half::f16;
use safetensors::Dtype;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// What lies beside codes and is no tensor of its own.
const PARTS: [&str; 9] = [
    "weight_scale",
    "weight_global_scale",
    "weight_scale_2",
    "input_scale",
    "weight.scales",
    "weight.group_size",
    "scales",
    "scale",
    "input_global_scale",
];

/// Integers in blocks, by what the weights' names end in.
const INTEGERS: [(&str, GgmlDType); 6] = [
    (".weight.q4_0", GgmlDType::Q4_0),
    (".weight.q5_0", GgmlDType::Q5_0),
    (".weight.q5_1", GgmlDType::Q5_1),
    (".weight.q8_0", GgmlDType::Q8_0),
    (".weight.q4_k", GgmlDType::Q4K),
    (".weight.q6_k", GgmlDType::Q6K),
];

/// One matrix, or a stack of them.
enum Content {
    /// MMFP4 in Marlin's layout: a group, codes of consecutive k, F16 scales.
    Mmfp4(usize, Vec<u8>, Vec<u8>),
    /// NVFP4 in compressed-tensors' layout: codes, E4M3 scales, what divides them: one, or one a matrix.
    Nvfp4(Vec<u8>, Vec<u8>, Vec<f32>),
    /// Values.
    Floats(Dtype, Vec<u8>),
}

/// The model of a folder or GGUF file with its codes in this crate's own layouts: MMFP4 where scales are powers of two or
/// F16, NVFP4 where they are E4M3. Integers become the values that Candle decodes them to.
pub fn transcribed(path: &Path, config: Value) -> Draft {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, stored) in checkpoint.tensors() {
        if !PARTS.iter().any(|part| name.ends_with(&format!(".{part}"))) {
            let (name, shape, content) = content(&checkpoint, name, stored);
            insert(&mut tensors, &name, &shape, &content);
        }
    }
    Draft { config, tensors }
}

/// A tensor's name, its shape in elements and what it holds.
fn content(checkpoint: &Checkpoint, name: &str, stored: &StoredTensor) -> (String, Vec<usize>, Content) {
    let (bytes, last) = (stored.bytes.to_vec(), *stored.shape.last().unwrap());
    let shape = |k: usize| [&stored.shape[..stored.shape.len() - 1], &[k]].concat();
    let module = |suffix: &str| name.strip_suffix(suffix).map(str::to_string);
    if let Some(module) = module(".weight_packed") {
        let scales = checkpoint.get(&format!("{module}.weight_scale")).unwrap();
        let content = match scales.dtype {
            Dtype::F8_E4M3 => {
                let divisors = numbers(checkpoint, &format!("{module}.weight_global_scale"));
                Content::Nvfp4(bytes, scales.bytes.to_vec(), divisors)
            }
            _ => Content::Mmfp4(32, bytes, halves(&scales.bytes)),
        };
        return (format!("{module}.weight"), shape(2 * last), content);
    }
    if let Some(module) = module(".weight.mxfp4") {
        let (codes, scales) = unblocked(&bytes, 1, 32);
        let content = Content::Mmfp4(32, codes, halves(&scales));
        return (format!("{module}.weight"), shape(last / 17 * 32), content);
    }
    if let Some(module) = module(".weight.nvfp4") {
        let (codes, scales) = unblocked(&bytes, 4, 16);
        let factors = numbers(checkpoint, &format!("{module}.scale"));
        let divisors = factors.into_iter().map(|factor| 1.0 / factor).collect();
        return (
            format!("{module}.weight"),
            shape(last / 36 * 64),
            Content::Nvfp4(codes, scales, divisors),
        );
    }
    for (suffix, kind) in INTEGERS {
        if let Some(module) = module(suffix) {
            let shape = shape(last / kind.type_size() * kind.block_size());
            let content = Content::Floats(Dtype::F32, decoded(&bytes, kind, &shape));
            return (format!("{module}.weight"), shape, content);
        }
    }
    let Some(module) = module(".weight") else {
        return (
            name.into(),
            stored.shape.clone(),
            Content::Floats(stored.dtype, bytes),
        );
    };
    let find = |suffix: &str| checkpoint.find(&format!("{module}.{suffix}"));
    let (shape, content) = match stored.dtype {
        Dtype::U8 => {
            let factors = numbers(checkpoint, &format!("{module}.weight_scale_2"));
            let divisors = factors.into_iter().map(|factor| 1.0 / factor).collect();
            let scales = find("weight_scale").unwrap().bytes.to_vec();
            (shape(2 * last), Content::Nvfp4(bytes, scales, divisors))
        }
        Dtype::U32 => {
            let scales = find("scales").or(find("weight.scales")).unwrap();
            let group = 8 * last / scales.shape.last().unwrap();
            let content = match (scales.dtype, group) {
                (Dtype::F16, group) => Content::Mmfp4(group, bytes, scales.bytes.to_vec()),
                (Dtype::U8, 32) => Content::Mmfp4(32, bytes, halves(&scales.bytes)),
                (Dtype::U8, 16) => Content::Nvfp4(bytes, scales.bytes.to_vec(), vec![1.0]),
                other => panic!("{name}: {other:?}"),
            };
            (shape(8 * last), content)
        }
        dtype => (stored.shape.clone(), Content::Floats(dtype, bytes)),
    };
    (name.into(), shape, content)
}

/// Writes a tensor; of a stack of experts, each.
fn insert(tensors: &mut BTreeMap<String, Stored>, name: &str, shape: &[usize], content: &Content) {
    let Some((layer, projection)) = name.split_once(".switch_mlp.") else {
        return put(tensors, name, shape, content, (0, 1));
    };
    for expert in 0..shape[0] {
        let name = format!("{layer}.experts.{expert}.{projection}");
        put(tensors, &name, &shape[1..], content, (expert, shape[0]));
    }
}

/// Writes one of so many equal parts of a tensor, as a tensor of `shape` elements.
fn put(
    tensors: &mut BTreeMap<String, Stored>,
    name: &str,
    shape: &[usize],
    content: &Content,
    (index, of): (usize, usize),
) {
    let part = |bytes: &[u8]| bytes.chunks_exact(bytes.len() / of).nth(index).unwrap().to_vec();
    let wide = |k: usize| [&shape[..shape.len() - 1], &[k]].concat();
    let mut store = |name: String, dtype, shape: Vec<usize>, bytes| {
        let stored = Stored { dtype, shape, bytes };
        assert!(tensors.insert(name, stored).is_none());
    };
    let k = *shape.last().unwrap();
    match content {
        Content::Floats(dtype, bytes) => store(name.into(), *dtype, shape.into(), part(bytes)),
        Content::Mmfp4(group, codes, scales) => {
            let module = name.strip_suffix(".weight").unwrap();
            store(name.into(), Dtype::U32, wide(k / 8), part(codes));
            store(
                format!("{module}.scales"),
                Dtype::F16,
                wide(k / group),
                part(scales),
            );
        }
        Content::Nvfp4(codes, scales, divisors) => {
            let divisor = divisors[if divisors.len() == 1 { 0 } else { index }];
            store(format!("{name}_packed"), Dtype::U8, wide(k / 2), part(codes));
            store(
                format!("{name}_scale"),
                Dtype::F8_E4M3,
                wide(k / 16),
                part(scales),
            );
            store(
                format!("{name}_global_scale"),
                Dtype::F32,
                vec![1],
                divisor.to_le_bytes().into(),
            );
        }
    }
}

fn numbers(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let stored = checkpoint.get(name).unwrap();
    assert_eq!(stored.dtype, Dtype::F32, "{name}");
    stored
        .bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// Powers of two in F16, which has those of all weights but the tiniest.
fn halves(exponents: &[u8]) -> Vec<u8> {
    let half = |exponent: &u8| {
        let value = 2f64.powi(i32::from(*exponent) - 127);
        let half = f16::from_f64(value);
        assert_eq!(f64::from(half), value, "2^({exponent} - 127) in F16");
        half.to_le_bytes()
    };
    exponents.iter().flat_map(half).collect()
}

/// Codes of consecutive k and scales, from blocks of so many groups: scales first, then each group's codes, the first half
/// in low nibbles.
fn unblocked(bytes: &[u8], groups: usize, group: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in bytes.chunks_exact(groups * (1 + group / 2)) {
        scales.extend(&block[..groups]);
        for nibbles in block[groups..].chunks_exact(group / 2) {
            let low = nibbles.iter().map(|byte| byte & 15);
            let all: Vec<u8> = low.chain(nibbles.iter().map(|byte| byte >> 4)).collect();
            codes.extend(all.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4));
        }
    }
    (codes, scales)
}

/// What Candle makes of integers, in F32.
fn decoded(bytes: &[u8], kind: GgmlDType, shape: &[usize]) -> Vec<u8> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, kind).unwrap();
    let tensor = QTensor::new(storage, shape)
        .unwrap()
        .dequantize(&Device::Cpu)
        .unwrap();
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}
