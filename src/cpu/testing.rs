//! What the kernels' tests share: inputs, the grid of shapes, the measure.

use super::{Arithmetic, Executor, Isa};
use crate::fp4::{
    BlockTensor, Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, Int8Tensor, Parts, ScaleKind,
    ScaleRule, Weight, quantize,
};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::sync::{Arc, LazyLock};

/// Rows of activations of the test grid.
pub const ROWS: [usize; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];

/// Reproducible values in -1 .. 1.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Weights of every scale kind and group that fits, at all four 4-byte alignments; one in BF16, that in eight bits,
/// and in GGML's blocks that fit.
pub fn weights(rows: &[usize], columns: &[usize]) -> Vec<Weight> {
    weights_seeded(rows, columns, 0)
}

pub fn weights_seeded(rows: &[usize], columns: &[usize], seed: u64) -> Vec<Weight> {
    let mut all = Vec::new();
    for &n in rows {
        for &k in columns {
            let values = noise(n * k, seed ^ (n * k) as u64);
            let kinds = [ScaleKind::F16, ScaleKind::BF16, ScaleKind::E8M0, ScaleKind::E4M3];
            for (i, kind) in kinds.into_iter().enumerate() {
                let group = [128, 64, 32, 16]
                    .into_iter()
                    .cycle()
                    .skip(i + n)
                    .find(|g| k % g == 0)
                    .unwrap();
                let tensor =
                    quantize("w", &values, (n, k), Format { group, kind }, ScaleRule::Maximum).unwrap();
                all.push(Weight::from(moved(&tensor, 4 * i)));
            }
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                .collect();
            let bytes = Bytes::copy_from(&bytes).unwrap();
            let dense = DenseTensor::new("w", (n, k), FloatKind::BF16, bytes).unwrap();
            all.push(Int8Tensor::round("w", &dense).unwrap().into());
            all.push(dense.into());
            for kind in [GgmlDType::Q8_0, GgmlDType::Q4K] {
                if k.is_multiple_of(kind.block_size()) {
                    all.push(in_blocks(&values, (n, k), kind));
                }
            }
        }
    }
    all
}

fn in_blocks(values: &[f32], shape: (usize, usize), kind: GgmlDType) -> Weight {
    let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
    let packed = QTensor::quantize(&tensor, kind).unwrap();
    let bytes = Bytes::copy_from(&packed.data().unwrap()).unwrap();
    BlockTensor::new("w", shape, kind, bytes).unwrap().into()
}

/// The tensor with codes that start `offset` bytes into their map, and with a divided factor for E4M3.
fn moved(tensor: &Fp4Tensor, offset: usize) -> Fp4Tensor {
    let shift = |bytes: &Bytes| {
        let mut memory = vec![0; offset];
        memory.extend_from_slice(bytes);
        Bytes::copy_from(&memory)
            .unwrap()
            .slice(offset..memory.len())
            .unwrap()
    };
    let factor = match tensor.factor() {
        Factor::Mul(f) => Factor::Div(3.0 / f),
        other => other,
    };
    let parts = Parts {
        shape: tensor.shape(),
        group: tensor.group(),
        codes: shift(tensor.codes()),
        scales: shift(tensor.scales()),
        kind: tensor.scale_kind(),
        factor,
    };
    Fp4Tensor::new("w", parts).unwrap()
}

pub const ARITHMETICS: [Arithmetic; 2] = [Arithmetic::W4A8, Arithmetic::Exact];

/// One for each instruction set of this machine, two threads each.
pub fn executors() -> &'static [Arc<Executor>] {
    static ALL: LazyLock<Vec<Arc<Executor>>> = LazyLock::new(|| {
        let executor = |isa| Executor::new(isa, 2).unwrap();
        Isa::available().into_iter().map(executor).collect()
    });
    &ALL
}

/// `Σ (a - e)² / Σ e²`.
pub fn nmse(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let square = |v: f64| v * v;
    let error: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| square(f64::from(*a) - f64::from(*e)))
        .sum();
    let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
    if error == 0.0 { 0.0 } else { error / norm }
}

/// Normalised mean-square error of at most 1e-9: nothing but the order of summation may differ.
pub fn assert_close(actual: &[f32], expected: &[f32], what: &str) {
    assert_within(actual, expected, 1e-9, what);
}

pub fn assert_within(actual: &[f32], expected: &[f32], bound: f64, what: &str) {
    let error = nmse(actual, expected);
    let largest = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0f32, f32::max);
    assert!(
        error <= bound,
        "{what}: NMSE {error:e}, largest difference {largest:e}"
    );
}

/// The same numbers, to the bit.
pub fn assert_same_bits(actual: &[f32], expected: &[f32], what: &str) {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(actual) == bits(expected), "{what}");
}

/// Of `rows` rows, those that are computed together in turn: no kernel may tell one number of rows from another.
pub fn cuts(rows: usize) -> impl Iterator<Item = Vec<std::ops::Range<usize>>> {
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, rows]
        .into_iter()
        .map(move |cut| {
            let starts = (0..rows).step_by(cut);
            starts.map(|start| start..(start + cut).min(rows)).collect()
        })
}

pub fn assert_same_bits_for_any_threads(run: impl Fn(&Executor) -> Vec<f32>) {
    for isa in Isa::available() {
        let with = |threads| {
            let executor = Executor::new(isa, threads).unwrap();
            run(&executor).into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = with(1);
        assert_eq!(one, with(2), "{isa:?}");
        assert_eq!(one, with(5), "{isa:?}");
    }
}
