//! The grid of a linear op's cases.

use crate::backend::Backend;
use crate::{nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::Result;
use candle_mmfp4::cpu::{Arithmetic, reference};
use candle_mmfp4::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts, ScaleKind, ScaleRule, Weight, quantize};
use candle_mmfp4::ops::{Linear, NormedLinear, RmsNorm};

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
pub const KINDS: [ScaleKind; 4] = [ScaleKind::F16, ScaleKind::BF16, ScaleKind::E8M0, ScaleKind::E4M3];
const GROUPS: [usize; 4] = [16, 32, 64, 128];
const ROWS: [usize; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
const OUTPUTS: [usize; 7] = [1, 7, 8, 9, 63, 65, 576];
/// K in groups.
const LENGTHS: [usize; 5] = [1, 2, 3, 5, 9];
const FACTORS: [Factor; 3] = [Factor::None, Factor::Mul(0.37), Factor::Div(3.0)];
const SHIFTS: [usize; 4] = [0, 4, 8, 12];
const LIES: [Lies; 6] = [
    Lies::Together,
    Lies::Offset,
    Lies::WideRows,
    Lies::OddRows,
    Lies::Batches,
    Lies::Transposed,
];

/// How activations lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    Together,
    /// After a row of others.
    Offset,
    /// Rows four elements longer than they are taken.
    WideRows,
    /// Rows three elements longer: no vector loads.
    OddRows,
    /// A leading dimension, of which a part is taken.
    Batches,
    /// Columns first.
    Transposed,
}

impl Lies {
    /// Of a tensor of some shape a part of `m` rows of `k` elements.
    pub fn take(
        self,
        (m, k): (usize, usize),
        of: impl FnOnce((usize, usize)) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Together => of((m, k)),
            Self::Offset => of((m + 1, k))?.narrow(0, 1, m),
            Self::WideRows => of((m, k + 4))?.narrow(1, 0, k),
            Self::OddRows => of((m, k + 3))?.narrow(1, 0, k),
            Self::Batches => of((2 * (m + 1), k))?.reshape((2, m + 1, k))?.narrow(1, 1, m),
            Self::Transposed => of((k, m))?.t(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dtype: DType,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub group: usize,
    pub kind: ScaleKind,
    pub factor: Factor,
    /// Bytes by which the codes are off a multiple of 16.
    pub shift: usize,
    pub bias: bool,
    pub lies: Lies,
    /// Scales that are subnormal numbers of their kind (F16 and E4M3).
    pub subnormal: bool,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            m: 1,
            n: 8,
            k: 64,
            group: 32,
            kind: ScaleKind::F16,
            factor: Factor::None,
            shift: 0,
            bias: false,
            lies: Lies::Together,
            subnormal: false,
        }
    }
}

impl Case {
    /// The weight and the bias.
    pub fn op(&self) -> Linear {
        let tensor = weight((self.n, self.k), self.group, self.kind, self.shift);
        let parts = Parts {
            shape: tensor.shape(),
            group: self.group,
            codes: tensor.codes().clone(),
            scales: if self.subnormal {
                subnormal(tensor.scales(), self.kind)
            } else {
                tensor.scales().clone()
            },
            kind: self.kind,
            factor: self.factor,
        };
        let tensor = Fp4Tensor::new("w", parts).unwrap();
        Linear::new(Weight::from(tensor), self.bias.then(|| noise(self.n, 11))).unwrap()
    }

    /// The product of the activations' norm.
    pub fn normed(&self, eps: f64) -> NormedLinear {
        NormedLinear::new(RmsNorm::new(noise(self.k, 19), eps).unwrap(), self.op()).unwrap()
    }

    /// What the plain reference gives for that.
    pub fn expected_of_norm(&self, op: &NormedLinear, x: &[f32]) -> Vec<f32> {
        let norm = op.norm();
        let rows = x
            .chunks_exact(self.k)
            .flat_map(|row| reference::rms_norm(row, norm.weight(), norm.eps()));
        self.expected(op.linear(), &rows.collect::<Vec<_>>())
    }

    /// Activations, lying as they are to.
    pub fn x(&self) -> candle_core::Result<Tensor> {
        let seed = (self.m * 31 + self.k) as u64;
        let of = |shape| Ok(activations(shape, self.dtype, seed));
        self.lies.take((self.m, self.k), of)
    }

    /// Runs the op and gives its normalised mean-square error.
    pub fn run(&self, backend: &Backend) -> Result<f64> {
        let (op, x) = (self.op(), self.x()?);
        let y = backend.run(|device| op.forward(&x.to_device(device)?))?;
        let mut expected = self.expected(&op, &values(&x.contiguous()?));
        if self.dtype == DType::BF16 && expected.len() < 16 {
            // Half of the last place alone is up to 2^-8, whose square is 1.5e-5, and in a few values that does not average
            // out: they are compared with what is to be stored.
            for value in &mut expected {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
        Ok(nmse(&values(&y), &expected))
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

/// The sizes of each axis of the grid.
const AXES: [usize; 10] = [
    DTYPES.len(),
    ROWS.len(),
    OUTPUTS.len(),
    LENGTHS.len(),
    GROUPS.len(),
    KINDS.len(),
    FACTORS.len(),
    SHIFTS.len(),
    2,
    LIES.len(),
];

fn case(at: [usize; 10]) -> Case {
    let group = GROUPS[at[4]];
    Case {
        dtype: DTYPES[at[0]],
        m: ROWS[at[1]],
        n: OUTPUTS[at[2]],
        k: LENGTHS[at[3]] * group,
        group,
        kind: KINDS[at[5]],
        factor: FACTORS[at[6]],
        shift: SHIFTS[at[7]],
        bias: at[8] == 1,
        lies: LIES[at[9]],
        subnormal: false,
    }
}

/// Every combination of dtype, shape, group and scale kind; the other axes take turns.
pub fn all() -> Vec<Case> {
    let count: usize = AXES[..6].iter().product();
    (0..count)
        .map(|index| {
            let mut rest = index;
            let mut at = AXES.map(|size| index % size);
            for (at, size) in at[..6].iter_mut().zip(AXES) {
                *at = rest % size;
                rest /= size;
            }
            case(at)
        })
        .collect()
}

/// Cases in which every two values of two axes meet: greedily, of 64 random candidates the one with most new pairs.
pub fn pairwise() -> Vec<Case> {
    let mut random = 1u64;
    let mut below = |size: usize| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) as usize % size
    };
    let mut missing = std::collections::BTreeSet::new();
    for (a, size) in AXES.into_iter().enumerate() {
        for (b, other) in AXES.into_iter().enumerate().skip(a + 1) {
            for i in 0..size {
                missing.extend((0..other).map(|j| (a, i, b, j)));
            }
        }
    }
    let mut cases = Vec::new();
    while let Some(&(a, i, b, j)) = missing.first() {
        let pairs = |at: &[usize; 10]| {
            let mut met = Vec::new();
            for a in 0..AXES.len() {
                for b in a + 1..AXES.len() {
                    met.push((a, at[a], b, at[b]));
                }
            }
            met
        };
        let best = (0..64)
            .map(|_| {
                let mut at = AXES.map(&mut below);
                (at[a], at[b]) = (i, j);
                at
            })
            .max_by_key(|at| pairs(at).iter().filter(|pair| missing.contains(pair)).count())
            .unwrap();
        for pair in pairs(&best) {
            missing.remove(&pair);
        }
        cases.push(case(best));
    }
    cases
}

/// A weight of noise whose codes begin `shift` bytes into their memory.
pub fn weight(shape: (usize, usize), group: usize, kind: ScaleKind, shift: usize) -> Fp4Tensor {
    let values = noise(shape.0 * shape.1, (shape.0 * 7 + shape.1) as u64);
    let tensor = quantize("w", &values, shape, Format { group, kind }, ScaleRule::Maximum).unwrap();
    let mut memory = vec![0xff; shift];
    memory.extend_from_slice(tensor.codes());
    let codes = Bytes::copy_from(&memory).unwrap();
    let parts = Parts {
        shape,
        group,
        codes: codes.slice(shift..memory.len()).unwrap(),
        scales: tensor.scales().clone(),
        kind,
        factor: tensor.factor(),
    };
    Fp4Tensor::new("w", parts).unwrap()
}

/// The scales with the exponents of subnormal numbers.
fn subnormal(scales: &[u8], kind: ScaleKind) -> Bytes {
    let bytes: Vec<u8> = match kind {
        ScaleKind::F16 => scales
            .chunks_exact(2)
            .flat_map(|b| [b[0] | 1, b[1] & 3])
            .collect(),
        // Noise has much the same scales everywhere: each is another.
        ScaleKind::E4M3 => scales
            .iter()
            .zip(0..)
            .map(|(b, i): (_, usize)| ((i + usize::from(*b)) % 7 + 1) as u8)
            .collect(),
        ScaleKind::BF16 | ScaleKind::E8M0 => unreachable!("Metal flushes subnormal floats"),
    };
    Bytes::copy_from(&bytes).unwrap()
}

/// Noise in a dtype.
pub fn activations(shape: (usize, usize), dtype: DType, seed: u64) -> Tensor {
    Tensor::from_vec(noise(shape.0 * shape.1, seed), shape, &Device::Cpu)
        .and_then(|x| x.to_dtype(dtype))
        .unwrap()
}

/// Outputs of several widths as one.
pub fn side_by_side(parts: &[(usize, Vec<f32>)], m: usize) -> Vec<f32> {
    let rows = (0..m).flat_map(|row| {
        parts
            .iter()
            .flat_map(move |(n, values)| &values[row * n..(row + 1) * n])
    });
    rows.copied().collect()
}
