//! New tokens into a paged cache's pool: metal/append.metal.

mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::{bound, nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::PagedSequence;
use candle_mmfp4::kv::{CacheFormat, RowLayout};
use candle_mmfp4::metal::append::every_kernel;
use candle_mmfp4::ops::{AppendHeads, PagedBatch};
use cases::{Heads, Latents, Numbers, decoded};

fn bytes(pool: &Tensor) -> Vec<u8> {
    pool.to_vec1().unwrap()
}

/// The pool that a backend leaves, and queries turned.
fn stored(
    backend: &Backend,
    case: &Latents,
    kv: &Tensor,
    with_queries: bool,
) -> candle_core::Result<(Vec<u8>, Option<Tensor>)> {
    let mut turned = None;
    let pool = backend.run(|device| {
        let (pool, queries) = case.append(kv, with_queries, device)?;
        turned = queries
            .map(|queries| queries.to_device(&Device::Cpu))
            .transpose()?;
        Ok(pool)
    })?;
    Ok((bytes(&pool), turned))
}

/// Where a sum in another order tips a number to the other side of a border between codes, which coarse formats show.
fn bound_of(format: CacheFormat) -> f64 {
    match format {
        CacheFormat::F16 => 1e-8,
        _ => 1e-4,
    }
}

#[test]
fn latents_are_stored_as_on_the_cpu_over_the_grid() {
    let Some(backend) = Backend::alone() else { return };
    for case in cases::latents() {
        let (kv, layout) = (case.kv().unwrap(), case.layout());
        let with_queries = case.rope > 0;
        let (expected, queries) = case.append(&kv, with_queries, &Device::Cpu).unwrap();
        let expected = bytes(&expected);
        let (alone, _) = stored(&backend, &case, &kv, false).unwrap();
        let (found, turned) = stored(&backend, &case, &kv, with_queries).unwrap();
        assert!(alone == found, "{case:?}: with queries and without");
        let numbers = |pool: &[u8]| decoded(&layout, pool, case.tokens);
        let error = nmse(&numbers(&found), &numbers(&expected));
        assert!(error <= bound_of(case.format), "{case:?}: {error:e}");
        // What a GPU makes of a root and of products in a row may differ in the last bit.
        if case.exact && cfg!(target_os = "linux") {
            assert!(found == expected, "{case:?}: not the bytes");
        }
        if let (Some(turned), Some(queries)) = (turned, queries) {
            assert_eq!(turned.dims(), queries.dims());
            let error = nmse(&values(&turned), &values(&queries));
            assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
        }
    }
    assert!(!backend.on_cpu().iter().any(|op| op.contains("append")));
}

#[test]
fn heads_are_stored_bit_for_bit_over_the_grid() {
    let Some(backend) = Backend::alone() else { return };
    for case in cases::heads() {
        let expected = bytes(&case.append(&Device::Cpu).unwrap());
        let found = bytes(&backend.run(|device| case.append(device)).unwrap());
        if case.numbers == Numbers::Extreme && cfg!(not(target_os = "linux")) {
            // A NaN is one, whatever its bits.
            let numbers = |pool: &[u8]| decoded(&case.layout(), pool, case.tokens);
            let both = numbers(&found).into_iter().zip(numbers(&expected));
            assert!(
                both.into_iter().all(|(a, b)| a == b || a.is_nan() && b.is_nan()),
                "{case:?}"
            );
            continue;
        }
        let first = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(first, None, "{case:?}: the first byte that differs");
    }
    assert!(!backend.on_cpu().iter().any(|op| op.contains("append")));
}

#[test]
fn nan_and_infinity_stay_visible_in_their_token() {
    let Some(backend) = Backend::start() else { return };
    for format in CacheFormat::ALL {
        let case = Latents {
            format,
            ..Latents::default()
        };
        let clean = case.kv().unwrap();
        let width = case.latent + case.rope;
        let numbers = |kv: &Tensor| {
            let (pool, _) = stored(&backend, &case, kv, true).unwrap();
            decoded(&case.layout(), &pool, case.tokens)
        };
        let expected = numbers(&clean);
        assert!(expected.iter().all(|x| x.is_finite()));
        for (at, bad) in [
            (3, f32::NAN),
            (3, f32::INFINITY),
            (case.latent + 1, f32::NAN),
            (case.latent + 1, f32::NEG_INFINITY),
        ] {
            let mut kv = values(&clean);
            kv[width + at] = bad;
            let kv = Tensor::from_vec(kv, (case.tokens, width), &Device::Cpu).unwrap();
            let found = numbers(&kv);
            assert!(!found[width + at].is_finite(), "{format}: {bad} at {at}");
            for token in [0, 2, 3, 4] {
                let row = token * width..(token + 1) * width;
                assert_eq!(found[row.clone()], expected[row], "{format}: {bad} at {at}");
            }
        }
    }
}

#[test]
fn nothing_changes_nothing() {
    let Some(backend) = Backend::start() else { return };
    let case = Latents {
        tokens: 0,
        ..Latents::default()
    };
    let kv = Tensor::zeros((0, case.latent + case.rope), DType::F32, &Device::Cpu).unwrap();
    let untouched = bytes(&cases::pool(&case.layout(), &Device::Cpu).unwrap());
    let mut dims = Vec::new();
    let pool = backend.run(|device| {
        let pool = cases::pool(&case.layout(), device)?;
        let batch = PagedBatch::new(&[], 16, device)?;
        let angles = Tensor::zeros((0, case.rope / 2), DType::F32, device)?;
        let queries = Tensor::zeros((0, 2, case.rope), DType::F32, device)?;
        let op = case.op();
        let kv = kv.to_device(device)?;
        let turned = op.forward_with_queries(&pool, &kv, &queries, &angles, &angles, &batch)?;
        dims = turned.dims().to_vec();
        Ok(pool)
    });
    assert!(bytes(&pool.unwrap()) == untouched);
    assert_eq!(dims, [0, 2, 6]);
}

/// With kernels and without.
#[test]
fn what_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let refused = |backend: Option<&Backend>| {
        let case = Latents::default();
        let error = |op: &dyn Fn(&Tensor, &Device) -> candle_core::Result<()>| {
            let run = |device: &Device| {
                let pool = cases::pool(&case.layout(), device)?;
                let error = op(&pool, device).unwrap_err().to_string();
                let untouched = cases::pool(&case.layout(), &Device::Cpu)?;
                assert!(
                    bytes(&pool.to_device(&Device::Cpu)?) == bytes(&untouched),
                    "{error}"
                );
                Ok::<_, candle_core::Error>((error, pool))
            };
            let mut found = String::new();
            match backend {
                Some(backend) => {
                    let done = backend.run(|device| run(device).map(|(error, pool)| (found = error, pool).1));
                    done.unwrap();
                }
                None => found = run(&Device::Cpu).unwrap().0,
            }
            found
        };
        let zeros = |dims: &[usize], device: &Device| Tensor::zeros(dims, DType::F32, device);
        for (name, kv, queries, angles, tokens) in [
            ("`kv`", [5, 69], [5, 3, 6], [5, 3], 5),
            ("`kv`", [4, 70], [5, 3, 6], [5, 3], 5),
            ("`cos`", [5, 70], [5, 3, 6], [5, 4], 5),
            ("`queries`", [5, 70], [5, 3, 4], [5, 3], 5),
            ("`queries`", [5, 70], [4, 3, 6], [5, 3], 5),
        ] {
            let text = error(&|pool, device| {
                let angles = zeros(&angles, device)?;
                let (kv, queries) = (zeros(&kv, device)?, zeros(&queries, device)?);
                let batch = cases::batch(tokens, device)?;
                let op = case.op();
                op.forward_with_queries(pool, &kv, &queries, &angles, &angles, &batch)
                    .map(drop)
            });
            assert!(text.contains(name), "{text}");
        }
        let text = error(&|pool, device| {
            let (kv, angles) = (zeros(&[5, 70], device)?, zeros(&[5, 3], device)?);
            let queries = zeros(&[5, 3, 6], device)?.to_dtype(DType::F16)?;
            let batch = cases::batch(5, device)?;
            let op = case.op();
            op.forward_with_queries(pool, &kv, &queries, &angles, &angles, &batch)
                .map(drop)
        });
        assert!(text.contains("`queries`") && text.contains("F16"), "{text}");
        let text = error(&|pool, device| {
            let (kv, angles) = (zeros(&[1, 70], device)?, zeros(&[1, 3], device)?);
            let beyond = PagedSequence {
                table: &[9],
                len: 1,
                queries: 1,
            };
            let batch = PagedBatch::new(&[beyond], 16, device)?;
            case.op().forward(pool, &kv, &angles, &angles, &batch)
        });
        assert!(text.contains("`slots`"), "{text}");
    };
    refused(None);
    if let Some(backend) = Backend::start() {
        refused(Some(&backend));
    }
}

/// A pool may be a part of a larger tensor: from a multiple of 16 bytes on.
#[test]
fn a_pool_within_a_tensor_is_written_where_it_lies() {
    let Some(backend) = Backend::start() else { return };
    let layout = RowLayout::heads(CacheFormat::Fp8, 1, 4, 4).unwrap();
    let len = layout.pool_bytes(1).unwrap();
    let run = |device: &Device, start: usize| {
        let all = Tensor::from_vec(vec![0u8; 2 * len], 2 * len, &Device::Cpu)?.to_device(device)?;
        let sequence = PagedSequence {
            table: &[0],
            len: 3,
            queries: 1,
        };
        let batch = PagedBatch::new(&[sequence], 16, device)?;
        let x = Tensor::ones((1, 1, 4), DType::F32, device)?;
        let op = AppendHeads::new(layout.clone())?;
        op.forward(&all.narrow(0, start, len)?, &x, &x, &batch)?;
        Ok(all)
    };
    for start in [16, len] {
        let expected = bytes(&run(&Device::Cpu, start).unwrap());
        let found = bytes(&backend.run(|device| run(device, start)).unwrap());
        assert!(
            found == expected && expected.iter().any(|byte| *byte != 0),
            "{start}"
        );
    }
    let error = backend.run(|device| run(device, 7)).unwrap_err().to_string();
    assert!(error.contains("`pool`") && error.contains("16 bytes"), "{error}");
}

#[test]
fn every_format_has_its_constants() {
    let plans = every_kernel(DType::F16, candle_mmfp4::cpu::Pairing::Halves).unwrap();
    let launches = plans.into_iter().flat_map(|plan| plan.launches);
    let told: std::collections::BTreeSet<String> = launches
        .filter(|launch| launch.kernel == "append_heads_f16")
        .map(|launch| format!("{:?}", launch.constants))
        .collect();
    assert_eq!(told.len(), CacheFormat::ALL.len(), "{told:?}");
    let error = every_kernel(DType::U32, candle_mmfp4::cpu::Pairing::Halves).unwrap_err();
    assert!(error.to_string().contains("F32, F16 or BF16"), "{error}");
}

#[test]
fn mixed_dtypes_are_stored_as_they_are() {
    let Some(backend) = Backend::alone() else { return };
    let case = Heads {
        dtypes: [DType::BF16, DType::F16],
        ..Heads::default()
    };
    let expected = bytes(&case.append(&Device::Cpu).unwrap());
    assert!(bytes(&backend.run(|device| case.append(device)).unwrap()) == expected);
    assert!(backend.on_cpu().iter().all(|op| !op.contains("append")));
}
