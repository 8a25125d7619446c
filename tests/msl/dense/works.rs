//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, weight};
use crate::linear::cases::{Lies, activations};
use crate::runner::{Expected, Work, record};
use crate::values;
use candle_core::DType;
use candle_mmfp4::cpu::{HeadRows, reference};
use candle_mmfp4::fp4::{FloatKind, Weight};
use candle_mmfp4::ops::{Orientation, PerHead};

/// Runs in both orientations that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let plain = Case::default();
    let cases = [
        // Two rounds of a simdgroup's lanes, the second not full.
        Case { k: 264, ..plain },
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
            kind: FloatKind::F16,
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
    let products = cases.iter().map(product);
    products.chain(columns.iter().map(transposed)).collect()
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
