//! Where an op's inputs lie, as launch plans of rows and heads take them.

use super::planned::{row_stride, runs_on};
use crate::metal::norm_rope::{Heads, Rows};
use crate::{Error, Result};
use candle_core::{DType, Layout, Tensor};

/// Rows of the last dimension, of the input that is this operand.
///
/// # Errors
/// [`Error::Argument`] for rows that do not lie one stride apart, which [`prepared`](super::planned::prepared) mends.
pub(super) fn rows(
    op: &'static str,
    argument: &'static str,
    layout: &Layout,
    dtype: DType,
    operand: usize,
) -> Result<Rows> {
    let Some(row) = row_stride(layout, 1) else {
        let found = format!("strides {:?} of {:?}", layout.stride(), layout.dims());
        return Err(Error::argument(op, argument, "rows one stride apart", found));
    };
    Ok(Rows {
        operand,
        offset: layout.start_offset() * dtype.size_in_bytes(),
        row,
    })
}

/// Heads of `[tokens, heads, d]`, of the input that is this operand.
///
/// # Errors
/// [`Error::Argument`] for heads whose elements do not lie together, which [`prepared_heads`] mends.
pub(super) fn heads(
    op: &'static str,
    argument: &'static str,
    layout: &Layout,
    dtype: DType,
    operand: usize,
) -> Result<Heads> {
    let (&[_, count, _], &[token, head, 1]) = (layout.dims(), layout.stride()) else {
        let found = format!("strides {:?} of {:?}", layout.stride(), layout.dims());
        return Err(Error::argument(
            op,
            argument,
            "heads with their elements together",
            found,
        ));
    };
    Ok(Heads {
        operand,
        offset: layout.start_offset() * dtype.size_in_bytes(),
        count,
        token,
        head,
    })
}

/// A tensor whose last dimension lies together: itself wherever that does not matter.
pub(super) fn prepared_heads(x: &Tensor) -> candle_core::Result<Tensor> {
    if runs_on(x.device()) && x.stride().last() != Some(&1) {
        return x.contiguous();
    }
    Ok(x.clone())
}
