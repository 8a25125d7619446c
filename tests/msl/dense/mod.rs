//! Products with weights in floating point: metal/dense.metal.

pub mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::linear::cases as fp4;
use crate::{bound, nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, HeadRows, reference};
use candle_mmfp4::fp4::{DenseTensor, FloatKind, Weight};
use candle_mmfp4::metal::dense::{Beside, Operands, Product};
use candle_mmfp4::metal::linear::Direction;
use candle_mmfp4::metal::plan::Constant;
use candle_mmfp4::ops::{JoinedLinear, Linear, Orientation, PerHead};
use cases::{Case, KINDS};

#[test]
fn dense_products_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    let cases = cases::grid();
    for case in &cases {
        let error = case
            .run(&backend)
            .unwrap_or_else(|error| panic!("{case:?}: {error}"));
        assert!(error <= bound(case.dtype), "{case:?}: NMSE {error:e}");
    }
    println!("{} cases", cases.len());
}

#[test]
fn every_boundary_of_a_dense_tile() {
    let Some(backend) = Backend::start() else { return };
    for m in [1, 2, 3, 4, 5, 7, 8, 9, 31, 33] {
        for n in [1, 7, 8, 9, 31, 32, 33] {
            for k in [1, 8, 31, 32, 40] {
                let case = Case {
                    m,
                    n,
                    k,
                    ..Case::default()
                };
                let error = case.run(&backend).unwrap();
                assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
            }
        }
    }
}

#[test]
fn weights_with_rows_enough_for_each_simdgroup() {
    let Some(backend) = Backend::start() else { return };
    // Three turns and a part of one; four rows a simdgroup, and two.
    for (m, n) in [(1, 16_390), (5, 8193)] {
        let case = Case {
            m,
            n,
            k: 776,
            ..Case::default()
        };
        let error = case.run(&backend).unwrap();
        assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
    }
}

#[test]
fn two_weights_of_a_kind_share_a_launch() {
    let Some(backend) = Backend::start() else { return };
    for (n, k, shifts) in [
        ([768, 576], 2048, [0, 0]),
        ([9, 7], 264, [0, 8]),
        ([7, 9], 40, [4, 0]),
        ([1, 1], 33, [0, 0]),
        ([5, 3000], 8, [0, 0]),
    ] {
        for (m, dtype) in [1, 2, 3, 8, 9].into_iter().zip(fp4::DTYPES.iter().cycle()) {
            let kind = KINDS[m % 3];
            let parts = [0, 1].map(|part| {
                let weight = cases::weight((n[part], k), kind, shifts[part]);
                Linear::new(weight.into(), None).unwrap()
            });
            let op = JoinedLinear::new(parts.into()).unwrap();
            let x = fp4::activations((m, k), *dtype, 3);
            let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
            let mut start = 0;
            for (part, n) in op.parts().iter().zip(n) {
                let expected = reference::linear(part.weight(), &values(&x), m, Arithmetic::Exact);
                let found = values(&y.narrow(1, start, n).unwrap().contiguous().unwrap());
                let error = nmse(&found, &expected);
                assert!(
                    error <= bound(*dtype),
                    "{n} × {k}, m {m}, columns from {start}: {error:e}"
                );
                start += n;
            }
        }
    }
}

#[test]
fn only_weights_of_a_kind_share_a_launch() {
    let weights = [
        ((8, 64), FloatKind::BF16),
        ((8, 64), FloatKind::F16),
        ((8, 72), FloatKind::BF16),
    ]
    .map(|(shape, kind)| cases::weight(shape, kind, 0));
    let product = product(&weights[0], 64, Direction::Rows);
    assert!(product.takes_beside(&weights[0]));
    assert!(!product.takes_beside(&weights[1]) && !product.takes_beside(&weights[2]));
    assert!(!Product { m: 9, ..product }.takes_beside(&weights[0]));
    let beside = Beside {
        weight: &weights[1],
        operand: 3,
    };
    let error = product.launch_beside(Some(beside)).unwrap_err().to_string();
    assert!(error.contains("`second weight`"), "{error}");
}

#[test]
fn each_head_in_both_orientations() {
    let Some(backend) = Backend::start() else { return };
    let rows = |heads, stride, start, len| HeadRows {
        heads,
        stride,
        start,
        len,
    };
    let heads = [
        rows(1, 40, 0, 40),
        rows(3, 40, 0, 24),
        rows(3, 40, 24, 16),
        rows(2, 100, 1, 65),
    ];
    for (index, rows) in heads.into_iter().enumerate() {
        for (k, shift) in [(16, 0), (33, 0), (130, 4), (288, 8), (512, 0)] {
            let weight = cases::weight((rows.heads * rows.stride, k), KINDS[(index + k) % 3], shift);
            let weight = Weight::from(weight);
            for orientation in [Orientation::Ordinary, Orientation::Transposed] {
                for (m, dtype) in [1, 2, 3, 4, 5, 8, 9, 33]
                    .into_iter()
                    .zip(fp4::DTYPES.iter().cycle())
                {
                    let op = PerHead::new(weight.clone(), rows, orientation).unwrap();
                    let width = match orientation {
                        Orientation::Ordinary => k,
                        Orientation::Transposed => rows.len,
                    };
                    let x = fp4::activations((m, rows.heads * width), *dtype, m as u64);
                    let x32 = values(&x);
                    let x = x.reshape((m, rows.heads, width)).unwrap();
                    let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
                    let expected = match orientation {
                        Orientation::Ordinary => {
                            reference::per_head(&weight, rows, &x32, m, Arithmetic::Exact)
                        }
                        Orientation::Transposed => reference::per_head_transposed(&weight, rows, &x32, m),
                    };
                    let error = nmse(&values(&y), &expected);
                    let what = format!("{rows:?} {orientation:?} k {k} m {m} {dtype:?}");
                    assert!(error <= bound(*dtype), "{what}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn weights_of_all_kinds_stand_side_by_side() {
    let Some(backend) = Backend::start() else { return };
    let (n, k) = ([40, 9, 33, 5], 384);
    let weights = [
        Weight::from(fp4::weight((n[0], k), 32, fp4::KINDS[0], 0)),
        cases::shared((n[1], k), FloatKind::BF16),
        cases::shared((n[2], k), FloatKind::F32),
        cases::shared((n[3], k), FloatKind::F16),
    ];
    let part = |(weight, n): (Weight, usize)| {
        let bias = (n % 3 == 0).then(|| noise(n, 5));
        Linear::new(weight, bias).unwrap()
    };
    let op = JoinedLinear::new(weights.into_iter().zip(n).map(part).collect()).unwrap();
    for m in [1, 5, 40] {
        let x = fp4::activations((m, k), DType::F32, 3);
        let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
        let mut start = 0;
        for (part, n) in op.parts().iter().zip(n) {
            let mut expected = reference::linear(part.weight(), &values(&x), m, Arithmetic::Exact);
            for row in expected.chunks_exact_mut(n) {
                for (value, bias) in row.iter_mut().zip(part.bias().unwrap_or(&vec![0.0; n])) {
                    *value += bias;
                }
            }
            let found = values(&y.narrow(1, start, n).unwrap().contiguous().unwrap());
            assert!(nmse(&found, &expected) <= 1e-9, "m {m}, columns from {start}");
            start += n;
        }
    }
}

#[test]
fn nan_and_infinity_stay_visible_in_their_row() {
    let Some(backend) = Backend::start() else { return };
    for k in [64, 65] {
        let op = Linear::new(cases::shared((40, k), FloatKind::F16), None).unwrap();
        for m in [1, 4, 40] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = noise(m * k, 7);
                x[(m - 1) * k + 13] = bad;
                let x = Tensor::from_vec(x, (m, k), &Device::Cpu).unwrap();
                let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
                let y = values(&y);
                let (before, last) = y.split_at((m - 1) * 40);
                assert!(before.iter().all(|v| v.is_finite()), "m {m} {bad}");
                assert!(last.iter().any(|v| !v.is_finite()), "m {m} {bad}");
            }
        }
    }
}

fn product(weight: &DenseTensor, x_row: usize, direction: Direction) -> Product<'_> {
    Product {
        weight,
        rows: HeadRows {
            heads: 1,
            stride: 8,
            start: 0,
            len: 8,
        },
        direction,
        operands: Operands {
            weight: 0,
            bias: None,
            x: 1,
            y: 2,
        },
        dtype: DType::F16,
        m: 1,
        x_offset: 0,
        x_row,
        x_head: 0,
        y_offset: 0,
        y_row: 8,
        y_head: 0,
    }
}

/// The bytes that a load of the weight takes, or why there is no plan.
fn loads(kind: FloatKind, k: usize, shift: usize, x_row: usize, direction: Direction) -> Result<u16, String> {
    let weight = cases::weight((8, k), kind, shift);
    let product = product(&weight, x_row, direction);
    let launch = product.launch().map_err(|error| error.to_string())?;
    let found = launch.constants.into_iter().find(|(index, _)| *index == 25);
    match found {
        Some((_, Constant::U16(bytes))) => Ok(bytes),
        other => Err(format!("{other:?}")),
    }
}

#[test]
fn loads_are_as_wide_as_what_is_aligned() {
    let (rows, columns) = (Direction::Rows, Direction::Columns);
    assert_eq!(loads(FloatKind::BF16, 64, 0, 64, rows), Ok(16));
    assert_eq!(loads(FloatKind::F32, 64, 8, 64, rows), Ok(8));
    assert_eq!(loads(FloatKind::BF16, 64, 4, 64, rows), Ok(0));
    assert_eq!(loads(FloatKind::BF16, 66, 0, 68, rows), Ok(0));
    assert_eq!(loads(FloatKind::BF16, 64, 0, 66, rows), Ok(0));
    // Eight bytes of activations in F16, and sixteen.
    assert_eq!(loads(FloatKind::BF16, 64, 0, 68, rows), Ok(8));
    assert_eq!(loads(FloatKind::BF16, 64, 0, 72, rows), Ok(16));
    assert_eq!(loads(FloatKind::BF16, 64, 0, 66, columns), Ok(16));
}

#[test]
fn weights_off_their_elements_are_refused() {
    for (kind, shift) in [(FloatKind::BF16, 1), (FloatKind::F32, 2)] {
        let error = loads(kind, 64, shift, 64, Direction::Rows).unwrap_err();
        assert!(error.contains("`weight`") && error.contains("bytes"), "{error}");
    }
}
