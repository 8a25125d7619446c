//! Attention by Candle's own ops, for devices on which this crate has no kernel for it: Candle's fused `sdpa` where its
//! kernels fit, otherwise products and a softmax in f32.

use super::OP;
use super::sdpa::Fused;
use crate::nn::Mask;
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};

/// Bytes of scores that products and softmax make at a time.
pub(super) const SCORES: usize = 256 << 20;

/// Candle's fused attention, `[1, heads, rows, width]` each, causal or not: what a test stands in for.
pub(super) type Sdpa<'a> = dyn Fn(&Tensor, &Tensor, &Tensor, bool) -> candle_core::Result<Tensor> + 'a;

/// A call, shapes checked: queries `[n, heads, d]` in parts, keys `[T, heads, d]` or `[T, d]` in parts, values likewise.
pub(super) struct Call<'a> {
    pub queries: &'a [&'a Tensor],
    pub keys: &'a [&'a Tensor],
    pub values: &'a Tensor,
    pub position: usize,
    pub heads: usize,
    pub scale: f32,
    pub window: Option<usize>,
    /// Bytes of scores that products and softmax may make at a time, one query's at least.
    pub scores: usize,
}

impl Call<'_> {
    /// `[n, heads, v]` in the queries' dtype.
    pub fn run(&self) -> Result<Tensor> {
        let fused = |queries: &Tensor, keys: &Tensor, values: &Tensor, causal: bool| {
            candle_nn::ops::sdpa(queries, keys, values, None, causal, self.scale, 1.0)
        };
        // It has kernels for Metal alone.
        let is_there = self.queries[0].device().is_metal();
        self.run_with(is_there.then_some(&fused as &Sdpa<'_>))
    }

    /// The same, by this fused attention where one of its kernels fits.
    pub fn run_with(&self, sdpa: Option<&Sdpa<'_>>) -> Result<Tensor> {
        let (n, total) = (self.queries[0].dim(0)?, self.position + self.queries[0].dim(0)?);
        // [heads, n, d]
        let queries = Tensor::cat(self.queries, D::Minus1)?.transpose(0, 1)?;
        let keys = self.keys(total)?;
        let values = heads_first(&self.values.narrow(0, 0, total)?)?;
        let dtype = queries.dtype();
        for (argument, tensor) in [("keys", &keys), ("values", &values)] {
            if tensor.dtype() != dtype {
                let found = format!("{:?}", tensor.dtype());
                return Err(Error::argument(
                    OP,
                    argument,
                    format!("{dtype:?}, as the queries"),
                    found,
                ));
            }
        }
        let widths = (queries.dim(D::Minus1)?, values.dim(D::Minus1)?);
        let fused = match self.window {
            None => Fused::choose(n, widths.0, widths.1, dtype),
            Some(_) => None,
        };
        let output = match fused.zip(sdpa) {
            Some((fused, sdpa)) => {
                let (queries, keys, values) =
                    fused.padded(&queries.unsqueeze(0)?, &keys.unsqueeze(0)?, &values.unsqueeze(0)?)?;
                let output = sdpa(&queries, &keys, &values, n > 1)?;
                fused.trimmed(&output, n)?.squeeze(0)?
            }
            None => self.by_products(&queries, &keys, &values)?,
        };
        Ok(output.transpose(0, 1)?.contiguous()?)
    }

    /// All parts of the keys side by side, `[heads or 1, T, d]`.
    fn keys(&self, total: usize) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(self.keys.len());
        for part in self.keys {
            parts.push(heads_first(&part.narrow(0, 0, total)?)?);
        }
        let heads = parts.iter().map(|part| part.dims()[0]).max().unwrap_or(1);
        for part in &mut parts {
            let (_, rows, width) = part.dims3()?;
            *part = part.broadcast_as((heads, rows, width))?;
        }
        Ok(match parts.as_slice() {
            [one] => one.clone(),
            parts => Tensor::cat(parts, D::Minus1)?,
        })
    }

    /// Products and a softmax in f32, so many queries at a time that the scores stay small.
    fn by_products(&self, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let (n, total, dtype) = (queries.dim(1)?, keys.dim(1)?, queries.dtype());
        let mask = match self.window {
            Some(window) => Mask::sliding_window(window),
            None => Mask::causal(),
        };
        // Keys and values that all heads share meet the queries of all heads in one product.
        let shared = |tensor: &Tensor| -> Result<Tensor> {
            let (heads, rows, width) = tensor.dims3()?;
            let heads = if heads == 1 { 1 } else { self.heads };
            Ok(tensor
                .to_dtype(DType::F32)?
                .broadcast_as((heads, rows, width))?
                .contiguous()?)
        };
        let (keys, values) = (shared(keys)?.transpose(1, 2)?, shared(values)?);
        let product = |left: &Tensor, right: &Tensor| -> Result<Tensor> {
            if right.dim(0)? == self.heads {
                return Ok(left.contiguous()?.matmul(right)?);
            }
            let (heads, rows, width) = left.dims3()?;
            let left = left.contiguous()?.reshape((1, heads * rows, width))?;
            Ok(left.matmul(right)?.reshape((heads, rows, right.dim(2)?))?)
        };
        let together = (self.scores / (size_of::<f32>() * self.heads * total.max(1))).clamp(1, n.max(1));
        let mut outputs = Vec::new();
        for start in (0..n).step_by(together) {
            let len = together.min(n - start);
            let some = (queries.narrow(1, start, len)?.to_dtype(DType::F32)? * f64::from(self.scale))?;
            let mut scores = product(&some, &keys)?;
            let first = self.position + start;
            let sees_all = first + 1 == total && len == 1 && self.window.is_none_or(|window| window >= total);
            if !sees_all {
                let mask = mask.tensor(first..first + len, 0..total, DType::F32, queries.device())?;
                scores = scores.broadcast_add(&mask)?;
            }
            outputs.push(product(&candle_nn::ops::softmax_last_dim(&scores)?, &values)?);
        }
        let width = values.dim(D::Minus1)?;
        Ok(match outputs.as_slice() {
            [] => Tensor::zeros((self.heads, 0, width), dtype, queries.device())?,
            outputs => Tensor::cat(outputs, 1)?.to_dtype(dtype)?,
        })
    }
}

/// `[T, heads, d]` or `[T, d]` as `[heads, T, d]`, one head where all share it.
fn heads_first(tensor: &Tensor) -> Result<Tensor> {
    Ok(match tensor.rank() {
        2 => tensor.unsqueeze(0)?,
        _ => tensor.transpose(0, 1)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Attention;
    use candle_core::Device;
    use std::cell::Cell;

    const HEADS: usize = 2;
    const SCALE: f32 = 0.3;

    fn tensor(shape: (usize, usize, usize), dtype: DType) -> Tensor {
        let values = Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        values.to_dtype(dtype).unwrap()
    }

    fn part(tensor: &Tensor, start: usize, len: usize) -> Tensor {
        tensor.narrow(D::Minus1, start, len).unwrap()
    }

    fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
        assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()));
        let bound = match found.dtype() {
            DType::F16 => 2e-3,
            DType::BF16 => 2e-2,
            _ => 1e-5,
        };
        let flat = |tensor: &Tensor| {
            let all = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            all.to_vec1::<f32>().unwrap()
        };
        for (a, b) in flat(found).into_iter().zip(flat(expected)) {
            assert!((a - b).abs() < bound, "{what}: {a} for {b}");
        }
    }

    #[test]
    fn few_queries_at_a_time_give_the_same() {
        for (n, position, window) in [(7, 0, None), (6, 5, None), (1, 9, None), (7, 4, Some(3))] {
            let total = position + n;
            let [queries, keys] = [n, total].map(|rows| tensor((rows, HEADS, 8), DType::F32));
            let values = tensor((total, HEADS, 4), DType::F32);
            let attention = Attention::new(HEADS, SCALE, window).unwrap();
            let expected = attention
                .forward(&[&queries], &[&keys], &values, position)
                .unwrap();
            let of_a_query = size_of::<f32>() * HEADS * total;
            // Not even one query's; one's; two's and three's, which do not divide seven; all.
            for scores in [1, of_a_query, 2 * of_a_query, 4 * of_a_query - 1, SCORES] {
                let call = Call {
                    queries: &[&queries],
                    keys: &[&keys],
                    values: &values,
                    position,
                    heads: HEADS,
                    scale: SCALE,
                    window,
                    scores,
                };
                let what = format!("{n} after {position}, {window:?}, {scores} bytes");
                assert_close(&call.run().unwrap(), &expected, &what);
            }
        }
    }

    /// Stands in for Candle's kernels: what they compute where their sources say that they compute it, and an error where
    /// they refuse operands or compute something else.
    fn stand_in(
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        causal: bool,
    ) -> candle_core::Result<Tensor> {
        let ((_, heads, n, width), (_, shared, total, _)) = (queries.dims4()?, keys.dims4()?);
        let listed: &[usize] = match n {
            1 => &[32, 64, 96, 128, 256, 512],
            _ => &[32, 64, 72, 80, 96, 128, 256],
        };
        let of_one_width = [keys, values]
            .iter()
            .all(|x| x.dims() == [1, shared, total, width]);
        let together = [queries, keys, values].iter().all(|x| x.is_contiguous());
        // The last tile of queries is whole, and the tokens before the first query are told from these two numbers.
        let tiled = n == 1 || (causal && n.is_multiple_of(32));
        let fits = n == 1 || (width, queries.dtype()) != (256, DType::F32);
        if !(listed.contains(&width) && of_one_width && together && tiled && fits) {
            candle_core::bail!("no kernel for {queries:?}, {keys:?}, {values:?}");
        }
        let widened = |x: &Tensor| {
            x.to_dtype(DType::F32)?
                .broadcast_as((1, heads, total, width))?
                .contiguous()
        };
        let (keys, values) = (widened(keys)?, widened(values)?);
        let scores = (queries.to_dtype(DType::F32)?.matmul(&keys.t()?)? * f64::from(SCALE))?;
        let sees = |row: usize, key: usize| !causal || key <= row + (total - n);
        let mask = (0..n * total).map(|at| {
            if sees(at / total, at % total) {
                0f32
            } else {
                f32::NEG_INFINITY
            }
        });
        let mask = Tensor::from_iter(mask, &Device::Cpu)?.reshape((n, total))?;
        let shares = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
        shares.matmul(&values)?.to_dtype(queries.dtype())
    }

    /// What the operands of models come to, padded, through a fused attention and trimmed again.
    #[test]
    fn fused_attention_gives_the_same() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (n, position) in [(1, 0), (1, 40), (3, 0), (33, 0), (43, 5), (32, 16)] {
                let (total, many, half) = (position + n, n > 1, dtype != DType::F32);
                // Widths of a key's two parts and of a value; whether all heads share them, values being the first part, as
                // in latent space; whether a kernel fits.
                for (first, second, value, shared, fits) in [
                    // GLM-4.7-Flash, the demo model and the tiny ones, materialised.
                    (192, 64, 256, false, half || !many),
                    (64, 32, 64, false, true),
                    (32, 16, 32, false, false),
                    // The tiny models' latents.
                    (64, 16, 64, true, many),
                ] {
                    let queries = [first, second].map(|width| tensor((n, HEADS, width), dtype));
                    // Rows as a cache has them: some more than there are tokens.
                    let rows = tensor((total + 2, 1, first + second), dtype).squeeze(1).unwrap();
                    let expanded = tensor((total + 2, HEADS, first + value), dtype);
                    let (keys, values) = match shared {
                        true => (vec![rows.clone()], part(&rows, 0, value)),
                        false => (
                            vec![part(&expanded, 0, first), part(&rows, first, second)],
                            part(&expanded, first, value),
                        ),
                    };
                    let (queries, keys) = (queries.each_ref(), keys.iter().collect::<Vec<_>>());
                    let expected = Attention::new(HEADS, SCALE, None)
                        .unwrap()
                        .forward(&queries, &keys, &values, position)
                        .unwrap();
                    let call = Call {
                        queries: &queries,
                        keys: &keys,
                        values: &values,
                        position,
                        heads: HEADS,
                        scale: SCALE,
                        window: None,
                        scores: SCORES,
                    };
                    let calls = Cell::new(0);
                    let counted = |queries: &Tensor, keys: &Tensor, values: &Tensor, causal: bool| {
                        calls.set(calls.get() + 1);
                        stand_in(queries, keys, values, causal)
                    };
                    let found = call.run_with(Some(&counted)).unwrap();
                    let what = format!("{n} after {position}, {first} + {second}, {value}, {dtype:?}");
                    assert_eq!(calls.get(), usize::from(fits), "{what}");
                    assert_close(&found, &expected, &what);
                }
            }
        }
    }

    #[test]
    fn a_window_is_not_for_fused_attention() {
        let queries = tensor((5, HEADS, 64), DType::F16);
        let call = Call {
            queries: &[&queries],
            keys: &[&queries],
            values: &queries,
            position: 0,
            heads: HEADS,
            scale: SCALE,
            window: Some(2),
            scores: SCORES,
        };
        let refused =
            |_: &Tensor, _: &Tensor, _: &Tensor, _: bool| candle_core::bail!("a causal flag has no window");
        let attention = Attention::new(HEADS, SCALE, Some(2)).unwrap();
        let expected = attention.forward(&[&queries], &[&queries], &queries, 0).unwrap();
        assert_close(
            &call.run_with(Some(&refused)).unwrap(),
            &expected,
            "a window of 2",
        );
    }
}
