//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, KINDS, Lies, activations, pairwise, side_by_side};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::cpu::{HeadRows, reference};
use candle_mmfp4::fp4::Factor;
use candle_mmfp4::ops::{JoinedLinear, Orientation, PerHead};

/// Runs in both orientations that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let few = few().into_iter();
    if !crate::full() {
        let plain = few.map(|(case, orientation)| work(&case, orientation));
        return plain.chain(joined()).chain(normed()).collect();
    }
    let both = |case| [Orientation::Ordinary, Orientation::Transposed].map(|orientation| (case, orientation));
    let all = few.chain(pairwise().into_iter().flat_map(both));
    let plain = all.map(|(case, orientation)| work(&case, orientation));
    plain.chain(joined()).chain(normed()).collect()
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
    let name = format!("{orientation:?} {case:?}");
    let op = case.op();
    let (n, k) = op.weight().shape();
    let dtype = case.dtype;
    let expected = |values| Expected {
        values,
        dtype,
        bound: crate::bound(dtype),
    };
    match orientation {
        Orientation::Ordinary => {
            let x = case.x().unwrap();
            let values = case.expected(&op, &values(&x.contiguous().unwrap()));
            record(name, |_| op.forward(&x), vec![expected(values)])
        }
        Orientation::Transposed => {
            let rows = HeadRows {
                heads: 1,
                stride: n,
                start: 0,
                len: n,
            };
            let x = activations((case.m, n), dtype, 17);
            let values = reference::per_head_transposed(op.weight(), rows, &values(&x), case.m);
            let op = PerHead::new(op.weight().clone(), rows, orientation).unwrap();
            let x = x.reshape((case.m, 1, n)).unwrap();
            debug_assert_eq!(values.len(), case.m * k);
            record(name, |_| op.forward(&x), vec![expected(values)])
        }
    }
}

fn few() -> Vec<(Case, Orientation)> {
    let plain = Case::default();
    let rows = [
        Case {
            n: 9,
            k: 128,
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
            k: 256,
            group: 128,
            dtype: DType::BF16,
            kind: KINDS[2],
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
