//! Scores that are infinite or no numbers: of all tokens that a query sees, of some splits, of one token.

use super::cases::{Cache, Case, heads, latent};
use super::{attend, error, finite_error};
use crate::backend::Backend;
use crate::merged::cases::{Case as Weight, rows};
use crate::{bound, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, reference};
use candle_mmfp4::kv::{CacheFormat, RowKind, codec};

/// What of four heads' queries meets a key's minus infinity: minus infinity, plus infinity, NaN, and NaN whatever is met.
const QUERIES: [f32; 4] = [1.0, -1.0, 0.0, f32::NAN];

/// At which positions of a sequence a number of the key is minus infinity.
type Infinite = (&'static str, fn(usize) -> bool);

const INFINITE_AT: [Infinite; 5] = [
    ("everywhere", |_| true),
    ("everywhere but at one position", |at| at != 70),
    ("in the first split and a part of the next", |at| at < 100),
    ("in the last splits", |at| at >= 140),
    ("at one position", |at| at == 70),
];

/// Sequences of five splits, of two, and of a part of one; of two tokens a query each.
fn case(kind: RowKind, format: CacheFormat, dtype: DType) -> Case {
    Case {
        kind,
        format,
        dtype,
        heads: QUERIES.len(),
        sequences: vec![(290, 2), (100, 1), (7, 1)],
        ..Case::default()
    }
}

/// Where in a row the numbers are that are infinite: of latents the first of the rotary key, which no value is made of.
fn places(case: &Case) -> Vec<usize> {
    match case.kind {
        RowKind::Latent { latent, .. } => vec![latent],
        RowKind::Heads {
            kv_heads, key_dim, ..
        } => (0..kv_heads).map(|head| head * key_dim).collect(),
    }
}

/// The cache of a case, with these keys.
fn cache(case: &Case, infinite: fn(usize) -> bool) -> Cache {
    let mut cache = case.cache();
    for (table, (len, _)) in cache.tables.iter().zip(&case.sequences) {
        for position in (0..*len).filter(|at| infinite(*at)) {
            let mut row = crate::noise(cache.layout.width(), position as u64 + 3);
            places(case)
                .into_iter()
                .for_each(|place| row[place] = f32::NEG_INFINITY);
            let slot = table[position / case.block_tokens] * case.block_tokens as u32
                + (position % case.block_tokens) as u32;
            codec::write(&cache.layout, &row, &mut cache.pool, slot).unwrap();
        }
    }
    cache
}

/// The queries of a case, with each head's number.
fn queries(case: &Case) -> Vec<Tensor> {
    let mut queries = case.queries();
    // Rotary parts are the last ones.
    let part = queries.len() - 1;
    let (shape, width) = (queries[part].dims().to_vec(), queries[part].dims()[2]);
    let mut numbers = values(&queries[part]);
    for (head, row) in numbers.chunks_exact_mut(width).enumerate() {
        row[0] = QUERIES[head % QUERIES.len()];
    }
    queries[part] = Tensor::from_vec(numbers, shape, &Device::Cpu)
        .and_then(|numbers| numbers.to_dtype(case.dtype))
        .unwrap();
    queries
}

/// Where all scores are minus infinity the first head has no answer, and elsewhere it has some; the last never has.
fn assert_expected(what: &str, case: &Case, expected: &[f32]) {
    let answers = |head: usize| {
        let all = expected
            .chunks_exact(case.value())
            .skip(head)
            .step_by(QUERIES.len());
        all.flatten().filter(|v| v.is_finite()).count()
    };
    assert_eq!(answers(0) == 0, what == "everywhere", "{what} {case:?}");
    assert_eq!(answers(3), 0, "{what} {case:?}");
}

#[test]
fn infinite_scores_give_what_the_reference_gives() {
    let Some(backend) = Backend::alone() else { return };
    for kind in [
        latent(64, 16),
        latent(160, 32),
        heads(2, 64, 64),
        heads(1, 160, 160),
    ] {
        for (format, dtype) in [
            (CacheFormat::F16, DType::F32),
            (CacheFormat::BF16, DType::BF16),
            (CacheFormat::Fp8, DType::F32),
            (CacheFormat::fp4(), DType::BF16),
        ] {
            let sixteen_bits = matches!(format, CacheFormat::F16 | CacheFormat::BF16);
            if matches!(kind, RowKind::Heads { .. }) && !sixteen_bits {
                // Of keys these have no infinity.
                continue;
            }
            for (what, infinite) in INFINITE_AT {
                let case = case(kind, format, dtype);
                let (cache, queries) = (cache(&case, infinite), queries(&case));
                assert_expected(what, &case, &case.expected(&cache, &queries));
                let y = attend(&backend, &case, &cache, &queries);
                let error = error(&case, &cache, &queries, &y);
                assert!(error <= bound(dtype), "{what} {case:?}: {error:e}");
            }
        }
    }
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}

/// Where parts are merged by the product behind them.
#[test]
fn infinite_scores_reach_the_product_behind_them() {
    let Some(backend) = Backend::alone() else { return };
    for (what, infinite) in INFINITE_AT {
        let case = case(latent(64, 16), CacheFormat::BF16, DType::F32);
        let (cache, queries) = (cache(&case, infinite), queries(&case));
        let weight = Weight {
            rows: rows(QUERIES.len(), 40, 8, 31),
            k: case.value(),
            ..Weight::default()
        };
        let values_of = weight.op();
        let y = backend.run(|device| {
            let parts = queries.iter().map(|part| part.to_device(device));
            let parts = parts.collect::<candle_core::Result<Vec<_>>>()?;
            let (pool, batch) = (cache.tensor().to_device(device)?, case.batch(&cache, device));
            let op = case.op(&cache);
            Ok(op.forward_expanded(&parts.iter().collect::<Vec<_>>(), &pool, &batch, &values_of)?)
        });
        let attended = case.expected(&cache, &queries);
        let (of, n) = (values_of.weight(), case.tokens());
        let expected = reference::per_head(of, weight.rows, &attended, n, Arithmetic::Exact);
        let error = finite_error(what, &values(&y.unwrap()), &expected);
        assert!(error <= bound(DType::F32), "{what}: {error:e}");
    }
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}
