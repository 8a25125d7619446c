//! Ops whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, QueriesLie, heads, latent};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::kv::{CacheFormat, ScaleGroup};
use candle_mmfp4::ops::gather_paged;

const ROTATED: CacheFormat = CacheFormat::Fp4 {
    group: ScaleGroup::ThirtyTwo,
    rotate: true,
};

/// Runs that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mut works: Vec<_> = cases().iter().map(attention).collect();
    works.extend(gathered().iter().map(gather));
    works
}

fn cases() -> Vec<Case> {
    let plain = Case::default();
    let of = |kind, format, heads, sequences: &[(usize, usize)]| Case {
        kind,
        format,
        heads,
        sequences: sequences.to_vec(),
        ..plain.clone()
    };
    vec![
        // One split, a part of a tile, a simdgroup with one head.
        plain.clone(),
        // Several splits, and of one sequence fewer; tiles that end within.
        Case {
            dtype: DType::F16,
            lies: QueriesLie::Narrowed,
            ..of(latent(64, 16), CacheFormat::Fp8, 5, &[(261, 1), (12, 1)])
        },
        // Wide latents, rotated; a window that begins within a block, and ends the split before.
        Case {
            window: Some(270),
            ..of(latent(192, 32), ROTATED, 3, &[(530, 2)])
        },
        // Not by fours; two groups of heads.
        Case {
            dtype: DType::BF16,
            block_tokens: 48,
            lies: QueriesLie::HeadsFirst,
            ..of(latent(30, 5), CacheFormat::F16, 25, &[(19, 2)])
        },
        // Heads: one query head, several splits, fewer tokens than simdgroups take.
        of(heads(2, 64, 64), CacheFormat::BF16, 2, &[(258, 1), (3, 1)]),
        // Three query heads of four; FP4; more than a round of all simdgroups.
        Case {
            dtype: DType::F16,
            lies: QueriesLie::Narrowed,
            ..of(heads(2, 96, 64), CacheFormat::fp4(), 6, &[(70, 1)])
        },
        // Nine query heads, rotated, a window.
        Case {
            window: Some(30),
            ..of(heads(1, 64, 96), ROTATED, 9, &[(100, 2)])
        },
        // Wide heads, and odd ones.
        of(heads(1, 160, 200), CacheFormat::Fp8, 1, &[(40, 1)]),
        Case {
            dtype: DType::BF16,
            ..of(heads(2, 130, 7), CacheFormat::Fp8, 10, &[(40, 1)])
        },
    ]
}

fn gathered() -> Vec<Case> {
    let plain = Case {
        sequences: vec![(3, 1), (41, 1)],
        ..Case::default()
    };
    let of = |dtype, kind, format| Case {
        dtype,
        kind,
        format,
        ..plain.clone()
    };
    vec![
        of(DType::F32, latent(160, 16), ROTATED),
        of(DType::F16, heads(3, 64, 32), CacheFormat::fp4()),
        of(DType::BF16, latent(30, 5), CacheFormat::Fp8),
        of(DType::F32, heads(2, 18, 7), CacheFormat::F16),
    ]
}

fn attention(case: &Case) -> Work {
    let (cache, queries) = (case.cache(), case.queries());
    let expected = Expected {
        values: case.expected(&cache, &queries),
        dtype: case.dtype,
        bound: crate::bound(case.dtype),
    };
    let op = |device: &Device| {
        let parts: Vec<_> = queries.iter().collect();
        Ok(case
            .op(&cache)
            .forward(&parts, &cache.tensor(), &case.batch(&cache, device))?)
    };
    record(format!("paged attention {case:?}"), op, vec![expected])
}

fn gather(case: &Case) -> Work {
    let cache = case.cache();
    // So many that the last threadgroup has vectors that are not there.
    let positions = 5..40;
    let decoded = super::decoded(case, &cache, 1, positions.clone());
    let decoded = Tensor::new(decoded, &Device::Cpu)
        .unwrap()
        .to_dtype(case.dtype)
        .unwrap();
    let expected = Expected {
        values: values(&decoded),
        dtype: case.dtype,
        bound: 0.0,
    };
    let op = |device: &Device| {
        let (pool, batch) = (cache.tensor(), case.batch(&cache, device));
        Ok(gather_paged(
            &cache.layout,
            &pool,
            &batch,
            1,
            positions,
            case.dtype,
        )?)
    };
    record(format!("gather {case:?}"), op, vec![expected])
}
