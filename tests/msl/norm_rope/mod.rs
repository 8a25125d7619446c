//! Norms, rotary position embedding, sums and what MLA keeps of a token: metal/norm_rope.metal.

pub mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::linear::cases::DTYPES;
use crate::{bound, nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::metal::norm_rope::{self, Angles, every_kernel};
use candle_mmfp4::metal::plan::{Constant, Launch};
use candle_mmfp4::nn::RmsNorm;
use candle_mmfp4::ops::{Add, add_norm};
use cases::{PAIRINGS, Rows, Tokens, together};

/// Two outputs as one, which a backend gives back.
fn both(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::cat(&[a.flatten_all()?, b.flatten_all()?], 0)
}

#[test]
fn norms_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    for case in cases::grid() {
        let (op, x) = (case.norm(), case.x().unwrap());
        let y = backend.run(|device| op.forward(&x.to_device(device)?)).unwrap();
        let error = nmse(&values(&y), &case.normed(&x));
        assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
    }
}

#[test]
fn sums_and_their_norms_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    for case in cases::grid() {
        let (op, x, delta) = (case.norm(), case.x().unwrap(), case.delta().unwrap());
        let sum = case.sum(&x, &delta);
        let all = backend.run(|device| {
            let (sum, normed) = add_norm(&x.to_device(device)?, &delta.to_device(device)?, &op)?;
            assert_eq!((sum.dims(), normed.dims()), (x.dims(), x.dims()));
            both(&sum, &normed)
        });
        let all = values(&all.unwrap());
        let (found, normed) = all.split_at(all.len() / 2);
        assert_eq!(found, values(&sum), "{case:?}");
        let error = nmse(normed, &case.normed(&sum));
        assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
        let alone = backend.run(|device| Add.forward(&x.to_device(device)?, &delta.to_device(device)?));
        assert_eq!(values(&alone.unwrap()), values(&sum), "{case:?}");
    }
}

#[test]
fn turned_heads_and_kept_rows_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    for case in cases::tokens() {
        let (kv, queries) = (case.kv().unwrap(), case.queries().unwrap());
        let (cos, sin) = case.angles().unwrap();
        let (turned, kept) = (case.turned(&queries), case.kept(&kv));
        let on = |device: &Device| -> candle_core::Result<[Tensor; 4]> {
            Ok([
                kv.to_device(device)?,
                queries.to_device(device)?,
                cos.to_device(device)?,
                sin.to_device(device)?,
            ])
        };
        let check = |found: &[f32], expected: &[f32], what: &str| {
            let error = nmse(found, expected);
            assert!(error <= bound(case.dtype), "{what} {case:?}: {error:e}");
        };
        let alone = backend.run(|device| {
            let [_, queries, cos, sin] = on(device)?;
            case.rope().forward(&queries, &cos, &sin)
        });
        check(&values(&alone.unwrap()), &turned, "rope");
        let op = case.latent_rows();
        let alone = backend.run(|device| {
            let [kv, _, cos, sin] = on(device)?;
            op.forward(&kv, &cos, &sin)
        });
        check(&values(&alone.unwrap()), &kept, "rows");
        let together = backend.run(|device| {
            let [kv, queries, cos, sin] = on(device)?;
            let (rows, queries) = op.forward_with_queries(&kv, &queries, &cos, &sin)?;
            both(&rows, &queries)
        });
        let together = values(&together.unwrap());
        check(&together[..kept.len()], &kept, "rows beside queries");
        check(&together[kept.len()..], &turned, "queries beside rows");
    }
}

#[test]
fn the_cpu_gives_the_bits_of_its_steps() {
    for dtype in DTYPES {
        let case = Tokens {
            dtype,
            tokens: 5,
            ..Tokens::default()
        };
        let (kv, queries) = (case.kv().unwrap(), case.queries().unwrap());
        let (cos, sin) = case.angles().unwrap();
        let op = case.latent_rows();
        let (rows, turned) = op.forward_with_queries(&kv, &queries, &cos, &sin).unwrap();
        let latents = op.norm().forward(&kv.narrow(1, 0, case.latent).unwrap()).unwrap();
        let keys = kv.narrow(1, case.latent, 2 * case.pairs).unwrap();
        let keys = case
            .rope()
            .forward(&keys.unsqueeze(1).unwrap(), &cos, &sin)
            .unwrap();
        let steps = Tensor::cat(&[latents, keys.squeeze(1).unwrap()], 1).unwrap();
        assert_eq!(values(&rows), values(&steps), "{dtype:?}");
        assert_eq!(values(&op.forward(&kv, &cos, &sin).unwrap()), values(&steps));
        let alone = case.rope().forward(&queries, &cos, &sin).unwrap();
        assert_eq!(values(&turned), values(&alone), "{dtype:?}");

        let case = Rows {
            dtype,
            ..Rows::default()
        };
        let (x, delta) = (case.x().unwrap(), case.delta().unwrap());
        let (sum, normed) = add_norm(&x, &delta, &case.norm()).unwrap();
        let alone = Add.forward(&x, &delta).unwrap();
        assert_eq!(values(&sum), values(&alone), "{dtype:?}");
        assert_eq!(values(&normed), values(&case.norm().forward(&alone).unwrap()));
    }
}

#[test]
fn nan_and_infinity_stay_visible_in_their_row() {
    let Some(backend) = Backend::start() else { return };
    for d in [7, 64, 2052] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = noise(3 * d, 7);
            x[d + 5] = bad;
            let x = Tensor::from_vec(x, (3, d), &Device::Cpu).unwrap();
            let norm = RmsNorm::new(vec![1.0; d], 1e-6).unwrap();
            let y = backend.run(|device| norm.forward(&x.to_device(device)?));
            let added = backend.run(|device| {
                let x = x.to_device(device)?;
                let (sum, normed) = add_norm(&x.zeros_like()?, &x, &norm)?;
                Tensor::cat(&[sum, normed], 0)
            });
            let added = values(&added.unwrap());
            assert!(!added[d + 5].is_finite(), "{d} {bad}");
            for y in [values(&y.unwrap()), added[3 * d..].to_vec()] {
                let finite = |row: usize| y[row * d..(row + 1) * d].iter().all(|v| v.is_finite());
                assert!(finite(0) && !finite(1) && finite(2), "{d} {bad}");
            }
        }
    }
}

#[test]
fn nothing_gives_nothing() {
    let Some(backend) = Backend::start() else { return };
    let none = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let norm = RmsNorm::new(vec![1.0; 8], 1e-6).unwrap();
    let done = backend.run(|device| {
        let x = none(&[0, 8]).to_device(device)?;
        assert_eq!(norm.forward(&x)?.dims(), [0, 8]);
        assert_eq!(add_norm(&x, &x, &norm)?.1.dims(), [0, 8]);
        Add.forward(&x, &x)
    });
    assert_eq!(done.unwrap().dims(), [0, 8]);
    let case = Tokens {
        latent: 8,
        ..Tokens::default()
    };
    let rows = backend.run(|device| {
        let angles = none(&[0, 4]).to_device(device)?;
        let queries = none(&[0, 2, 8]).to_device(device)?;
        let kv = none(&[0, 16]).to_device(device)?;
        case.latent_rows()
            .forward_with_queries(&kv, &queries, &angles, &angles)?;
        case.rope().forward(&queries, &angles, &angles)
    });
    assert_eq!(rows.unwrap().dims(), [0, 2, 8]);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    // With kernels and without.
    let refused = |backend: Option<&Backend>| {
        let run = |op: &dyn Fn(&Device) -> candle_core::Result<Tensor>| match backend {
            Some(backend) => backend.run(|device| op(device)).unwrap_err().to_string(),
            None => op(&Device::Cpu).unwrap_err().to_string(),
        };
        let zeros = |shape: &[usize], device: &Device| Tensor::zeros(shape, DType::F32, device);
        let norm = RmsNorm::new(vec![1.0; 8], 1e-6).unwrap();
        let error = run(&|device| norm.forward(&zeros(&[2, 7], device)?));
        assert!(error.contains("`x`"), "{error}");
        let error = run(&|device| {
            let delta = zeros(&[2, 8], device)?.to_dtype(DType::F16)?;
            Ok(add_norm(&zeros(&[2, 8], device)?, &delta, &norm)?.0)
        });
        assert!(error.contains("`delta`") && error.contains("F16"), "{error}");
        let error = run(&|device| Add.forward(&zeros(&[2, 8], device)?, &zeros(&[1, 8], device)?));
        assert!(error.contains("`b`"), "{error}");
        let case = Tokens {
            latent: 8,
            ..Tokens::default()
        };
        for (name, kv, queries, angles) in [
            ("`kv`", [2, 15], [2, 1, 8], [2, 4]),
            ("`cos`", [2, 16], [2, 1, 8], [3, 4]),
            ("`queries`", [2, 16], [2, 1, 6], [2, 4]),
            ("`queries`", [2, 16], [1, 1, 8], [2, 4]),
        ] {
            let error = run(&|device| {
                let angles = zeros(&angles, device)?;
                let (kv, queries) = (zeros(&kv, device)?, zeros(&queries, device)?);
                let (rows, _) = case
                    .latent_rows()
                    .forward_with_queries(&kv, &queries, &angles, &angles)?;
                Ok(rows)
            });
            assert!(error.contains(name), "{error}");
        }
        let error = run(&|device| {
            let x = zeros(&[2, 1, 8], device)?;
            case.rope()
                .forward(&x, &zeros(&[2, 4], device)?, &zeros(&[2, 3], device)?)
        });
        assert!(error.contains("`sin`"), "{error}");
    };
    refused(None);
    if let Some(backend) = Backend::start() {
        refused(Some(&backend));
    }
}

fn wide(launch: &Launch) -> bool {
    launch.constants.contains(&(16, Constant::Bool(true)))
}

#[test]
fn four_elements_are_taken_at_once_where_they_are_aligned_and_only_there() {
    let norm = |d, offset, row| {
        let x = norm_rope::Rows {
            operand: 1,
            offset,
            row,
        };
        let norm = norm_rope::RmsNorm {
            dtype: DType::F16,
            rows: 2,
            d,
            eps: 0.0,
            x,
            added: None,
            weight: 0,
            y: 2,
        };
        wide(&norm.launch().unwrap())
    };
    assert!(norm(2048, 0, 2048) && norm(768, 8, 1344));
    assert!(!norm(2049, 0, 2052) && !norm(2048, 4, 2048) && !norm(2048, 0, 2050));
    let rows = |latent, pairs, offset| {
        let at = |operand, row| norm_rope::Rows {
            operand,
            offset: 0,
            row,
        };
        let op = norm_rope::LatentRows {
            dtype: DType::BF16,
            tokens: 1,
            latent,
            eps: 0.0,
            kv: norm_rope::Rows {
                operand: 1,
                offset,
                row: 1344,
            },
            weight: 0,
            angles: Angles {
                pairing: PAIRINGS[0],
                pairs,
                cos: at(2, pairs),
                sin: at(3, pairs),
            },
            rows: 4,
            queries: None,
        };
        wide(&op.launch().unwrap())
    };
    assert!(rows(512, 32, 768 * 2));
    assert!(!rows(512, 33, 0) && !rows(510, 33, 0) && !rows(512, 32, 4));
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let x = norm_rope::Rows {
        operand: 0,
        offset: 0,
        row: 1 << 32,
    };
    let add = norm_rope::Add {
        dtype: DType::F32,
        rows: 1,
        d: 8,
        a: x,
        b: x,
        y: 1,
    };
    let error = add.launch().unwrap_err().to_string();
    assert!(error.contains("2^32"), "{error}");
    let error = every_kernel(DType::U32, PAIRINGS[0]).unwrap_err().to_string();
    assert!(error.contains("F32, F16 or BF16"), "{error}");
}

#[test]
fn what_lies_irregularly_is_taken_too() {
    let Some(backend) = Backend::start() else { return };
    let case = Rows {
        rows: 6,
        d: 12,
        ..Rows::default()
    };
    // Heads in the middle: neither rows one stride apart nor elements together.
    let x = case
        .x()
        .unwrap()
        .reshape((2, 3, 12))
        .unwrap()
        .transpose(0, 1)
        .unwrap();
    for x in [x.clone(), x.transpose(1, 2).unwrap()] {
        let norm = RmsNorm::new(noise(*x.dims().last().unwrap(), 3), 1e-5).unwrap();
        let y = backend.run(|device| norm.forward(&x.to_device(device)?)).unwrap();
        let expected = candle_mmfp4::cpu::reference::rms_norm(&together(&x), norm.weight(), 1e-5);
        assert!(nmse(&values(&y), &expected) <= 1e-9);
        let sum = backend.run(|device| Add.forward(&x.to_device(device)?, &x.to_device(device)?));
        let twice: Vec<f32> = together(&x).iter().map(|v| 2.0 * v).collect();
        assert_eq!(values(&sum.unwrap()), twice);
    }
}
