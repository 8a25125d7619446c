//! Ops whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{HeadsLie, PAIRINGS, Rows, Tokens};
use crate::linear::cases::Lies;
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::ops::{Add, add_norm};

/// Runs that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mut works = Vec::new();
    for case in rows() {
        works.extend([norm(&case), added(&case), add(&case)]);
    }
    for case in tokens() {
        works.extend([rope(&case), latent(&case, false), latent(&case, true)]);
    }
    works
}

fn rows() -> Vec<Rows> {
    let plain = Rows::default();
    vec![
        // Several rounds of all threads, in fours and one by one, and a part of one.
        Rows { d: 2056, ..plain },
        Rows {
            d: 1030,
            dtype: DType::BF16,
            lies: Lies::OddRows,
            ..plain
        },
        // Less than a simdgroup.
        Rows {
            rows: 3,
            d: 7,
            eps: 0.25,
            ..plain
        },
        // Several simdgroups, of which the last is not full; squares that overflow f16.
        Rows {
            d: 276,
            dtype: DType::F16,
            lies: Lies::WideRows,
            magnitude: 3e4,
            ..plain
        },
    ]
}

fn tokens() -> Vec<Tokens> {
    let plain = Tokens::default();
    vec![
        plain,
        // More pairs than a threadgroup turns, of keys and of queries.
        Tokens {
            dtype: DType::F16,
            heads: 5,
            pairs: 33,
            latent: 36,
            pairing: PAIRINGS[1],
            lies: HeadsLie::HeadsFirst,
            ..plain
        },
        Tokens {
            dtype: DType::BF16,
            heads: 7,
            pairs: 32,
            latent: 260,
            ..plain
        },
    ]
}

fn expected(values: Vec<f32>, dtype: DType) -> Expected {
    let bound = crate::bound(dtype);
    Expected { values, dtype, bound }
}

fn norm(case: &Rows) -> Work {
    let x = case.x().unwrap();
    let values = expected(case.normed(&x), case.dtype);
    record(
        format!("norm {case:?}"),
        |_| case.norm().forward(&x),
        vec![values],
    )
}

fn added(case: &Rows) -> Work {
    let (x, delta) = (case.x().unwrap(), case.delta().unwrap());
    let sum = case.sum(&x, &delta);
    let exact = Expected {
        bound: 0.0,
        ..expected(values(&sum), case.dtype)
    };
    let normed = expected(case.normed(&sum), case.dtype);
    let name = format!("sum and norm {case:?}");
    record(name, |_| add_norm(&x, &delta, &case.norm()), vec![exact, normed])
}

fn add(case: &Rows) -> Work {
    let (x, delta) = (case.x().unwrap(), case.delta().unwrap());
    let exact = Expected {
        bound: 0.0,
        ..expected(values(&case.sum(&x, &delta)), case.dtype)
    };
    record(format!("sum {case:?}"), |_| Add.forward(&x, &delta), vec![exact])
}

fn rope(case: &Tokens) -> Work {
    let (x, (cos, sin)) = (case.queries().unwrap(), case.angles().unwrap());
    let turned = expected(case.turned(&x), case.dtype);
    let name = format!("rope {case:?}");
    record(name, |_| case.rope().forward(&x, &cos, &sin), vec![turned])
}

fn latent(case: &Tokens, with_queries: bool) -> Work {
    let (kv, queries) = (case.kv().unwrap(), case.queries().unwrap());
    let (cos, sin) = case.angles().unwrap();
    let (op, kept) = (case.latent_rows(), expected(case.kept(&kv), case.dtype));
    if with_queries {
        let turned = expected(case.turned(&queries), case.dtype);
        let run = |_: &_| op.forward_with_queries(&kv, &queries, &cos, &sin);
        return record(format!("rows and queries {case:?}"), run, vec![kept, turned]);
    }
    let name = format!("rows {case:?}");
    record(name, |_| op.forward(&kv, &cos, &sin), vec![kept])
}
