//! Attention by Candle's own ops, for devices on which this crate has no kernel for it: Candle's fused `sdpa` where its
//! kernels fit, otherwise products and a softmax in f32.

use super::OP;
use super::sdpa::Fused;
use crate::nn::Mask;
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};

/// Bytes of scores that products and softmax make at a time.
const SCORES: usize = 256 << 20;

/// A call, shapes checked: queries `[n, heads, d]` in parts, keys `[T, heads, d]` or `[T, d]` in parts, values likewise.
pub(super) struct Call<'a> {
    pub queries: &'a [&'a Tensor],
    pub keys: &'a [&'a Tensor],
    pub values: &'a Tensor,
    pub position: usize,
    pub heads: usize,
    pub scale: f32,
    pub window: Option<usize>,
}

impl Call<'_> {
    /// `[n, heads, v]` in the queries' dtype.
    pub fn run(&self) -> Result<Tensor> {
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
        let output = match fused.filter(|_| queries.device().is_metal()) {
            Some(fused) => {
                let (queries, keys, values) =
                    fused.padded(&queries.unsqueeze(0)?, &keys.unsqueeze(0)?, &values.unsqueeze(0)?)?;
                let causal = n > 1;
                let output = candle_nn::ops::sdpa(&queries, &keys, &values, None, causal, self.scale, 1.0)?;
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
        let together = (SCORES / (size_of::<f32>() * self.heads * total.max(1))).clamp(1, n.max(1));
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
