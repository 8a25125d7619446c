//! The router against the CPU's.

use crate::backend::Backend;
use crate::linear::cases::{DTYPES, activations};
use crate::{nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, Routing, reference, route};
use candle_mmfp4::fp4::{Bytes, DenseTensor, FloatKind, Weight};
use candle_mmfp4::ops::{Linear, Route, Router};

pub const KINDS: [FloatKind; 3] = [FloatKind::F32, FloatKind::F16, FloatKind::BF16];

/// `(experts, n_group, topk_group, top_k)`.
pub type Shape = (usize, usize, usize, usize);

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dtype: DType,
    pub kind: FloatKind,
    pub tokens: usize,
    pub d: usize,
    pub shape: Shape,
    pub normalize: bool,
    /// Scores that are 1 for most experts: ties.
    pub large: bool,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            kind: FloatKind::F32,
            tokens: 1,
            d: 64,
            shape: (16, 1, 1, 4),
            normalize: true,
            large: false,
        }
    }
}

impl Case {
    pub fn routing(&self) -> Routing {
        let (_, n_group, topk_group, top_k) = self.shape;
        Routing {
            top_k,
            n_group,
            topk_group,
            normalize: self.normalize,
            scaling_factor: 1.8,
        }
    }

    /// Coarse steps make ties, and so do experts of the same weights.
    pub fn bias(&self) -> Vec<f32> {
        let coarse = |x: &f32| (x * 4.0).round() / 8.0;
        noise(self.shape.0, 2).iter().map(coarse).collect()
    }

    pub fn weight(&self) -> Weight {
        let (experts, d) = (self.shape.0, self.d);
        let mut values = noise(experts * d, 3);
        for expert in (1..experts).step_by(3) {
            values.copy_within((expert - 1) * d..expert * d, expert * d);
        }
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| match self.kind {
                FloatKind::F32 => v.to_le_bytes().to_vec(),
                FloatKind::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
                FloatKind::BF16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
            })
            .collect();
        let bytes = Bytes::copy_from(&bytes).unwrap();
        DenseTensor::new("gate", (experts, d), self.kind, bytes)
            .unwrap()
            .into()
    }

    pub fn op(&self) -> Router {
        let route = Route::new(self.routing(), self.bias()).unwrap();
        Router::new(Linear::new(self.weight(), None).unwrap(), route)
    }

    pub fn x(&self) -> Tensor {
        let x = activations((self.tokens, self.d), self.dtype, self.tokens as u64);
        if self.large {
            return x.affine(100.0, 0.0).unwrap();
        }
        x
    }

    /// The reference's logits.
    pub fn logits(&self, x: &Tensor) -> Vec<f32> {
        reference::linear(&self.weight(), &values(x), self.tokens, Arithmetic::Exact)
    }
}

/// Logits, ids, weights.
fn run(backend: &Backend, case: &Case, x: &Tensor) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let op = case.op();
    // One tensor is what a backend hands back.
    let all = backend.run(|device| {
        let [logits, ids, weights] = op.forward(&x.to_device(device)?)?;
        Tensor::cat(&[logits, ids.to_dtype(DType::F32)?, weights], 1)
    });
    let all = all.unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let (experts, top_k) = (case.shape.0, case.shape.3);
    let part = |start, len| values(&all.narrow(1, start, len).unwrap().contiguous().unwrap());
    let ids = part(experts, top_k).into_iter().map(|id| id as u32).collect();
    (part(0, experts), ids, part(experts + top_k, top_k))
}

/// The choice among the kernel's own logits is the CPU's.
fn check_choice(case: &Case, logits: &[f32], ids: &[u32], weights: &[f32]) {
    let (mut expected_ids, mut expected) = (vec![0; ids.len()], vec![0.0; ids.len()]);
    route(
        logits,
        &case.bias(),
        &case.routing(),
        &mut expected_ids,
        &mut expected,
    );
    assert_eq!(ids, expected_ids, "{case:?}");
    for (weight, expected) in weights.iter().zip(&expected) {
        let close = (weight - expected).abs() <= 1e-6 * expected.abs();
        assert!(
            close || weight.is_nan() && expected.is_nan(),
            "{case:?}: {weight} for {expected}"
        );
    }
}

#[test]
fn scores_and_choice_are_the_cpus() {
    let Some(backend) = Backend::start() else { return };
    let shapes = [
        (1, 1, 1, 1),
        (2, 2, 1, 1),
        (8, 1, 1, 8),
        (16, 16, 3, 3),
        (64, 1, 1, 4),
        (64, 8, 3, 6),
        (66, 2, 1, 5),
        (160, 8, 3, 6),
        (512, 512, 511, 16),
        (512, 16, 4, 16),
    ];
    let mut worst = 0f64;
    for (index, shape) in shapes.into_iter().enumerate() {
        for (turn, tokens) in [1, 2, 5, 16, 17, 18, 33].into_iter().enumerate() {
            for large in [false, true] {
                let case = Case {
                    dtype: DTYPES[(index + turn) % 3],
                    kind: KINDS[(index + turn / 3) % 3],
                    tokens,
                    d: [64, 5, 130, 300][(index + turn + usize::from(large)) % 4],
                    shape,
                    normalize: turn % 2 == 0,
                    large,
                };
                let x = case.x();
                let (logits, ids, weights) = run(&backend, &case, &x);
                let error = nmse(&logits, &case.logits(&x));
                assert!(error <= 1e-9, "{case:?}: {error:e}");
                worst = worst.max(error);
                check_choice(&case, &logits, &ids, &weights);
            }
        }
    }
    println!("largest NMSE of logits {worst:e}");
}

#[test]
fn nan_ranks_first_and_stays_visible() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [2, 18] {
        for shape in [(16, 1, 1, 4), (16, 4, 2, 4)] {
            let case = Case {
                tokens,
                shape,
                ..Case::default()
            };
            let mut x = values(&case.x());
            x[case.d + 1] = f32::NAN;
            x[7] = f32::INFINITY;
            let x = Tensor::from_vec(x, (tokens, case.d), &Device::Cpu).unwrap();
            let (logits, ids, weights) = run(&backend, &case, &x);
            check_choice(&case, &logits, &ids, &weights);
            assert!(weights[4..8].iter().all(|w| w.is_nan()), "{case:?}");
            assert!(weights[8..].iter().all(|w| w.is_finite()), "{case:?}");
        }
    }
}

#[test]
fn rows_that_lie_apart_and_odd_weights() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [3, 20] {
        let case = Case {
            tokens,
            ..Case::default()
        };
        for by in [3, 4] {
            let x = activations((tokens, case.d + by), DType::F32, 5)
                .narrow(1, 0, case.d)
                .unwrap();
            let (logits, ids, weights) = run(&backend, &case, &x);
            let error = nmse(&logits, &case.logits(&x.contiguous().unwrap()));
            assert!(error <= 1e-9, "{tokens} {by}: {error:e}");
            check_choice(&case, &logits, &ids, &weights);
        }
    }
}
