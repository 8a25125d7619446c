//! Gated MLPs, mixtures of experts, and the choice among them.

use super::{Bench, FLOATS, bound_of, case, rows_and_dtypes, to_f32};
use crate::Result;
use crate::cpu::{Arithmetic, Routing, reference};
use crate::doctor::runner::FORMATS;
use crate::ops::{FusedMoe, GatedMlp, Linear, Route, Router, Tolerance, compare_with_reference};
use candle_core::{DType, Device, Tensor};

pub(super) fn mlp(bench: &mut Bench<'_>) -> Result<()> {
    let (width, d) = (256, 128);
    for format in FORMATS {
        let mlp = bench.expert(width, d, format)?;
        for arithmetic in bench.runner.arithmetics() {
            let op = GatedMlp::new(mlp.clone())?.with_arithmetic(*arithmetic);
            for (m, dtype) in rows_and_dtypes() {
                let x = bench.tensor(&[m, d], dtype)?;
                let (values, ids, ones) = (to_f32(&x)?, vec![0; m], vec![1.0; m]);
                let alone = std::slice::from_ref(&mlp);
                let expected = reference::fused_moe(alone, &[], &values, &ids, &ones, 1, *arithmetic);
                bench.compare_within(
                    bound(dtype, *arithmetic),
                    case(m, dtype, format, *arithmetic),
                    &op.forward(&x)?,
                    expected,
                )?;
            }
        }
    }
    Ok(())
}

/// What is between two products is rounded to eight bits as well: a sum that differs in its last bit can be rounded to the
/// next of them.
fn bound(dtype: DType, arithmetic: Arithmetic) -> f64 {
    match arithmetic {
        Arithmetic::W4A8 => bound_of(dtype).max(1e-5),
        Arithmetic::Exact => bound_of(dtype),
    }
}

pub(super) fn moe(bench: &mut Bench<'_>) -> Result<()> {
    let (experts, top_k, width, d) = (8, 3, 128, 256);
    for format in FORMATS {
        let routed = (0..experts).map(|_| bench.expert(width, d, format));
        let routed = routed.collect::<Result<Vec<_>>>()?;
        let shared = vec![bench.expert(width, d, format)?];
        for arithmetic in bench.runner.arithmetics() {
            let op = FusedMoe::new(routed.clone(), shared.clone())?.with_arithmetic(*arithmetic);
            for (m, dtype) in rows_and_dtypes() {
                let x = bench.tensor(&[m, d], dtype)?;
                let ids: Vec<u32> = (0..m)
                    .flat_map(|t| (0..top_k).map(move |slot| ((t + 3 * slot) % experts) as u32))
                    .collect();
                let weights = bench.tensor(&[m, top_k], DType::F32)?;
                let (values, of_slots) = (to_f32(&x)?, to_f32(&weights)?);
                let expected =
                    reference::fused_moe(&routed, &shared, &values, &ids, &of_slots, top_k, *arithmetic);
                let ids = Tensor::from_vec(ids, (m, top_k), &bench.device)?;
                bench.compare_within(
                    bound(dtype, *arithmetic),
                    case(m, dtype, format, *arithmetic),
                    &op.forward(&x, &ids, &weights)?,
                    expected,
                )?;
            }
        }
    }
    Ok(())
}

pub(super) fn router(bench: &mut Bench<'_>) -> Result<()> {
    let (experts, d) = (64, 96);
    for (kind, (n_group, topk_group)) in FLOATS.into_iter().zip([(1, 1), (4, 2), (8, 3)]) {
        let routing = Routing {
            top_k: 4,
            n_group,
            topk_group,
            normalize: true,
            scaling_factor: 1.8,
        };
        let (gate, bias) = (bench.dense(experts, d, kind)?, bench.noise(experts));
        let op = Router::new(
            Linear::new(gate.clone(), None)?,
            Route::new(routing, bias.clone())?,
        );
        for (m, dtype) in rows_and_dtypes() {
            let case = |of: &str| format!("{of} of {m} rows, {dtype:?}, {topk_group} of {n_group} groups");
            let x = bench.tensor(&[m, d], dtype)?;
            let [logits, ids, weights] = op.forward(&x)?;
            let expected = reference::linear(&gate, &to_f32(&x)?, m, Arithmetic::Exact);
            bench.compare(case("logits"), &logits, expected)?;
            // Of its own logits: where two experts are nearly as good, the last bit decides.
            let (chosen, shares) = reference::route(&to_f32(&logits)?, &bias, &routing);
            let chosen = chosen.into_iter().map(|id| id as f32).collect();
            let tolerance = Tolerance::Elements {
                absolute: 1e-5,
                relative: 1e-5,
            };
            for (of, found, expected) in [("ids", &ids, chosen), ("weights", &weights, shares)] {
                let expected: Vec<f32> = expected;
                let expected = Tensor::from_vec(expected, found.shape(), &Device::Cpu)?;
                let comparison = compare_with_reference(found, &expected, tolerance)?;
                bench.see(case(of), 1e-10, comparison);
            }
        }
    }
    Ok(())
}
