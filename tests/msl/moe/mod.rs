//! Experts and their router: metal/moe.metal, metal/router.metal.

pub mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
pub mod router;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::linear::cases::{DTYPES, KINDS};
use crate::{bound, nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::fp4::Factor;
use candle_mmfp4::ops::FusedMoe;
use cases::{Case, Goes, PLAIN, Stored};

/// Runs a case's op with these ids; the output.
fn run(backend: &Backend, case: &Case, op: &FusedMoe, ids: &[u32]) -> candle_core::Result<Vec<f32>> {
    let (x, ids, weights) = (case.x()?, case.of_slots(ids), case.of_slots(&case.weights()));
    let y = backend.run(|device| {
        op.forward(
            &x.to_device(device)?,
            &ids.to_device(device)?,
            &weights.to_device(device)?,
        )
    })?;
    assert_eq!((y.dims(), y.dtype()), (x.dims(), x.dtype()));
    Ok(values(&y))
}

fn check(backend: &Backend, case: &Case) -> f64 {
    let (op, ids) = (case.op(), case.ids());
    let y = run(backend, case, &op, &ids).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let error = nmse(&y, &case.expected(&op, &ids));
    assert!(error <= bound(case.dtype), "{case:?}: NMSE {error:e}");
    error
}

#[test]
fn experts_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    let cases = cases::grid();
    let mut worst = DTYPES.map(|dtype| (dtype, 0.0f64));
    for case in &cases {
        let error = check(&backend, case);
        for (dtype, worst) in &mut worst {
            if *dtype == case.dtype {
                *worst = worst.max(error);
            }
        }
    }
    println!("{} cases; largest NMSE {worst:?}", cases.len());
}

#[test]
fn every_number_of_tokens_an_expert() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97] {
        for goes in [Goes::Everywhere, Goes::Rarely, Goes::Together, Goes::Twice] {
            for (top_k, shared) in [(1, 0), (2, 1), (4, 2)] {
                let case = Case {
                    tokens,
                    goes,
                    top_k,
                    shared,
                    shared_width: 64,
                    ..Case::default()
                };
                check(&backend, &case);
            }
        }
    }
}

#[test]
fn a_gated_mlp_is_one_shared_expert() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [1, 3, 8, 9, 33] {
        for (dtype, kind) in DTYPES.into_iter().zip(KINDS) {
            let stored = Stored { kind, ..PLAIN };
            let case = Case {
                tokens,
                dtype,
                d: 96,
                shared_width: 160,
                gate_up: stored,
                down: stored,
                ..Case::default()
            };
            let (op, x) = (case.mlp(), case.x().unwrap());
            let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
            let error = nmse(&values(&y), &case.expected_of_mlp(&op));
            assert!(error <= bound(dtype), "{case:?}: NMSE {error:e}");
        }
    }
}

#[test]
fn leading_dimensions_and_other_weights_are_taken() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [6, 12] {
        let case = Case {
            tokens,
            ..Case::default()
        };
        let (op, ids) = (case.op(), case.ids());
        let shape = (2, tokens / 2, ());
        let batched = |tensor: Tensor| tensor.reshape(shape).unwrap();
        let x = batched(case.x().unwrap());
        // Ids that lie otherwise, weights in BF16.
        let lying = batched(case.of_slots(&ids)).transpose(0, 2).unwrap();
        let lying = lying.contiguous().unwrap().transpose(0, 2).unwrap();
        let weights = batched(case.of_slots(&case.weights()))
            .to_dtype(DType::BF16)
            .unwrap();
        let y = backend
            .run(|device| {
                op.forward(
                    &x.to_device(device)?,
                    &lying.to_device(device)?,
                    &weights.to_device(device)?,
                )
            })
            .unwrap();
        assert_eq!(y.dims(), x.dims());
        // Rounding of the weights, not of the sums.
        assert!(nmse(&values(&y), &case.expected(&op, &ids)) <= 1e-4, "{tokens}");
    }
}

#[test]
fn an_id_that_names_no_expert_gives_nan_in_its_token_only() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [3, 40] {
        for bad in [5, 6, 1000, u32::MAX] {
            let case = Case {
                tokens,
                ..Case::default()
            };
            let (op, right) = (case.op(), case.ids());
            let mut ids = right.clone();
            ids[case.top_k + 1] = bad;
            let y = run(&backend, &case, &op, &ids).unwrap();
            let mut expected = case.expected(&op, &right);
            let of_token = case.d..2 * case.d;
            assert!(
                y[of_token.clone()].iter().all(|v| v.is_nan()),
                "{tokens} tokens, {bad}"
            );
            let mut y = y;
            y.drain(of_token.clone());
            expected.drain(of_token);
            let error = nmse(&y, &expected);
            assert!(error <= 1e-9, "{tokens} tokens, {bad}: {error:e}");
        }
    }
}

#[test]
fn nan_stays_visible_in_its_token() {
    let Some(backend) = Backend::start() else { return };
    for tokens in [2, 33] {
        let case = Case {
            tokens,
            ..Case::default()
        };
        let op = case.op();
        let mut x = values(&case.x().unwrap());
        x[case.d + 3] = f32::NAN;
        let x = Tensor::from_vec(x, (tokens, case.d), &Device::Cpu).unwrap();
        let (ids, weights) = (case.of_slots(&case.ids()), case.of_slots(&case.weights()));
        let y = backend
            .run(|device| {
                op.forward(
                    &x.to_device(device)?,
                    &ids.to_device(device)?,
                    &weights.to_device(device)?,
                )
            })
            .unwrap();
        for (token, row) in values(&y).chunks_exact(case.d).enumerate() {
            let nan = row.iter().all(|v| v.is_nan());
            assert!(
                nan == (token == 1) && (nan || row.iter().all(|v| v.is_finite())),
                "{token}"
            );
        }
    }
}

#[test]
fn mixtures_of_factors_are_taken_where_they_agree() {
    let Some(backend) = Backend::start() else { return };
    let case = |factor| Case {
        gate_up: Stored { factor, ..PLAIN },
        ..Case::default()
    };
    let plain = case(Factor::None).op();
    for factor in [Factor::Mul(0.5), Factor::Div(2.5)] {
        // Experts of two ops in one: those without a factor have one of 1.
        let with = case(factor).op();
        let experts = [&plain.experts()[..2], &with.experts()[2..]].concat();
        let op = FusedMoe::new(experts, plain.shared().to_vec()).unwrap();
        assert!(op.copied_bytes() > 0);
        let case = case(factor);
        let y = run(&backend, &case, &op, &case.ids()).unwrap();
        let error = nmse(&y, &case.expected(&op, &case.ids()));
        assert!(error <= 1e-9, "{factor:?}: {error:e}");
    }
}

/// The floor of each launch: every byte once, however tiles and slots share them.
#[cfg(target_os = "linux")]
#[test]
fn launches_tell_what_they_move_and_compute() {
    use candle_mmfp4::metal::host::Host;
    use candle_mmfp4::metal::plan::Work;
    let works = |case: Case| {
        let (op, x) = (case.op(), case.x().unwrap());
        let (ids, weights) = (case.of_slots(&case.ids()), case.of_slots(&case.weights()));
        let host = std::sync::Arc::new(Host::recorder(false));
        host.install(|| op.forward(&x, &ids, &weights)).unwrap();
        let launches = host.recorded().remove(0).plan.launches;
        launches.into_iter().map(|launch| launch.work).collect::<Vec<_>>()
    };
    // Two of five routed experts of 32 × 64, and one shared: codes of half a byte, scales of two bytes a group of 32.
    let case = Case {
        dtype: DType::F16,
        ..Case::default()
    };
    let matrices = |experts: u64, count: u64| experts * (count * (32 * 64 / 2 + 32 * 64 / 32 * 2) + 64);
    let h = 3 * 32 * 4;
    let expected = [
        Work {
            weights: matrices(3, 2),
            read: 64 * 2 + 2 * 4,
            written: h,
            operations: 3 * 2 * 2 * 32 * 64,
        },
        Work {
            weights: matrices(3, 1),
            read: h + 2 * 8,
            written: 64 * 2,
            operations: 3 * 2 * 32 * 64,
        },
    ];
    assert_eq!(works(case), expected);
    // All six, by 30 tokens; 60 slots of five experts are at most (60 + 5 · 31) / 32 tiles, those of the shared one are one.
    let (h, z) = (30 * h, 30 * 3 * 64 * 4);
    let expected = [
        Work {
            read: 60 * 4,
            written: 90 * 4 + 7 * 12,
            ..Work::default()
        },
        Work {
            weights: matrices(6, 2),
            read: 30 * 64 * 2 + 60 * 4,
            written: h,
            operations: 90 * 2 * 2 * 32 * 64,
        },
        Work {
            weights: matrices(6, 1),
            read: h,
            written: z,
            operations: 90 * 2 * 32 * 64,
        },
        Work {
            read: z + 60 * 8,
            written: 30 * 64 * 2,
            ..Work::default()
        },
    ];
    assert_eq!(works(Case { tokens: 30, ..case }), expected);
}

/// On Linux the CPU runs what no kernel takes; a device refuses it.
#[cfg(target_os = "linux")]
#[test]
fn what_no_kernel_takes_is_not_launched() {
    use candle_mmfp4::cpu::Expert;
    use candle_mmfp4::fp4::{Bytes, DenseTensor, FloatKind, Weight};
    use candle_mmfp4::metal::host::Host;
    let case = Case::default();
    let plain = case.op();
    let other = Case {
        down: Stored {
            kind: KINDS[2],
            ..PLAIN
        },
        shared: 2,
        shared_width: 64,
        ..case
    }
    .op();
    let bytes = Bytes::copy_from(&vec![0; 32 * 64 * 2]).unwrap();
    let dense = Weight::from(DenseTensor::new("w", (32, 64), FloatKind::BF16, bytes).unwrap());
    let mut half = plain.experts().to_vec();
    half[3] = Expert {
        gate: dense,
        ..half[3].clone()
    };
    let with = |experts: Vec<Expert>, shared: Vec<Expert>| FusedMoe::new(experts, shared).unwrap();
    let mixed = [&plain.experts()[..2], &other.experts()[2..]].concat();
    let widths = vec![plain.shared()[0].clone(), other.shared()[0].clone()];
    let refused = [
        ("one in BF16", with(half, Vec::new())),
        ("two kinds of scales", with(mixed, Vec::new())),
        (
            "two widths of shared ones",
            with(plain.experts().to_vec(), widths),
        ),
    ];
    let planned = |op: &FusedMoe| {
        let host = std::sync::Arc::new(Host::recorder(false));
        let (x, ids) = (case.x().unwrap(), case.of_slots(&case.ids()));
        let weights = case.of_slots(&case.weights());
        host.install(|| op.forward(&x, &ids, &weights)).unwrap();
        host.recorded().len()
    };
    assert_eq!(planned(&plain), 1);
    for (what, op) in refused {
        assert_eq!(planned(&op), 0, "{what}");
    }
    // Misaligned: an error, where a device would run it.
    let odd = Case {
        gate_up: Stored { shift: 2, ..PLAIN },
        ..case
    };
    let host = std::sync::Arc::new(Host::recorder(false));
    let error = host
        .install(|| {
            odd.op().forward(
                &odd.x()?,
                &odd.of_slots(&odd.ids()),
                &odd.of_slots(&odd.weights()),
            )
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("codes") && error.contains("4 bytes"), "{error}");
}
