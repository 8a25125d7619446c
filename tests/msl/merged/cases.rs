//! Products with what attention's parts come to.

use crate::backend::Backend;
use crate::dense::cases as dense;
use crate::linear::cases::{Case as Fp4Case, DTYPES, KINDS};
use crate::{bound, grid, nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::Result;
use candle_mmfp4::cpu::{Arithmetic, HeadRows, reference};
use candle_mmfp4::fp4::{Factor, FloatKind, ScaleKind, Weight};
use candle_mmfp4::ops::{Orientation, PerHead};

/// How the weight is stored.
#[derive(Debug, Clone, Copy)]
pub enum Stored {
    Fp4 {
        group: usize,
        kind: ScaleKind,
        factor: Factor,
    },
    Dense(FloatKind),
}

/// Which splits see no token, of more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unseen {
    None,
    /// As attention does not leave them.
    First,
    /// As beside a longer sequence: all but the first two.
    Last,
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dtype: DType,
    pub stored: Stored,
    pub m: usize,
    pub rows: HeadRows,
    pub k: usize,
    pub splits: usize,
    pub unseen: Unseen,
    /// Bytes by which the weight is off a multiple of 16.
    pub shift: usize,
}

const PLAIN: HeadRows = rows(1, 9, 0, 9);

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            stored: Stored::Fp4 {
                group: 32,
                kind: ScaleKind::F16,
                factor: Factor::None,
            },
            m: 1,
            rows: PLAIN,
            k: 64,
            splits: 2,
            unseen: Unseen::None,
            shift: 0,
        }
    }
}

pub const fn rows(heads: usize, stride: usize, start: usize, len: usize) -> HeadRows {
    HeadRows {
        heads,
        stride,
        start,
        len,
    }
}

impl Case {
    pub fn op(&self) -> PerHead {
        let n = self.rows.heads * self.rows.stride;
        let weight: Weight = match self.stored {
            Stored::Fp4 { group, kind, factor } => {
                let case = Fp4Case {
                    n,
                    k: self.k,
                    group,
                    kind,
                    factor,
                    shift: self.shift,
                    ..Fp4Case::default()
                };
                case.op().weight().clone()
            }
            Stored::Dense(kind) => dense::weight((n, self.k), kind, self.shift).into(),
        };
        PerHead::new(weight, self.rows, Orientation::Ordinary)
            .unwrap()
            .with_arithmetic(Arithmetic::Exact)
    }

    /// Parts and what is known of each.
    pub fn inputs(&self) -> [Tensor; 2] {
        let count = self.m * self.rows.heads * self.splits;
        let mut parts = noise(count * self.k, (self.m * 5 + self.k) as u64);
        let scores = noise(count, 3).into_iter().zip(noise(count, 4));
        // Weights that differ by 2^8 at most, and some that are nothing beside others.
        let mut stats: Vec<_> = (0..)
            .zip(scores)
            .map(|(i, (m, l))| [m * if i % 7 == 0 { 200.0 } else { 4.0 }, l.abs() + 0.5])
            .collect();
        for (index, stat) in stats.iter_mut().enumerate() {
            let split = index % self.splits;
            let unseen = match self.unseen {
                Unseen::None => false,
                Unseen::First => split == 0 && self.splits > 1,
                Unseen::Last => split > 1,
            };
            if unseen {
                *stat = [f32::NEG_INFINITY, 0.0];
                parts[index * self.k..][..self.k].fill(0.0);
            }
        }
        let shape = |last| (self.m, self.rows.heads, self.splits, last);
        [
            Tensor::from_vec(parts, shape(self.k), &Device::Cpu).unwrap(),
            Tensor::from_vec(stats.concat(), shape(2), &Device::Cpu).unwrap(),
        ]
    }

    /// What the plain reference gives for a weight and these inputs.
    pub fn expected(&self, weight: &Weight, [parts, stats]: &[Tensor; 2]) -> Vec<f32> {
        let merged = reference::merge_parts(&values(parts), &values(stats), self.splits, self.k);
        let mut expected = reference::per_head(weight, self.rows, &merged, self.m, Arithmetic::Exact);
        if self.dtype == DType::BF16 && expected.len() < 16 {
            // As linear::cases: what rounding a few values costs does not average out.
            for value in &mut expected {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
        expected
    }

    /// Runs the op and requires what the reference gives.
    pub fn check(&self, backend: &Backend) {
        let error = self
            .run(backend)
            .unwrap_or_else(|error| panic!("{self:?}: {error}"));
        let bound = bound(self.dtype);
        assert!(error <= bound, "{self:?}: NMSE {error:e}, at most {bound:e}");
    }

    fn run(&self, backend: &Backend) -> Result<f64> {
        let (op, inputs) = (self.op(), self.inputs());
        let expected = self.expected(op.weight(), &inputs);
        let [parts, stats] = inputs;
        let y = backend.within(|| {
            let [parts, stats] = [parts, stats].map(|tensor| tensor.to_device(backend.device()));
            op.forward_merged(&parts?, &stats?, self.dtype)
        })?;
        Ok(nmse(&values(&y.to_device(&Device::Cpu)?), &expected))
    }
}

const TOKENS: [usize; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
/// Each head's rows: tails to every number of rows that a threadgroup or a simdgroup has, behind and before others.
const ROWS: [HeadRows; 9] = [
    rows(1, 1, 0, 1),
    rows(2, 10, 0, 7),
    rows(3, 8, 0, 8),
    rows(2, 40, 8, 31),
    rows(1, 40, 7, 33),
    rows(2, 64, 0, 63),
    rows(1, 65, 0, 65),
    rows(3, 24, 5, 17),
    rows(2, 100, 1, 99),
];
const SPLITS: [usize; 7] = [1, 2, 3, 5, 31, 32, 33];
const UNSEEN: [Unseen; 3] = [Unseen::None, Unseen::First, Unseen::Last];
const SHIFTS: [usize; 4] = [0, 4, 8, 12];
const GROUPS: [usize; 4] = [16, 32, 64, 128];
/// K in groups: up to 512 elements.
const LENGTHS: [usize; 3] = [1, 3, 4];
const FACTORS: [Factor; 3] = [Factor::None, Factor::Mul(0.37), Factor::Div(3.0)];
const DENSE_KINDS: [FloatKind; 3] = [FloatKind::F32, FloatKind::F16, FloatKind::BF16];
/// Around 8, 16, 32 and 64 columns, and 256, which a simdgroup takes in a turn.
const DENSE_LENGTHS: [usize; 13] = [1, 7, 8, 15, 33, 63, 64, 65, 130, 256, 264, 511, 512];

/// The grid of these axes and of the weight's own, which `store` is given the places on.
fn over<const AXES: usize>(of_weight: &[usize], store: impl Fn(&[usize], &mut Case)) -> Vec<Case> {
    let shared = [
        DTYPES.len(),
        TOKENS.len(),
        ROWS.len(),
        SPLITS.len(),
        UNSEEN.len(),
        SHIFTS.len(),
    ];
    let axes: [usize; AXES] = [&shared[..], of_weight].concat().try_into().unwrap();
    let case = |at: [usize; AXES]| {
        let mut case = Case {
            dtype: DTYPES[at[0]],
            m: TOKENS[at[1]],
            rows: ROWS[at[2]],
            splits: SPLITS[at[3]],
            unseen: UNSEEN[at[4]],
            shift: SHIFTS[at[5]],
            ..Case::default()
        };
        store(&at[shared.len()..], &mut case);
        case
    };
    grid::pairwise(axes).into_iter().map(case).collect()
}

/// Weights in FP4.
pub fn fp4() -> Vec<Case> {
    let axes = [GROUPS.len(), LENGTHS.len(), KINDS.len(), FACTORS.len()];
    over::<10>(&axes, |at, case| {
        case.k = GROUPS[at[0]] * LENGTHS[at[1]];
        case.stored = Stored::Fp4 {
            group: GROUPS[at[0]],
            kind: KINDS[at[2]],
            factor: FACTORS[at[3]],
        };
    })
}

/// Weights in floating point.
pub fn in_floating_point() -> Vec<Case> {
    over::<8>(&[DENSE_LENGTHS.len(), DENSE_KINDS.len()], |at, case| {
        case.k = DENSE_LENGTHS[at[0]];
        case.stored = Stored::Dense(DENSE_KINDS[at[1]]);
    })
}
