//! Products: with FP4 weights and others, plain, joined, of a norm, head by head.

use super::{Bench, FLOATS, bound_of, case, rounded, rows_and_dtypes, to_f32};
use crate::Result;
use crate::cpu::{Arithmetic, HeadRows, reference};
use crate::doctor::runner::{DTYPES, FORMATS};
use crate::fp4::{Format, Weight};
use crate::metal::linear::FEW;
use crate::ops::{JoinedLinear, Linear, NormedLinear, Orientation, PerHead, RmsNorm, validate_kernel_output};
use candle_core::DType;

/// Weights for which launch plans share rows out in other ways than for the small one: several simdgroups on the two parts
/// or the four of a row, more rows than those that are shared out thinly, so many that none are shared, an output head's.
const OTHER_SHARES: [(usize, usize); 6] = [
    (24, 1024),
    (24, 2048),
    (2056, 128),
    (2056, 1024),
    (8192, 640),
    (32_768, 128),
];

pub(super) fn linear(bench: &mut Bench<'_>) -> Result<()> {
    let (n, k) = (67, 256);
    for format in FORMATS {
        let (weight, bias) = (bench.weight(n, k, format)?, bench.noise(n));
        for arithmetic in bench.runner.arithmetics() {
            let op = Linear::new(weight.clone(), Some(bias.clone()))?.with_arithmetic(*arithmetic);
            for (m, dtype) in rows_and_dtypes() {
                let x = bench.tensor(&[m, k], dtype)?;
                let comparison = validate_kernel_output(&op, &x)?;
                bench.see(case(m, dtype, format, *arithmetic), bound_of(dtype), comparison);
            }
        }
    }
    if bench.runner.is_cpu() {
        return Ok(());
    }
    for (n, k) in OTHER_SHARES {
        let weight = bench.weight(n, k, Format::mmfp4())?;
        let op = Linear::new(weight, None)?.with_arithmetic(Arithmetic::Exact);
        for (m, dtype) in [1, 2].into_iter().flat_map(|m| DTYPES.map(|dtype| (m, dtype))) {
            let x = bench.tensor(&[m, k], dtype)?;
            let comparison = validate_kernel_output(&op, &x)?;
            let case = format!("{m} rows, {dtype:?}, a weight of [{n}, {k}]");
            bench.see(case, bound_of(dtype), comparison);
        }
    }
    Ok(())
}

pub(super) fn dense(bench: &mut Bench<'_>) -> Result<()> {
    let (n, k) = (67, 256);
    for kind in FLOATS {
        let op = Linear::new(bench.dense(n, k, kind)?, Some(bench.noise(n)))?;
        for (m, dtype) in rows_and_dtypes() {
            let x = bench.tensor(&[m, k], dtype)?;
            let comparison = validate_kernel_output(&op, &x)?;
            bench.see(
                format!("{m} rows, {dtype:?}, weight in {kind:?}"),
                bound_of(dtype),
                comparison,
            );
        }
    }
    if bench.runner.is_cpu() {
        return Ok(());
    }
    // More rows than those that are shared out thinly.
    let (n, k) = (2056, 256);
    for kind in FLOATS {
        let op = Linear::new(bench.dense(n, k, kind)?, None)?;
        for dtype in DTYPES {
            let comparison = validate_kernel_output(&op, &bench.tensor(&[1, k], dtype)?)?;
            let case = format!("1 row, {dtype:?}, a weight of [{n}, {k}] in {kind:?}");
            bench.see(case, bound_of(dtype), comparison);
        }
    }
    Ok(())
}

pub(super) fn joined(bench: &mut Bench<'_>) -> Result<()> {
    let (widths, k) = ([40, 24], 256);
    for format in FORMATS {
        let weights = [
            bench.weight(widths[0], k, format)?,
            bench.weight(widths[1], k, format)?,
        ];
        for arithmetic in bench.runner.arithmetics() {
            let part = |weight: &Weight| -> Result<_> {
                Ok(Linear::new(weight.clone(), None)?.with_arithmetic(*arithmetic))
            };
            let op = JoinedLinear::new(weights.iter().map(part).collect::<Result<_>>()?)?;
            for (m, dtype) in rows_and_dtypes() {
                let x = bench.tensor(&[m, k], dtype)?;
                let values = to_f32(&x)?;
                let [left, right] =
                    [0, 1].map(|i: usize| reference::linear(&weights[i], &values, m, *arithmetic));
                let rows = left.chunks_exact(widths[0]).zip(right.chunks_exact(widths[1]));
                let expected = rows.flat_map(|(left, right)| [left, right].concat()).collect();
                bench.compare(case(m, dtype, format, *arithmetic), &op.forward(&x)?, expected)?;
            }
        }
    }
    Ok(())
}

pub(super) fn normed(bench: &mut Bench<'_>) -> Result<()> {
    const EPS: f64 = 1e-5;
    let (n, k) = (67, 256);
    // Rounded to eight bits, a norm in another last bit may be another number.
    let arithmetic = Arithmetic::Exact;
    for format in FORMATS {
        let (weight, of_norm) = (bench.weight(n, k, format)?, bench.noise(k));
        let linear = Linear::new(weight.clone(), None)?.with_arithmetic(arithmetic);
        let op = NormedLinear::new(RmsNorm::new(of_norm.clone(), EPS)?, linear)?;
        for (m, dtype) in rows_and_dtypes() {
            let x = bench.tensor(&[m, k], dtype)?;
            let mut norm = reference::rms_norm(&to_f32(&x)?, &of_norm, EPS as f32);
            if bench.runner.is_cpu() || m > FEW {
                // Two ops, with a tensor between them.
                norm = rounded(norm, dtype)?;
            }
            let expected = reference::linear(&weight, &norm, m, arithmetic);
            bench.compare(case(m, dtype, format, arithmetic), &op.forward(&x)?, expected)?;
        }
    }
    Ok(())
}

/// Heads whose rows are a part of the weight's.
const HEADS: HeadRows = HeadRows {
    heads: 3,
    stride: 40,
    start: 8,
    len: 24,
};

pub(super) fn per_head(bench: &mut Bench<'_>) -> Result<()> {
    for format in FORMATS {
        let weight = bench.weight(HEADS.heads * HEADS.stride, 256, format)?;
        for arithmetic in bench.runner.arithmetics() {
            let name = format!("groups of {}, {arithmetic:?}", format.group);
            both_ways(bench, &weight, *arithmetic, &name)?;
        }
    }
    Ok(())
}

pub(super) fn per_head_dense(bench: &mut Bench<'_>) -> Result<()> {
    for kind in FLOATS {
        let weight = bench.dense(HEADS.heads * HEADS.stride, 256, kind)?;
        both_ways(
            bench,
            &weight,
            Arithmetic::default(),
            &format!("weight in {kind:?}"),
        )?;
    }
    Ok(())
}

fn both_ways(bench: &mut Bench<'_>, weight: &Weight, arithmetic: Arithmetic, name: &str) -> Result<()> {
    let k = weight.shape().1;
    for (orientation, width) in [(Orientation::Ordinary, k), (Orientation::Transposed, HEADS.len)] {
        let op = PerHead::new(weight.clone(), HEADS, orientation)?.with_arithmetic(arithmetic);
        for (m, dtype) in rows_and_dtypes() {
            let x = bench.tensor(&[m, HEADS.heads, width], dtype)?;
            let comparison = validate_kernel_output(&op, &x)?;
            let case = format!("{orientation:?}, {m} rows, {dtype:?}, {name}");
            bench.see(case, bound_of(dtype), comparison);
        }
    }
    Ok(())
}

/// The ordinary ones, of parts of attention.
pub(super) fn merged(bench: &mut Bench<'_>) -> Result<()> {
    let k = 256;
    for format in FORMATS {
        let weight = bench.weight(HEADS.heads * HEADS.stride, k, format)?;
        for arithmetic in bench.runner.arithmetics() {
            let name = format!("groups of {}, {arithmetic:?}", format.group);
            of_parts(bench, &weight, *arithmetic, &name)?;
        }
    }
    for kind in FLOATS {
        let weight = bench.dense(HEADS.heads * HEADS.stride, k, kind)?;
        of_parts(
            bench,
            &weight,
            Arithmetic::default(),
            &format!("weight in {kind:?}"),
        )?;
    }
    Ok(())
}

fn of_parts(bench: &mut Bench<'_>, weight: &Weight, arithmetic: Arithmetic, name: &str) -> Result<()> {
    let (k, splits) = (weight.shape().1, 3);
    let op = PerHead::new(weight.clone(), HEADS, Orientation::Ordinary)?.with_arithmetic(arithmetic);
    // More tokens are merged by themselves.
    for (m, dtype) in rows_and_dtypes().filter(|(m, _)| *m <= FEW) {
        let parts = bench.tensor(&[m, HEADS.heads, splits, k], DType::F32)?;
        // Largest scores below 1, and sums of at least half as much.
        let stats = (bench.tensor(&[m, HEADS.heads, splits, 2], DType::F32)?.abs()? + 0.5)?;
        let x = reference::merge_parts(&to_f32(&parts)?, &to_f32(&stats)?, splits, k);
        let expected = reference::per_head(weight, HEADS, &x, m, arithmetic);
        let case = format!("{m} tokens, {splits} parts, {dtype:?}, {name}");
        bench.compare(case, &op.forward_merged(&parts, &stats, dtype)?, expected)?;
    }
    Ok(())
}
