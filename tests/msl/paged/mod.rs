//! Attention over a paged cache and its tokens as numbers: metal/paged_latents.metal, metal/paged_heads.metal,
//! metal/paged_rows.metal.

mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
mod infinite;
mod plans;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::linear::cases::DTYPES;
use crate::{bound, nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::kv::{CacheFormat, RowKind, codec, hadamard};
use candle_mmfp4::ops::{PagedBatch, gather_paged};
use cases::{Cache, Case, heads, latent};

/// What the kernels give for a cache and queries.
fn attend(backend: &Backend, case: &Case, cache: &Cache, queries: &[Tensor]) -> Tensor {
    let y = backend.run(|device| {
        let queries: Vec<_> = (queries.iter())
            .map(|part| part.to_device(device))
            .collect::<candle_core::Result<_>>()?;
        let pool = cache.tensor().to_device(device)?;
        let parts: Vec<_> = queries.iter().collect();
        Ok(case
            .op(cache)
            .forward(&parts, &pool, &case.batch(cache, device))?)
    });
    y.unwrap_or_else(|error| panic!("{case:?}: {error}"))
}

/// Requires what the reference gives; the error.
fn check(backend: &Backend, case: &Case) -> f64 {
    let (cache, queries) = (case.cache(), case.queries());
    let y = attend(backend, case, &cache, &queries);
    let shape = [case.tokens(), case.heads, case.value()];
    assert_eq!((y.dims(), y.dtype()), (shape.as_slice(), case.dtype));
    let error = error(case, &cache, &queries, &y);
    assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
    error
}

/// The error beside the reference, once numbers are where it has numbers.
fn error(case: &Case, cache: &Cache, queries: &[Tensor], y: &Tensor) -> f64 {
    finite_error(&format!("{case:?}"), &values(y), &case.expected(cache, queries))
}

/// The error of what are numbers, once they are where numbers are expected.
fn finite_error(what: &str, found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "{what}");
    let (mut found_finite, mut expected_finite) = (Vec::new(), Vec::new());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            found.is_finite(),
            expected.is_finite(),
            "{what}: {index}, {found} for {expected}"
        );
        if expected.is_finite() {
            found_finite.push(*found);
            expected_finite.push(*expected);
        }
    }
    nmse(&found_finite, &expected_finite)
}

#[test]
fn paged_attention_agrees_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::alone() else { return };
    let mut worst = 0f64;
    for case in cases::grid() {
        let error = check(&backend, &case);
        if case.dtype == DType::F32 {
            worst = worst.max(error);
        }
    }
    println!("largest NMSE in f32 {worst:e}");
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}

#[test]
fn deep_paged_caches_agree_with_the_reference() {
    let Some(backend) = Backend::start() else { return };
    for (kind, heads) in [
        (latent(512, 64), 20),
        (latent(128, 32), 4),
        (heads(2, 128, 128), 8),
    ] {
        for format in [CacheFormat::BF16, CacheFormat::Fp8, CacheFormat::fp4()] {
            let case = Case {
                kind,
                format,
                heads,
                sequences: vec![(2049, 1), (5, 1)],
                ..Case::default()
            };
            check(&backend, &case);
        }
    }
}

/// Beyond 22 splits of 64 positions splits are longer; beside a longer sequence one may have less than it could.
#[test]
fn splits_grow_with_the_context() {
    let Some(backend) = Backend::start() else { return };
    for (kind, heads) in [(latent(64, 16), 2), (heads(1, 64, 64), 2)] {
        let case = Case {
            kind,
            heads,
            sequences: vec![(1409, 1), (4607, 2), (1408, 1), (300, 1)],
            ..Case::default()
        };
        check(&backend, &case);
    }
}

#[test]
fn a_query_gives_the_same_bits_beside_whatever_others() {
    let Some(backend) = Backend::start() else { return };
    for kind in [latent(128, 32), heads(2, 64, 64)] {
        let case = Case {
            kind,
            heads: 4,
            sequences: vec![(300, 3), (40, 1), (600, 2)],
            ..Case::default()
        };
        let (cache, queries) = (case.cache(), case.queries());
        let together = values(&attend(&backend, &case, &cache, &queries));
        let (each, mut query) = (case.heads * case.value(), 0);
        for (index, (len, count)) in case.sequences.iter().enumerate() {
            for position in len - count..*len {
                let alone = Case {
                    sequences: vec![(position + 1, 1)],
                    ..case.clone()
                };
                let of_one = Cache {
                    layout: cache.layout.clone(),
                    pool: cache.pool.clone(),
                    tables: vec![cache.tables[index].clone()],
                };
                let narrowed: Vec<_> = (queries.iter())
                    .map(|part| part.narrow(0, query, 1).unwrap())
                    .collect();
                let y = values(&attend(&backend, &alone, &of_one, &narrowed));
                assert_eq!(y, together[query * each..][..each], "{kind:?} {position}");
                query += 1;
            }
        }
    }
}

#[test]
fn numbers_that_are_none_stay_visible() {
    let Some(backend) = Backend::start() else { return };
    let of = |kind, format| Case {
        kind,
        format,
        heads: 4,
        sequences: vec![(290, 3), (33, 2)],
        window: Some(20),
        ..Case::default()
    };
    for kind in [latent(128, 32), heads(2, 64, 64)] {
        for format in CacheFormat::ALL {
            let case = of(kind, format);
            let (cache, queries) = (case.cache(), case.queries());
            let width = cache.layout.width();
            // In the latent or the last value, at a position that one of the first sequence's queries does not see any more.
            for (number, at) in [(f32::NAN, 0), (f32::INFINITY, 1), (f32::NEG_INFINITY, width - 1)] {
                let mut row = crate::noise(width, 9);
                row[at] = number;
                let mut other = Cache {
                    layout: cache.layout.clone(),
                    pool: cache.pool.clone(),
                    tables: cache.tables.clone(),
                };
                let slot = cache.tables[0][268 / 16] * 16 + 268 % 16;
                codec::write(&cache.layout, &row, &mut other.pool, slot).unwrap();
                let y = attend(&backend, &case, &other, &queries);
                let error = error(&case, &other, &queries, &y);
                assert!(error <= bound(case.dtype), "{number} {case:?}: {error:e}");
                let finite = values(&y).iter().filter(|v| v.is_finite()).count();
                assert!(finite > 0 && finite < y.elem_count(), "{number} {case:?}");
            }
        }
        // In a query.
        let case = of(kind, CacheFormat::BF16);
        let (cache, mut queries) = (case.cache(), case.queries());
        let (shape, mut numbers) = (queries[0].dims().to_vec(), values(&queries[0]));
        numbers[2] = f32::NAN;
        queries[0] = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
        let y = attend(&backend, &case, &cache, &queries);
        assert!(error(&case, &cache, &queries, &y) <= bound(case.dtype));
        assert!(values(&y)[..case.value()].iter().all(|v| v.is_nan()));
    }
}

/// The numbers of a sequence's tokens, as the codec has them, rotated back.
fn decoded(case: &Case, cache: &Cache, sequence: usize, positions: std::ops::Range<usize>) -> Vec<f32> {
    let layout = &cache.layout;
    let mut all = Vec::new();
    for position in positions {
        let block = cache.tables[sequence][position / case.block_tokens] as usize;
        let slot = block * case.block_tokens + position % case.block_tokens;
        let mut row = vec![0.0; layout.width()];
        codec::read(layout, &cache.pool, slot as u32, &mut row).unwrap();
        let mut rest = row.as_mut_slice();
        for (index, part) in layout.parts().iter().enumerate() {
            let (vector, tail) = rest.split_at_mut(part.width);
            let is_rotary = index == 1 && matches!(layout.kind(), RowKind::Latent { .. });
            if let Some(block) = layout.rotation(part.width).filter(|_| !is_rotary) {
                hadamard::unrotate(vector, block).unwrap();
            }
            rest = tail;
        }
        all.extend(row);
    }
    all
}

#[test]
fn gathered_tokens_are_the_codecs_bit_for_bit() {
    let Some(backend) = Backend::alone() else { return };
    let kinds = [
        latent(512, 64),
        latent(96, 0),
        latent(30, 5),
        heads(2, 96, 64),
        heads(3, 18, 7),
        heads(1, 256, 160),
    ];
    for (kind, block_tokens) in kinds.into_iter().zip([16, 48].into_iter().cycle()) {
        for format in CacheFormat::ALL {
            let case = Case {
                kind,
                format,
                block_tokens,
                sequences: vec![(3, 1), (70, 2)],
                ..Case::default()
            };
            // Vectors that FP4 does not take.
            if candle_mmfp4::kv::RowLayout::new(format, kind, block_tokens).is_err() {
                continue;
            }
            let mut cache = case.cache();
            for (slot, number) in [(21, f32::NAN), (22, f32::INFINITY), (23, -1e36), (24, 1e-40)] {
                let mut row = crate::noise(cache.layout.width(), 4);
                row[3] = number;
                let block = cache.tables[1][slot / block_tokens] as usize;
                let slot = block * block_tokens + slot % block_tokens;
                codec::write(&cache.layout, &row, &mut cache.pool, slot as u32).unwrap();
            }
            for (dtype, range) in DTYPES.into_iter().zip([0..70, 17..33, 69..70]) {
                let rows = backend.run(|device| {
                    let pool = cache.tensor().to_device(device)?;
                    let batch = case.batch(&cache, device);
                    Ok(gather_paged(
                        &cache.layout,
                        &pool,
                        &batch,
                        1,
                        range.clone(),
                        dtype,
                    )?)
                });
                let rows = rows.unwrap();
                assert_eq!(
                    (rows.dims(), rows.dtype()),
                    ([range.len(), cache.layout.width()].as_slice(), dtype)
                );
                let expected = decoded(&case, &cache, 1, range);
                let expected = Tensor::new(expected, &Device::Cpu)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap();
                for (found, expected) in values(&rows).iter().zip(values(&expected)) {
                    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                    assert!(same, "{kind:?} {format} {dtype:?}: {found} for {expected}");
                }
            }
        }
    }
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}

#[test]
fn nothing_is_launched_for_nothing_and_what_does_not_fit_is_refused() {
    let Some(backend) = Backend::start() else { return };
    let case = Case::default();
    let (cache, queries) = (case.cache(), case.queries());
    let run = |queries: &[Tensor], bytes: usize, batch: &dyn Fn(&Device) -> PagedBatch| {
        backend.run(|device| {
            let parts: Vec<_> = (queries.iter())
                .map(|part| part.to_device(device))
                .collect::<candle_core::Result<_>>()?;
            let pool = cache.tensor().narrow(0, 0, bytes)?.to_device(device)?;
            let parts: Vec<_> = parts.iter().collect();
            Ok(case.op(&cache).forward(&parts, &pool, &batch(device))?)
        })
    };
    let whole = cache.pool.len();
    let none: Vec<_> = queries.iter().map(|part| part.narrow(0, 0, 0).unwrap()).collect();
    let empty = run(&none, whole, &|device| PagedBatch::new(&[], 16, device).unwrap());
    assert_eq!(empty.unwrap().dims(), [0, case.heads, case.value()]);
    let batch = |device: &Device| case.batch(&cache, device);
    assert!(run(&queries, whole, &batch).is_ok());
    let refused = |argument: &str, queries: &[Tensor], bytes: usize| {
        let error = run(queries, bytes, &batch).unwrap_err().to_string();
        assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
    };
    refused("tables", &queries, cache.layout.block_bytes());
    refused("queries", &queries[..1], whole);
    let error = backend.run(|device| {
        let pool = cache
            .tensor()
            .narrow(0, 0, cache.layout.block_bytes())?
            .to_device(device)?;
        Ok(gather_paged(
            &cache.layout,
            &pool,
            &batch(device),
            0,
            0..20,
            DType::F32,
        )?)
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`table`"), "{error}");
}
