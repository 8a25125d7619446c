//! The grid of products with weights in floating point.

use crate::backend::Backend;
use crate::linear::cases::{Case as Fp4Case, DTYPES, Lies, activations};
use crate::{grid, nmse, noise, values};
use candle_core::{DType, Tensor};
use candle_mmfp4::Result;
use candle_mmfp4::cpu::{Arithmetic, reference};
use candle_mmfp4::fp4::{Bytes, DenseTensor, FloatKind, Weight};
use candle_mmfp4::ops::Linear;

pub const KINDS: [FloatKind; 3] = [FloatKind::F32, FloatKind::F16, FloatKind::BF16];
const ROWS: [usize; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
const OUTPUTS: [usize; 7] = [1, 7, 8, 9, 63, 65, 576];
/// From 257 on simdgroups share K: two of them to 513, three to 768, six to 1288, eight to 2048, five twice to 2056 and 2065.
const LENGTHS: [usize; 16] = [
    1, 7, 8, 31, 32, 33, 40, 64, 264, 513, 768, 1288, 2048, 2056, 2065, 4616,
];
const LIES: [Lies; 6] = [
    Lies::Together,
    Lies::Offset,
    Lies::WideRows,
    Lies::OddRows,
    Lies::Batches,
    Lies::Transposed,
];
/// Bytes by which a weight is off a multiple of 16.
const SHIFTS: [usize; 4] = [0, 8, 4, 12];

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dtype: DType,
    pub kind: FloatKind,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub shift: usize,
    pub bias: bool,
    pub lies: Lies,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            kind: FloatKind::BF16,
            m: 1,
            n: 9,
            k: 64,
            shift: 0,
            bias: false,
            lies: Lies::Together,
        }
    }
}

/// The grid.
pub fn grid() -> Vec<Case> {
    let axes = [
        DTYPES.len(),
        KINDS.len(),
        ROWS.len(),
        OUTPUTS.len(),
        LENGTHS.len(),
        SHIFTS.len(),
        2,
        LIES.len(),
    ];
    let case = |at: [usize; 8]| Case {
        dtype: DTYPES[at[0]],
        kind: KINDS[at[1]],
        m: ROWS[at[2]],
        n: OUTPUTS[at[3]],
        k: LENGTHS[at[4]],
        shift: SHIFTS[at[5]],
        bias: at[6] == 1,
        lies: LIES[at[7]],
    };
    grid::chosen(axes).into_iter().map(case).collect()
}

impl Case {
    pub fn op(&self) -> Linear {
        let weight = weight((self.n, self.k), self.kind, self.shift);
        Linear::new(weight.into(), self.bias.then(|| noise(self.n, 11))).unwrap()
    }

    /// Activations, lying as they are to.
    pub fn x(&self) -> candle_core::Result<Tensor> {
        let lying = Fp4Case {
            dtype: self.dtype,
            m: self.m,
            k: self.k,
            lies: self.lies,
            ..Fp4Case::default()
        };
        lying.x()
    }

    /// Runs the op and gives its normalised mean-square error.
    pub fn run(&self, backend: &Backend) -> Result<f64> {
        let (op, x) = (self.op(), self.x()?);
        let y = backend.run(|device| op.forward(&x.to_device(device)?))?;
        Ok(nmse(&values(&y), &self.expected(&op, &values(&x.contiguous()?))))
    }

    /// What the plain reference gives.
    pub fn expected(&self, op: &Linear, x: &[f32]) -> Vec<f32> {
        let mut expected = reference::linear(op.weight(), x, x.len() / self.k, Arithmetic::Exact);
        if let Some(bias) = op.bias() {
            for row in expected.chunks_exact_mut(self.n) {
                for (value, bias) in row.iter_mut().zip(bias) {
                    *value += bias;
                }
            }
        }
        expected
    }
}

/// A weight of noise that begins `shift` bytes into its memory.
pub fn weight(shape: (usize, usize), kind: FloatKind, shift: usize) -> DenseTensor {
    let dtype = match kind {
        FloatKind::F32 => DType::F32,
        FloatKind::F16 => DType::F16,
        FloatKind::BF16 => DType::BF16,
    };
    let tensor = activations(shape, dtype, (shape.0 * 7 + shape.1) as u64);
    let mut memory = vec![0xff; shift];
    for value in values(&tensor) {
        match kind {
            FloatKind::F32 => memory.extend(value.to_le_bytes()),
            FloatKind::F16 => memory.extend(half::f16::from_f32(value).to_le_bytes()),
            FloatKind::BF16 => memory.extend(half::bf16::from_f32(value).to_le_bytes()),
        }
    }
    let bytes = Bytes::copy_from(&memory).unwrap();
    DenseTensor::new("w", shape, kind, bytes.slice(shift..memory.len()).unwrap()).unwrap()
}

/// A weight as ops take it.
pub fn shared(shape: (usize, usize), kind: FloatKind) -> Weight {
    weight(shape, kind, 0).into()
}
