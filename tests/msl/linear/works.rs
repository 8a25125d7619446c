//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, KINDS, activations, pairwise};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::cpu::{HeadRows, reference};
use candle_mmfp4::fp4::Factor;
use candle_mmfp4::ops::{Orientation, PerHead};

/// Runs in both orientations that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let few = few().into_iter();
    if !crate::full() {
        return few.map(|(case, orientation)| work(&case, orientation)).collect();
    }
    let both = |case| [Orientation::Ordinary, Orientation::Transposed].map(|orientation| (case, orientation));
    let all = few.chain(pairwise().into_iter().flat_map(both));
    all.map(|(case, orientation)| work(&case, orientation)).collect()
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
