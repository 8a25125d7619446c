//! Mixtures and routers whose plans are run again and again: see [`runner`](crate::runner).

use super::cases::{Case, Goes, PLAIN, Stored};
use super::router;
use crate::linear::cases::KINDS;
use crate::runner::{Expected, Work, record};
use candle_core::DType;
use candle_mmfp4::cpu::route;
use candle_mmfp4::fp4::{Factor, FloatKind};

/// Runs that reach every kernel's loops and edges.
pub fn all() -> Vec<Work> {
    let mixtures = mixtures();
    let mixtures = mixtures.iter().map(mixture);
    let mlps = [1, 34].map(mlp);
    let unknown = [2, 32].map(unknown);
    let routers = routers();
    mixtures
        .chain(mlps)
        .chain(unknown)
        .chain(routers.iter().map(routed))
        .collect()
}

fn expected(values: Vec<f32>, dtype: DType) -> Vec<Expected> {
    vec![Expected {
        values,
        dtype,
        bound: crate::bound(dtype),
    }]
}

fn mixture(case: &Case) -> Work {
    let (op, x) = (case.op(), case.x().unwrap());
    let (ids, weights) = (case.of_slots(&case.ids()), case.of_slots(&case.weights()));
    let values = case.expected(&op, &case.ids());
    let forward = |_: &_| op.forward(&x, &ids, &weights);
    record(format!("{case:?}"), forward, expected(values, case.dtype))
}

fn mlp(tokens: usize) -> Work {
    let case = Case {
        tokens,
        d: 48,
        shared_width: 80,
        gate_up: Stored { group: 16, ..PLAIN },
        down: Stored { group: 16, ..PLAIN },
        ..Case::default()
    };
    let (op, x) = (case.mlp(), case.x().unwrap());
    let values = case.expected_of_mlp(&op);
    let name = format!("gated MLP {case:?}");
    record(name, |_| op.forward(&x), expected(values, case.dtype))
}

/// Ids that name no expert. Of many tokens each has an expert of its own: there is room for not one tile more.
fn unknown(tokens: usize) -> Work {
    let case = Case {
        tokens,
        top_k: 1,
        experts: tokens - 1,
        d: 32,
        ..Case::default()
    };
    let (op, right) = (case.op(), case.ids());
    let mut ids = right.clone();
    // One that would be a shared expert's, and where there is another one, one that is far off.
    ids[tokens - 1] = case.experts as u32;
    if tokens == 2 {
        ids[0] = u32::MAX;
    }
    let mut values = case.expected(&op, &right);
    for (row, id) in values.chunks_exact_mut(case.d).zip(&ids) {
        if *id as usize >= case.experts {
            row.fill(f32::NAN);
        }
    }
    let (x, ids, weights) = (
        case.x().unwrap(),
        case.of_slots(&ids),
        case.of_slots(&case.weights()),
    );
    let name = format!("ids of no expert {case:?}");
    let forward = |_: &_| op.forward(&x, &ids, &weights);
    record(name, forward, expected(values, case.dtype))
}

fn mixtures() -> Vec<Case> {
    let plain = Case::default();
    let e4m3 = Stored {
        group: 16,
        kind: KINDS[3],
        factor: Factor::Div(3.0),
        shift: 4,
    };
    let bf16 = Stored {
        kind: KINDS[1],
        factor: Factor::Mul(0.37),
        ..PLAIN
    };
    vec![
        // Few tokens: by words and by four words, more chunks than lanes, shared experts wider and narrower.
        Case {
            d: 80,
            width: 48,
            shared_width: 96,
            gate_up: e4m3,
            down: e4m3,
            ..plain
        },
        Case {
            dtype: DType::F16,
            tokens: 2,
            top_k: 3,
            d: 288,
            width: 160,
            shared_width: 32,
            gate_up: bf16,
            ..plain
        },
        Case {
            dtype: DType::BF16,
            tokens: 3,
            shared: 0,
            d: 128,
            width: 128,
            gate_up: Stored { group: 128, ..PLAIN },
            down: Stored {
                group: 64,
                kind: KINDS[2],
                ..PLAIN
            },
            goes: Goes::Twice,
            ..plain
        },
        Case {
            top_k: 4,
            d: 1152,
            width: 288,
            shared: 2,
            shared_width: 160,
            ..plain
        },
        // Many: tiles that are full and not, experts without a slot, more experts than slots in use.
        Case {
            tokens: 37,
            d: 80,
            width: 48,
            shared_width: 96,
            gate_up: e4m3,
            down: e4m3,
            ..plain
        },
        Case {
            dtype: DType::F16,
            tokens: 33,
            top_k: 3,
            shared: 0,
            gate_up: bf16,
            goes: Goes::Rarely,
            ..plain
        },
        Case {
            dtype: DType::BF16,
            tokens: 9,
            experts: 40,
            shared: 2,
            shared_width: 64,
            down: bf16,
            ..plain
        },
        Case {
            tokens: 35,
            d: 128,
            width: 128,
            shared_width: 128,
            gate_up: Stored { group: 128, ..PLAIN },
            down: Stored {
                group: 128,
                kind: KINDS[2],
                ..PLAIN
            },
            goes: Goes::Together,
            ..plain
        },
    ]
}

/// The ids of ties are sure, whatever the schedule: experts of the same weights have the same score.
fn routed(case: &router::Case) -> Work {
    let (op, x) = (case.op(), case.x());
    let logits = case.logits(&x);
    let slots = case.tokens * case.shape.3;
    let (mut ids, mut weights) = (vec![0; slots], vec![0.0; slots]);
    route(&logits, &case.bias(), &case.routing(), &mut ids, &mut weights);
    let outputs = [
        (logits, DType::F32, 1e-9),
        (ids.into_iter().map(|id| id as f32).collect(), DType::U32, 0.0),
        (weights, DType::F32, 1e-9),
    ];
    let expected = outputs.map(|(values, dtype, bound)| Expected { values, dtype, bound });
    record(format!("{case:?}"), |_| op.forward(&x), expected.into())
}

fn routers() -> Vec<router::Case> {
    let plain = router::Case::default();
    vec![
        router::Case {
            d: 132,
            shape: (66, 6, 2, 5),
            ..plain
        },
        router::Case {
            dtype: DType::F16,
            kind: FloatKind::BF16,
            tokens: 2,
            d: 5,
            normalize: false,
            ..plain
        },
        router::Case {
            dtype: DType::BF16,
            kind: FloatKind::F16,
            tokens: 18,
            shape: (130, 10, 4, 8),
            ..plain
        },
        router::Case {
            dtype: DType::F16,
            tokens: 17,
            shape: (5, 5, 2, 2),
            kind: FloatKind::F16,
            ..plain
        },
    ]
}
