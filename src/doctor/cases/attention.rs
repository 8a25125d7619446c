//! Attention: the CPU's kernels, and on a Mac Candle's.

use super::{Bench, to_f32};
use crate::Result;
use crate::cpu::{self, HeadView, reference};
use crate::doctor::runner::DTYPES;
use crate::ops::Attention;

const HEADS: usize = 4;

/// Widths of queries without their rotary part, of that, and of values: GLM-4.7-Flash's, the demo model's.
const WIDTHS: [(usize, usize, usize); 2] = [(192, 64, 256), (64, 32, 64)];

/// New tokens, and where the first of them stands. 43 after 5 is what Candle's fused kernel gets wrong without the padding
/// that it is given here.
const TOKENS: [(usize, usize); 6] = [(1, 0), (1, 5), (1, 700), (33, 0), (33, 5), (43, 5)];

pub(super) fn attention(bench: &mut Bench<'_>) -> Result<()> {
    for dtype in DTYPES {
        for (nope, rope, value) in WIDTHS {
            let op = Attention::new(HEADS, scale(nope + rope), None)?;
            for (n, position) in TOKENS {
                let total = position + n;
                let queries = [
                    bench.tensor(&[n, HEADS, nope], dtype)?,
                    bench.tensor(&[n, HEADS, rope], dtype)?,
                ];
                let keys = [
                    bench.tensor(&[total, HEADS, nope], dtype)?,
                    bench.tensor(&[total, rope], dtype)?,
                ];
                let values = bench.tensor(&[total, HEADS, value], dtype)?;
                let output = op.forward(
                    &[&queries[0], &queries[1]],
                    &[&keys[0], &keys[1]],
                    &values,
                    position,
                )?;
                let lists = [&queries[0], &queries[1], &keys[0], &keys[1], &values].map(to_f32);
                let [q_nope, q_rope, k_nope, k_rope, values] = lists;
                let (q_nope, q_rope, k_nope, k_rope, values) = (q_nope?, q_rope?, k_nope?, k_rope?, values?);
                let expected = reference::attention(
                    cpu::Attention {
                        heads: HEADS,
                        queries: &[of_heads(&q_nope, nope), of_heads(&q_rope, rope)],
                        keys: &[of_heads(&k_nope, nope), shared(&k_rope, rope, rope)],
                        values: of_heads(&values, value),
                        position,
                        window: None,
                        scale: scale(nope + rope),
                    },
                    n,
                );
                let case = format!(
                    "{n} queries of {} at {position}, values of {value}, {dtype:?}",
                    nope + rope
                );
                bench.compare(case, &output, expected)?;
            }
        }
        over_latents(bench, dtype)?;
    }
    Ok(())
}

/// Keys and values that all heads share, the values a part of the keys.
fn over_latents(bench: &mut Bench<'_>, dtype: candle_core::DType) -> Result<()> {
    let (width, value) = (96, 64);
    let op = Attention::new(HEADS, scale(width), None)?;
    for (n, position) in TOKENS {
        let queries = bench.tensor(&[n, HEADS, width], dtype)?;
        let keys = bench.tensor(&[position + n, width], dtype)?;
        let values = keys.narrow(1, 0, value)?;
        let output = op.forward(&[&queries], &[&keys], &values, position)?;
        let (queries, keys) = (to_f32(&queries)?, to_f32(&keys)?);
        let expected = reference::attention(
            cpu::Attention {
                heads: HEADS,
                queries: &[of_heads(&queries, width)],
                keys: &[shared(&keys, width, width)],
                values: shared(&keys, width, value),
                position,
                window: None,
                scale: scale(width),
            },
            n,
        );
        bench.compare(
            format!("{n} queries at {position} over latents, {dtype:?}"),
            &output,
            expected,
        )?;
    }
    Ok(())
}

fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Rows of [`HEADS`] heads.
fn of_heads(data: &[f32], width: usize) -> HeadView<'_> {
    HeadView {
        data,
        row: HEADS * width,
        head: width,
        width,
    }
}

/// The first `width` of rows that all heads share.
fn shared(data: &[f32], row: usize, width: usize) -> HeadView<'_> {
    HeadView {
        data,
        row,
        head: 0,
        width,
    }
}
