//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, KINDS, Lies, activations, pairwise, side_by_side};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::cpu::{Arithmetic, HeadRows, reference};
use candle_mmfp4::fp4::Factor;
use candle_mmfp4::ops::{JoinedLinear, Orientation, PerHead};

/// Runs in both orientations that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mut cases = few();
    if crate::full() {
        let both =
            |case| [Orientation::Ordinary, Orientation::Transposed].map(|orientation| (case, orientation));
        cases.extend(pairwise().into_iter().flat_map(both));
    }
    let works = cases.iter().map(|(case, orientation)| work(case, *orientation));
    works.chain(of_heads()).chain(joined()).chain(normed()).collect()
}

/// Two weights in one launch.
fn joined() -> Vec<Work> {
    let plain = Case::default();
    let cases = [
        (
            Case {
                n: 9,
                factor: Factor::Mul(0.37),
                ..plain
            },
            7,
        ),
        (
            Case {
                m: 3,
                n: 5,
                k: 1040,
                group: 16,
                dtype: DType::F16,
                ..plain
            },
            10,
        ),
    ];
    let joined = |(case, other): (Case, usize)| {
        // Another factor than the first's, of the same kind.
        let factor = match case.factor {
            Factor::Mul(_) => Factor::Mul(3.0),
            factor => factor,
        };
        let second = Case {
            n: other,
            factor,
            ..case
        };
        let (op, x) = (
            JoinedLinear::new(vec![case.op(), second.op()]).unwrap(),
            case.x().unwrap(),
        );
        let all = [(&case, 0), (&second, 1)]
            .map(|(case, part)| (case.n, case.expected(&op.parts()[part], &values(&x))));
        let expected = Expected {
            values: side_by_side(&all, case.m),
            dtype: case.dtype,
            bound: crate::bound(case.dtype),
        };
        record(format!("joined {case:?}"), |_| op.forward(&x), vec![expected])
    };
    cases.into_iter().map(joined).collect()
}

/// Products of norms.
fn normed() -> Vec<Work> {
    let plain = Case::default();
    let cases = [
        Case { n: 5, ..plain },
        Case {
            n: 6,
            k: 528,
            group: 16,
            lies: Lies::OddRows,
            bias: true,
            ..plain
        },
        Case {
            m: 5,
            n: 9,
            k: 1152,
            group: 128,
            dtype: DType::BF16,
            ..plain
        },
    ];
    let normed = |case: Case| {
        let (op, x) = (case.normed(0.25), case.x().unwrap());
        let expected = Expected {
            values: case.expected_of_norm(&op, &values(&x.contiguous().unwrap())),
            dtype: case.dtype,
            bound: crate::bound(case.dtype),
        };
        record(format!("normed {case:?}"), |_| op.forward(&x), vec![expected])
    };
    cases.into_iter().map(normed).collect()
}

fn work(case: &Case, orientation: Orientation) -> Work {
    let (op, n) = (case.op(), case.n);
    if orientation == Orientation::Transposed {
        let rows = HeadRows {
            heads: 1,
            stride: n,
            start: 0,
            len: n,
        };
        return per_head(case, rows, orientation);
    }
    let x = case.x().unwrap();
    let values = case.expected(&op, &values(&x.contiguous().unwrap()));
    let name = format!("{orientation:?} {case:?}");
    record(name, |_| op.forward(&x), vec![expected(values, case.dtype)])
}

fn per_head(case: &Case, rows: HeadRows, orientation: Orientation) -> Work {
    let name = format!("{orientation:?} {rows:?} {case:?}");
    let (weight, m, heads) = (case.op().weight().clone(), case.m, rows.heads);
    let width = match orientation {
        Orientation::Ordinary => case.k,
        Orientation::Transposed => rows.len,
    };
    // Small: scales without their tensor's factor are large, and sums over 576 rows would leave F16.
    let x = (activations((m, heads * width), case.dtype, 17) * 0.25).unwrap();
    let values = match orientation {
        Orientation::Ordinary => reference::per_head(&weight, rows, &values(&x), m, Arithmetic::Exact),
        Orientation::Transposed => reference::per_head_transposed(&weight, rows, &values(&x), m),
    };
    let op = PerHead::new(weight, rows, orientation).unwrap();
    let x = x.reshape((m, heads, width)).unwrap();
    record(name, |_| op.forward(&x), vec![expected(values, case.dtype)])
}

fn expected(values: Vec<f32>, dtype: DType) -> Expected {
    Expected {
        values,
        dtype,
        bound: crate::bound(dtype),
    }
}

/// Three heads that have rows 5 to 21 of every 24 in a weight, by each kernel.
fn of_heads() -> Vec<Work> {
    let rows = HeadRows {
        heads: 3,
        stride: 24,
        start: 5,
        len: 17,
    };
    let mut works = Vec::new();
    for orientation in [Orientation::Ordinary, Orientation::Transposed] {
        for (m, dtype) in [(1, DType::F32), (3, DType::F16), (33, DType::BF16)] {
            let case = Case {
                m,
                n: 72,
                k: 96,
                dtype,
                ..Case::default()
            };
            works.push(per_head(&case, rows, orientation));
        }
    }
    works
}

fn few() -> Vec<(Case, Orientation)> {
    let plain = Case::default();
    let rows = [
        Case {
            n: 32_771,
            k: 1120,
            dtype: DType::F16,
            ..plain
        },
        Case {
            n: 9,
            k: 320,
            shift: 4,
            ..plain
        },
        Case {
            m: 2,
            n: 7,
            k: 288,
            dtype: DType::F16,
            bias: true,
            ..plain
        },
        Case {
            m: 4,
            n: 17,
            k: 160,
            group: 16,
            kind: KINDS[3],
            factor: Factor::Div(3.0),
            ..plain
        },
        Case {
            m: 7,
            n: 6,
            k: 1152,
            group: 128,
            dtype: DType::BF16,
            kind: KINDS[2],
            lies: Lies::Offset,
            ..plain
        },
        Case {
            m: 9,
            n: 33,
            k: 48,
            group: 16,
            kind: KINDS[1],
            ..plain
        },
        Case {
            m: 33,
            n: 40,
            k: 64,
            dtype: DType::F16,
            bias: true,
            lies: Lies::OddRows,
            ..plain
        },
        Case {
            m: 16,
            n: 31,
            k: 128,
            group: 128,
            dtype: DType::BF16,
            factor: Factor::Mul(0.37),
            ..plain
        },
        // Chunks of two groups each, taken by the lanes of four simdgroups, and what is left of K.
        Case {
            n: 6,
            k: 4640,
            group: 16,
            kind: KINDS[3],
            factor: Factor::Div(3.0),
            dtype: DType::BF16,
            ..plain
        },
        // K longer than what a simdgroup, or the lanes of a transposed product, take at once.
        Case {
            n: 5,
            k: 1056,
            ..plain
        },
        // K shorter than a tile, and scales that are subnormal numbers.
        Case {
            m: 9,
            n: 5,
            k: 16,
            group: 16,
            ..plain
        },
        Case {
            m: 2,
            kind: KINDS[3],
            subnormal: true,
            ..plain
        },
        Case {
            m: 12,
            kind: KINDS[0],
            subnormal: true,
            ..plain
        },
        // Four rows a simdgroup: in one turn; with K shared by two simdgroups; by four, in several turns.
        Case {
            n: 2050,
            dtype: DType::F16,
            ..plain
        },
        Case {
            n: 2049,
            k: 528,
            group: 16,
            ..plain
        },
        Case {
            m: 3,
            n: 6,
            k: 6272,
            group: 128,
            dtype: DType::F16,
            ..plain
        },
        // A simdgroup alone with its rows, in several turns.
        Case {
            n: 8193,
            k: 1040,
            group: 16,
            ..plain
        },
    ];
    let columns = [
        Case {
            n: 9,
            k: 288,
            ..plain
        },
        Case {
            m: 3,
            n: 6,
            k: 48,
            group: 16,
            dtype: DType::F16,
            ..plain
        },
        Case { m: 6, n: 5, ..plain },
        Case {
            m: 9,
            n: 33,
            k: 48,
            group: 16,
            kind: KINDS[3],
            ..plain
        },
        Case {
            m: 33,
            n: 20,
            k: 64,
            group: 64,
            dtype: DType::BF16,
            ..plain
        },
    ];
    let with = |orientation| move |case| (case, orientation);
    let rows = rows.into_iter().map(with(Orientation::Ordinary));
    rows.chain(columns.into_iter().map(with(Orientation::Transposed)))
        .collect()
}
