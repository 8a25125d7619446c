//! Weights and activations of any size, cheaply made: a strip of random rows, again and again. Speed does not depend
//! on values, and rows at other addresses are as cold as other rows.

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use candle_mmfp4::fp4::{
    Bytes, DenseTensor, FloatKind, Format, Fp4Tensor, Parts, ScaleRule, Weight, quantize,
};
use half::bf16;
use std::borrow::Cow;

/// Weights are read in turn from copies that take more than this together: several times what any cache holds.
pub const COLD: usize = 256_000_000;

/// Rows that are made and quantised; all others repeat them. Every N here is a multiple.
const STRIP: usize = 32;

/// Reproducible values in -1 .. 1.
pub fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// So many copies of what takes `size` bytes that they are cold when their turn comes again.
pub fn copies<T>(size: usize, mut make: impl FnMut() -> T) -> Vec<T> {
    (0..=COLD / size).map(|_| make()).collect()
}

/// An FP4 weight `[N, K]` in memory of its own.
pub fn fp4((n, k): (usize, usize), format: Format) -> Weight {
    let strip = quantize("strip", &noise(STRIP * k), (STRIP, k), format, ScaleRule::Maximum)
        .expect("the strip can be quantised");
    let parts = Parts {
        shape: (n, k),
        group: strip.group(),
        codes: repeated(strip.codes(), n / STRIP),
        scales: repeated(strip.scales(), n / STRIP),
        kind: strip.scale_kind(),
        factor: strip.factor(),
    };
    Fp4Tensor::new("repeated", parts).expect("whole strips").into()
}

/// A BF16 weight `[N, K]` in memory of its own.
pub fn dense((n, k): (usize, usize)) -> Weight {
    let strip: Vec<u8> = (noise(STRIP * k).into_iter())
        .flat_map(|v| bf16::from_f32(v).to_le_bytes())
        .collect();
    DenseTensor::new("repeated", (n, k), FloatKind::BF16, repeated(&strip, n / STRIP))
        .expect("whole strips")
        .into()
}

fn repeated(bytes: &[u8], times: usize) -> Bytes {
    Bytes::build(times * bytes.len(), |memory| {
        for part in memory.chunks_exact_mut(bytes.len()) {
            part.copy_from_slice(bytes);
        }
        Ok(())
    })
    .expect("memory")
}

/// A weight `[N, K]` of Candle's own, ready for products of up to `rows` rows: Candle repacks some
/// formats at the first call that wants them so, and keeps both.
pub fn candle((n, k): (usize, usize), dtype: GgmlDType, rows: usize) -> QMatMul {
    let strip = activations(STRIP, k);
    let strip = QTensor::quantize(&strip, dtype).expect("K is whole blocks");
    let bytes = strip.data().expect("on the CPU").repeat(n / STRIP);
    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype).expect("on the CPU");
    let weight = QTensor::new(storage, (n, k))
        .and_then(QMatMul::from_qtensor)
        .expect("whole strips");
    // What decides which repacking a product wants: one row, several, enough for x86's matrix unit.
    for m in [1, 2, 32].into_iter().filter(|m| *m <= rows) {
        weight.forward(&activations(m, k)).expect("shapes fit");
    }
    weight
}

/// Activations `[m, K]` as a tensor.
pub fn activations(m: usize, k: usize) -> Tensor {
    Tensor::from_vec(noise(m * k), (m, k), &Device::Cpu).expect("as many as the shape says")
}
