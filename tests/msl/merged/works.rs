//! Products whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, Stored, Unseen, fp4, in_floating_point, rows};
use crate::linear::cases::KINDS;
use crate::runner::{Expected, Work, record};
use candle_core::DType;
use candle_mmfp4::fp4::{Factor, FloatKind};

/// Runs that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mut cases = few();
    if crate::full() {
        cases.extend(fp4());
        cases.extend(in_floating_point());
    }
    cases.iter().map(work).collect()
}

fn work(case: &Case) -> Work {
    let (op, inputs) = (case.op(), case.inputs());
    let expected = Expected {
        values: case.expected(op.weight(), &inputs),
        dtype: case.dtype,
        bound: crate::bound(case.dtype),
    };
    let [parts, stats] = &inputs;
    record(
        format!("{case:?}"),
        |_| Ok(op.forward_merged(parts, stats, case.dtype)?),
        vec![expected],
    )
}

fn few() -> Vec<Case> {
    let plain = Case::default();
    let of = |group, kind, factor| Stored::Fp4 { group, kind, factor };
    vec![
        // One split; rows of a part of a simdgroup; columns of a part of what it merges at once.
        Case {
            splits: 1,
            k: 48,
            stored: of(16, KINDS[3], Factor::Div(3.0)),
            rows: rows(2, 10, 1, 7),
            ..plain
        },
        // More splits than lanes, one of them unseen; more than one threadgroup's rows.
        Case {
            splits: 33,
            unseen: Unseen::First,
            dtype: DType::BF16,
            rows: rows(1, 40, 5, 33),
            k: 160,
            ..plain
        },
        // Columns enough for every simdgroup.
        Case {
            splits: 5,
            dtype: DType::F16,
            k: 512,
            stored: of(128, KINDS[1], Factor::Mul(0.37)),
            shift: 4,
            ..plain
        },
        // Tokens that are not there, of two, of four and of eight.
        Case {
            m: 2,
            splits: 7,
            unseen: Unseen::Last,
            rows: rows(2, 4, 1, 3),
            ..plain
        },
        Case {
            m: 3,
            splits: 3,
            rows: rows(3, 70, 2, 65),
            stored: of(16, KINDS[2], Factor::None),
            dtype: DType::BF16,
            ..plain
        },
        Case {
            m: 7,
            splits: 2,
            rows: rows(2, 66, 0, 66),
            k: 96,
            shift: 8,
            ..plain
        },
        Case {
            m: 8,
            splits: 34,
            unseen: Unseen::Last,
            dtype: DType::F16,
            k: 128,
            ..plain
        },
        // In floating point: loads of 16 bytes in more than a turn, of 8, of an element.
        Case {
            stored: Stored::Dense(FloatKind::BF16),
            splits: 3,
            k: 264,
            rows: rows(2, 40, 3, 35),
            ..plain
        },
        Case {
            stored: Stored::Dense(FloatKind::F32),
            shift: 8,
            m: 3,
            splits: 33,
            unseen: Unseen::First,
            dtype: DType::BF16,
            ..plain
        },
        Case {
            stored: Stored::Dense(FloatKind::F16),
            m: 5,
            splits: 2,
            k: 65,
            rows: rows(1, 67, 1, 66),
            dtype: DType::F16,
            ..plain
        },
        Case {
            stored: Stored::Dense(FloatKind::F16),
            m: 2,
            splits: 1,
            k: 7,
            ..plain
        },
    ]
}
