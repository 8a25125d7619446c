//! Ops whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Heads, Latents, Numbers};
use crate::linear::cases::{DTYPES, Lies};
use crate::norm_rope::cases::{HeadsLie, PAIRINGS};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::kv::CacheFormat;

/// Runs that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mut works = Vec::new();
    for case in of_latents() {
        works.extend([latents(&case, false), latents(&case, true)]);
    }
    works.extend(of_heads().iter().map(heads));
    works
}

fn of_latents() -> Vec<Latents> {
    let plain = Latents::default();
    // Each format, in other types of activations; two of them lie oddly.
    let formats = CacheFormat::ALL
        .into_iter()
        .enumerate()
        .map(|(i, format)| Latents {
            dtype: DTYPES[i % 3],
            format,
            pairing: PAIRINGS[i % 2],
            lies: [Lies::Together, Lies::OddRows][i % 2],
            tokens: 3,
            ..plain
        });
    let more = [
        // Two chunks, of which the last is short: in fours, a rotated one, and with a part of a group.
        Latents {
            dtype: DType::F16,
            latent: 1028,
            tokens: 2,
            ..plain
        },
        Latents {
            format: CacheFormat::ALL[4],
            latent: 1056,
            tokens: 2,
            ..plain
        },
        Latents {
            format: CacheFormat::Fp8,
            latent: 1030,
            lies: Lies::OddRows,
            tokens: 2,
            ..plain
        },
        // More pairs of queries than a threadgroup turns.
        Latents {
            heads: 7,
            rope: 12,
            queries_lie: HeadsLie::HeadsFirst,
            tokens: 2,
            ..plain
        },
    ];
    formats.chain(more).collect()
}

fn of_heads() -> Vec<Heads> {
    let plain = Heads {
        tokens: 3,
        ..Heads::default()
    };
    let formats = CacheFormat::ALL.into_iter().enumerate();
    let of = |numbers| {
        formats.clone().map(move |(i, format)| Heads {
            dtypes: [DTYPES[i % 3]; 2],
            format,
            numbers,
            lie: HeadsLie::Narrowed,
            ..plain
        })
    };
    let more = [
        Heads {
            format: CacheFormat::Fp8,
            widths: [131, 1030],
            kv_heads: 1,
            ..plain
        },
        Heads {
            format: CacheFormat::ALL[6],
            widths: [1056, 32],
            kv_heads: 1,
            ..plain
        },
        Heads {
            format: CacheFormat::fp4(),
            numbers: Numbers::Ties,
            ..plain
        },
        Heads {
            format: CacheFormat::fp4(),
            numbers: Numbers::Extreme,
            ..plain
        },
        Heads {
            format: CacheFormat::Fp8,
            numbers: Numbers::Extreme,
            ..plain
        },
    ];
    of(Numbers::Ordinary)
        .chain(of(Numbers::Ties))
        .chain(more)
        .collect()
}

/// All bytes of a pool, those too that no kernel is to write.
fn of_pool(pool: &Tensor) -> Expected {
    let bytes: Vec<u8> = pool.to_vec1().unwrap();
    Expected {
        values: bytes.into_iter().map(f32::from).collect(),
        dtype: DType::U8,
        bound: 0.0,
    }
}

fn latents(case: &Latents, with_queries: bool) -> Work {
    let kv = case.kv().unwrap();
    let (pool, turned) = case.append(&kv, with_queries, &Device::Cpu).unwrap();
    let turned = turned.map(|turned| Expected {
        values: values(&turned),
        dtype: case.dtype,
        bound: crate::bound(case.dtype),
    });
    let expected = [Some(of_pool(&pool)), turned].into_iter().flatten().collect();
    let name = format!("append, queries: {with_queries}, {case:?}");
    record(name, |device| case.append(&kv, with_queries, device), expected)
}

fn heads(case: &Heads) -> Work {
    let expected = of_pool(&case.append(&Device::Cpu).unwrap());
    record(
        format!("append {case:?}"),
        |device| case.append(device),
        vec![expected],
    )
}
