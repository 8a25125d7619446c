//! Products with FP4 weights: metal/linear.metal.

pub mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod plan_faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::{bound, nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, HeadRows, reference};
use candle_mmfp4::fp4::{Factor, Weight};
use candle_mmfp4::ops::{JoinedLinear, Linear, Orientation, PerHead};
use cases::{Case, Lies, side_by_side};

#[test]
fn linear_agrees_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    let cases = if crate::full() {
        cases::all()
    } else {
        cases::pairwise()
    };
    let mut worst = [(DType::F32, 0.0), (DType::F16, 0.0), (DType::BF16, 0.0)];
    for case in &cases {
        let error = case
            .run(&backend)
            .unwrap_or_else(|error| panic!("{case:?}: {error}"));
        let bound = bound(case.dtype);
        assert!(error <= bound, "{case:?}: NMSE {error:e}, at most {bound:e}");
        for (dtype, worst) in &mut worst {
            if *dtype == case.dtype && error > *worst {
                *worst = error;
            }
        }
    }
    println!("{} cases; largest NMSE {worst:?}", cases.len());
}

#[test]
fn every_tile_boundary() {
    let Some(backend) = Backend::start() else { return };
    for m in [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 65] {
        for n in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65] {
            for k in [16, 32, 48, 80] {
                let case = Case {
                    m,
                    n,
                    k,
                    group: 16,
                    ..Case::default()
                };
                let error = case
                    .run(&backend)
                    .unwrap_or_else(|error| panic!("{case:?}: {error}"));
                assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
            }
        }
    }
}

#[test]
fn each_head_in_both_orientations() {
    let Some(backend) = Backend::start() else { return };
    let heads = [
        HeadRows {
            heads: 1,
            stride: 40,
            start: 0,
            len: 40,
        },
        HeadRows {
            heads: 3,
            stride: 40,
            start: 0,
            len: 24,
        },
        HeadRows {
            heads: 3,
            stride: 40,
            start: 24,
            len: 16,
        },
        HeadRows {
            heads: 2,
            stride: 100,
            start: 1,
            len: 65,
        },
    ];
    for rows in heads {
        for (k, group) in [(16, 16), (64, 64), (288, 32), (512, 128)] {
            let weight = cases::weight((rows.heads * rows.stride, k), group, cases::KINDS[rows.heads], 4);
            for orientation in [Orientation::Ordinary, Orientation::Transposed] {
                for m in [1, 2, 3, 4, 5, 8, 9, 33] {
                    for dtype in cases::DTYPES {
                        let op = PerHead::new(Weight::from(weight.clone()), rows, orientation).unwrap();
                        let width = if orientation == Orientation::Ordinary {
                            k
                        } else {
                            rows.len
                        };
                        let x = cases::activations((m, rows.heads * width), dtype, m as u64);
                        let x32 = values(&x);
                        let x = x.reshape((m, rows.heads, width)).unwrap();
                        let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
                        let weight = Weight::from(weight.clone());
                        let expected = match orientation {
                            Orientation::Ordinary => {
                                reference::per_head(&weight, rows, &x32, m, Arithmetic::Exact)
                            }
                            Orientation::Transposed => reference::per_head_transposed(&weight, rows, &x32, m),
                        };
                        let error = nmse(&values(&y), &expected);
                        let what = format!("{rows:?} {orientation:?} k {k} m {m} {dtype:?}");
                        assert!(error <= bound(dtype), "{what}: {error:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn several_weights_stand_side_by_side() {
    let Some(backend) = Backend::start() else { return };
    let parts = [(40, 128, 0), (9, 64, 3), (33, 32, 2)];
    let linear = |&(n, group, kind): &(usize, usize, usize)| {
        let weight = cases::weight((n, 384), group, cases::KINDS[kind], 8);
        let bias = (n == 9).then(|| crate::noise(n, 5));
        Linear::new(Weight::from(weight), bias).unwrap()
    };
    let op = JoinedLinear::new(parts.iter().map(linear).collect()).unwrap();
    for m in [1, 5, 40] {
        let x = cases::activations((m, 384), DType::F32, 3);
        let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
        let mut start = 0;
        for (part, (n, ..)) in op.parts().iter().zip(parts) {
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
fn weights_with_many_rows() {
    let Some(backend) = Backend::start() else { return };
    for (i, (n, k)) in [(2051, 64), (2051, 1040), (8195, 528)].into_iter().enumerate() {
        for m in [1, 2, 7] {
            let case = Case {
                m,
                n,
                k,
                group: 16,
                dtype: cases::DTYPES[(i + m) % 3],
                ..Case::default()
            };
            let error = case.run(&backend).unwrap();
            assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
        }
    }
}

/// Eight rows of the weight a simdgroup: whole turns over K, what is left for half simdgroups, and both.
#[test]
fn weights_with_very_many_rows() {
    let Some(backend) = Backend::start() else { return };
    for (i, (n, k, group)) in [(32_771, 96, 32), (32_773, 1024, 128), (32_775, 1568, 16)]
        .into_iter()
        .enumerate()
    {
        let case = Case {
            m: 1,
            n,
            k,
            group,
            dtype: cases::DTYPES[i],
            bias: i == 2,
            ..Case::default()
        };
        let error = case.run(&backend).unwrap();
        assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
    }
}

#[test]
fn a_norm_is_multiplied_in_place_of_its_input() {
    let Some(backend) = Backend::start() else { return };
    let shapes = [
        (1, 16, 16),
        (7, 48, 16),
        (9, 64, 32),
        (65, 528, 16),
        (33, 1152, 128),
        (6, 4128, 32),
        (2050, 64, 64),
    ];
    let lies = [
        Lies::Together,
        Lies::Offset,
        Lies::WideRows,
        Lies::OddRows,
        Lies::Transposed,
    ];
    for (i, (n, k, group)) in shapes.into_iter().enumerate() {
        for m in [1, 2, 3, 4, 5, 8, 9] {
            let case = Case {
                m,
                n,
                k,
                group,
                dtype: cases::DTYPES[(i + m) % 3],
                // Scales in E4M3 are large: sums of many would overflow half.
                kind: cases::KINDS[(i + m) % if k > 600 { 3 } else { 4 }],
                bias: m == 2,
                lies: lies[(i * 3 + m) % lies.len()],
                ..Case::default()
            };
            let (op, x) = (case.normed([0.0, 1e-5, 0.25][m % 3]), case.x().unwrap());
            let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
            let expected = case.expected_of_norm(&op, &values(&x.contiguous().unwrap()));
            let error = nmse(&values(&y), &expected);
            // Beyond eight rows the norm is rounded before it is multiplied.
            let bound = bound(case.dtype) * if m > 8 { 2.0 } else { 1.0 };
            assert!(error <= bound, "{case:?}: {error:e}");
        }
    }
}

#[test]
fn two_weights_of_one_kind_stand_side_by_side() {
    let Some(backend) = Backend::start() else { return };
    for (i, (n, other, k, group)) in [
        (1, 1, 16, 16),
        (8, 9, 48, 16),
        (65, 7, 1152, 128),
        (2040, 33, 64, 32),
        (5, 2050, 544, 32),
    ]
    .into_iter()
    .enumerate()
    {
        for m in [1, 2, 4, 5, 8, 9, 33] {
            let first = Case {
                m,
                n,
                k,
                group,
                dtype: cases::DTYPES[(i + m) % 3],
                kind: cases::KINDS[(i + m) % if k > 600 { 3 } else { 4 }],
                factor: Factor::Div(3.0),
                shift: 4 * (i % 2),
                ..Case::default()
            };
            let second = Case {
                n: other,
                factor: Factor::Div(0.37),
                shift: 0,
                ..first
            };
            let op = JoinedLinear::new(vec![first.op(), second.op()]).unwrap();
            let x = first.x().unwrap();
            let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
            let x = values(&x);
            let [a, b] = op.parts() else {
                unreachable!("two parts")
            };
            let expected = side_by_side(&[(n, first.expected(a, &x)), (other, second.expected(b, &x))], m);
            let error = nmse(&values(&y), &expected);
            assert!(error <= bound(first.dtype), "{first:?} {other}: {error:e}");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn two_weights_of_one_kind_take_one_launch() {
    use candle_mmfp4::metal::host::Host;
    let plain = Case::default();
    let launches = |m: usize, first: Case, second: Case| {
        let op = JoinedLinear::new(vec![first.op(), second.op()]).unwrap();
        let host = std::sync::Arc::new(Host::recorder(false));
        let x = cases::activations((m, plain.k), DType::F32, 1);
        host.install(|| op.forward(&x)).unwrap();
        host.recorded().remove(0).plan.launches.len()
    };
    assert_eq!(launches(1, plain, plain), 1);
    assert_eq!(launches(8, plain, Case { n: 3, ..plain }), 1);
    assert_eq!(launches(9, plain, plain), 2, "tiles");
    let others = [
        Case { group: 64, ..plain },
        Case {
            kind: cases::KINDS[1],
            ..plain
        },
        Case {
            factor: Factor::Mul(2.0),
            ..plain
        },
        Case { bias: true, ..plain },
    ];
    for other in others {
        assert_eq!(launches(1, plain, other), 2, "{other:?}");
        assert_eq!(launches(1, other, plain), 2, "{other:?}");
    }
}

#[test]
fn nan_and_infinity_stay_visible_in_their_row() {
    let Some(backend) = Backend::start() else { return };
    let weight = Weight::from(cases::weight((40, 64), 32, cases::KINDS[0], 0));
    let op = Linear::new(weight, None).unwrap();
    for m in [1, 4, 40] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = crate::noise(m * 64, 7);
            x[(m - 1) * 64 + 13] = bad;
            let x = Tensor::from_vec(x, (m, 64), &Device::Cpu).unwrap();
            let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
            let y = values(&y);
            let (before, last) = y.split_at((m - 1) * 40);
            assert!(before.iter().all(|v| v.is_finite()), "m {m} {bad}");
            assert!(last.iter().any(|v| !v.is_finite()), "m {m} {bad}");
        }
    }
}

#[test]
fn what_lies_irregularly_is_taken_too() {
    let Some(backend) = Backend::start() else { return };
    for lies in [Lies::Transposed, Lies::Batches] {
        let case = Case {
            m: 12,
            lies,
            ..Case::default()
        };
        let error = case.run(&backend).unwrap();
        assert!(error <= 1e-9, "{lies:?}: {error:e}");
    }
}
