//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, weight};
use crate::linear::cases::{Lies, activations};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::cpu::{HeadRows, reference};
use candle_mmfp4::fp4::{FloatKind, Weight};
use candle_mmfp4::ops::{JoinedLinear, Orientation, PerHead};

/// Runs in both orientations that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let plain = Case::default();
    let cases = [
        // Two simdgroups, the second of which has one lane's elements.
        Case { k: 264, ..plain },
        // Seven, of which each has two whole turns, and three more.
        Case {
            n: 3,
            k: 4616,
            ..plain
        },
        // Five, and elements one by one.
        Case {
            m: 8,
            n: 3,
            k: 2065,
            bias: true,
            ..plain
        },
        // A turn that is the same simdgroup's, and whole.
        Case {
            m: 5,
            n: 3,
            k: 256,
            kind: FloatKind::F32,
            ..plain
        },
        Case {
            m: 2,
            n: 7,
            k: 40,
            kind: FloatKind::F16,
            shift: 8,
            bias: true,
            ..plain
        },
        Case {
            m: 4,
            n: 5,
            k: 65,
            kind: FloatKind::F32,
            dtype: DType::F16,
            ..plain
        },
        Case {
            m: 7,
            n: 6,
            k: 96,
            kind: FloatKind::F32,
            dtype: DType::BF16,
            shift: 8,
            ..plain
        },
        // Tiles: with edges on every side, and with K that no wide load takes.
        Case {
            m: 33,
            n: 33,
            k: 40,
            dtype: DType::F16,
            bias: true,
            ..plain
        },
        Case {
            m: 9,
            n: 5,
            k: 33,
            lies: Lies::OddRows,
            ..plain
        },
    ];
    let columns = [
        // More columns than a threadgroup has.
        Case {
            n: 9,
            k: 136,
            ..plain
        },
        // Two turns down the rows at once, one more, and eight rows.
        Case {
            n: 200,
            k: 40,
            ..plain
        },
        Case {
            m: 2,
            n: 130,
            k: 8,
            kind: FloatKind::F32,
            shift: 8,
            ..plain
        },
        Case {
            m: 3,
            n: 6,
            k: 33,
            kind: FloatKind::F16,
            dtype: DType::F16,
            ..plain
        },
        Case {
            m: 33,
            n: 34,
            k: 40,
            kind: FloatKind::F32,
            dtype: DType::BF16,
            shift: 8,
            ..plain
        },
    ];
    // Two weights in one launch.
    let joined_cases = [
        (Case { n: 9, k: 64, ..plain }, 7),
        (
            Case {
                m: 3,
                n: 5,
                k: 520,
                kind: FloatKind::F16,
                dtype: DType::F16,
                ..plain
            },
            10,
        ),
    ];
    let products = cases.iter().map(product);
    let works = products.chain(columns.iter().map(transposed));
    works.chain(joined_cases.iter().map(joined)).collect()
}

/// With a second weight of so many rows.
fn joined((case, other): &(Case, usize)) -> Work {
    let second = Case { n: *other, ..*case };
    let (op, x) = (
        JoinedLinear::new(vec![case.op(), second.op()]).unwrap(),
        case.x().unwrap(),
    );
    let of = |case: &Case, part: usize| case.expected(&op.parts()[part], &values(&x));
    let (left, right) = (of(case, 0), of(&second, 1));
    let rows = left.chunks_exact(case.n).zip(right.chunks_exact(*other));
    let values = rows.flat_map(|(left, right)| [left, right].concat()).collect();
    record(
        format!("joined {case:?} and {other}"),
        |_| op.forward(&x),
        vec![expected(case, values)],
    )
}

fn product(case: &Case) -> Work {
    let (op, x) = (case.op(), case.x().unwrap());
    let values = case.expected(&op, &values(&x.contiguous().unwrap()));
    record(
        format!("{case:?}"),
        |_| op.forward(&x),
        vec![expected(case, values)],
    )
}

/// Of two heads, each of which has `n` rows behind three of others.
fn transposed(case: &Case) -> Work {
    let Case { m, n, k, dtype, .. } = *case;
    let rows = HeadRows {
        heads: 2,
        stride: n + 3,
        start: 3,
        len: n,
    };
    let weight = Weight::from(weight((2 * (n + 3), k), case.kind, case.shift));
    let x = activations((m, 2 * n), dtype, 17);
    let values = reference::per_head_transposed(&weight, rows, &values(&x), m);
    let op = PerHead::new(weight, rows, Orientation::Transposed).unwrap();
    let x = x.reshape((m, 2, n)).unwrap();
    let name = format!("transposed {case:?}");
    record(name, |_| op.forward(&x), vec![expected(case, values)])
}

fn expected(case: &Case, values: Vec<f32>) -> Expected {
    Expected {
        values,
        dtype: case.dtype,
        bound: crate::bound(case.dtype),
    }
}
