//! What goes over rows: norms, sums, rotations.

use super::{Bench, rounded, rows_and_dtypes, to_f32};
use crate::Result;
use crate::cpu::{HeadView, Pairing, reference};
use crate::ops::{Add, LatentRows, RmsNorm, Rope, add_norm};
use candle_core::{DType, Tensor};

pub(super) const EPS: f64 = 1e-5;
pub(super) const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::Halves];

/// The norm alone, and with the sum before it.
pub(super) fn norm(bench: &mut Bench<'_>) -> Result<()> {
    for width in [512, 771] {
        let weight = bench.noise(width);
        let op = RmsNorm::new(weight.clone(), EPS)?;
        for (m, dtype) in rows_and_dtypes() {
            let case = |of: &str| format!("{of} of [{m}, {width}], {dtype:?}");
            let (x, delta) = (
                bench.tensor(&[m, width], dtype)?,
                bench.tensor(&[m, width], dtype)?,
            );
            let norm = |x: &[f32]| reference::rms_norm(x, &weight, EPS as f32);
            bench.compare(case("the norm"), &op.forward(&x)?, norm(&to_f32(&x)?))?;
            let sum = rounded(sum(&x, &delta)?, dtype)?;
            let (added, normed) = add_norm(&x, &delta, &op)?;
            bench.compare(case("the norm of a sum"), &normed, norm(&sum))?;
            bench.compare(case("the sum before a norm"), &added, sum)?;
        }
    }
    Ok(())
}

pub(super) fn add(bench: &mut Bench<'_>) -> Result<()> {
    for (m, dtype) in rows_and_dtypes() {
        let (a, b) = (bench.tensor(&[m, 513], dtype)?, bench.tensor(&[m, 513], dtype)?);
        bench.compare(
            format!("[{m}, 513], {dtype:?}"),
            &Add.forward(&a, &b)?,
            sum(&a, &b)?,
        )?;
    }
    Ok(())
}

fn sum(a: &Tensor, b: &Tensor) -> Result<Vec<f32>> {
    Ok(to_f32(a)?.iter().zip(to_f32(b)?).map(|(a, b)| a + b).collect())
}

pub(super) fn rope(bench: &mut Bench<'_>) -> Result<()> {
    let (heads, width) = (3, 64);
    for pairing in PAIRINGS {
        let op = Rope::new(pairing);
        for (m, dtype) in rows_and_dtypes() {
            let x = bench.tensor(&[m, heads, width], dtype)?;
            let (cos, sin) = angles(bench, m, width / 2)?;
            let expected = turned(pairing, &x, (&cos, &sin))?;
            bench.compare(
                format!("{m} rows, {dtype:?}, {pairing:?}"),
                &op.forward(&x, &cos, &sin)?,
                expected,
            )?;
        }
    }
    Ok(())
}

/// With the queries that are turned along the way, and without.
pub(super) fn latent(bench: &mut Bench<'_>) -> Result<()> {
    let (heads, latent, width) = (3, 96, 32);
    for pairing in PAIRINGS {
        let weight = bench.noise(latent);
        let op = LatentRows::new(RmsNorm::new(weight.clone(), EPS)?, pairing);
        for (m, dtype) in rows_and_dtypes() {
            let case = |of: &str| format!("{of} of {m} rows, {dtype:?}, {pairing:?}");
            let kv = bench.tensor(&[m, latent + width], dtype)?;
            let queries = bench.tensor(&[m, heads, width], dtype)?;
            let (cos, sin) = angles(bench, m, width / 2)?;
            let normed = reference::rms_norm(
                &to_f32(&kv.narrow(1, 0, latent)?.contiguous()?)?,
                &weight,
                EPS as f32,
            );
            let key = kv.narrow(1, latent, width)?.unsqueeze(1)?.contiguous()?;
            let key = turned(pairing, &key, (&cos, &sin))?;
            let rows = normed.chunks_exact(latent).zip(key.chunks_exact(width));
            let rows: Vec<f32> = rows.flat_map(|(latent, key)| [latent, key].concat()).collect();
            bench.compare(case("rows alone"), &op.forward(&kv, &cos, &sin)?, rows.clone())?;
            let (found, found_queries) = op.forward_with_queries(&kv, &queries, &cos, &sin)?;
            bench.compare(case("rows"), &found, rows)?;
            let expected = turned(pairing, &queries, (&cos, &sin))?;
            bench.compare(case("queries"), &found_queries, expected)?;
        }
    }
    Ok(())
}

/// Cosines and sines; any numbers do.
pub(super) fn angles(bench: &mut Bench<'_>, rows: usize, pairs: usize) -> Result<(Tensor, Tensor)> {
    let mut values = || bench.tensor(&[rows, pairs], DType::F32);
    Ok((values()?, values()?))
}

/// `[tokens, heads, width]`, turned by the reference.
pub(super) fn turned(pairing: Pairing, x: &Tensor, (cos, sin): (&Tensor, &Tensor)) -> Result<Vec<f32>> {
    let (tokens, heads, width) = x.dims3()?;
    let values = to_f32(x)?;
    let view = HeadView {
        data: &values,
        row: heads * width,
        head: width,
        width,
    };
    let angles = (&to_f32(cos)?[..], &to_f32(sin)?[..]);
    Ok(reference::rope(pairing, view, heads, angles, tokens))
}
