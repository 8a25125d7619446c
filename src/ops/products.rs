//! Products with FP4 weights on devices that run launch plans.

use crate::cpu::HeadRows;
use crate::fp4::{Bytes, Fp4Tensor, Weight};
use crate::metal::linear::{Direction, Product};
use crate::metal::plan::Plan;
use crate::{Error, Result};
use candle_core::{DType, Layout, Shape};

/// Products of one tensor of activations, their outputs side by side.
pub(super) struct Products<'a> {
    op: &'static str,
    direction: Direction,
    parts: Vec<Part<'a>>,
    /// Whether heads are a dimension of their own, the last but one.
    per_head: bool,
}

/// A product among them.
pub(super) struct Part<'a> {
    pub weight: &'a Fp4Tensor,
    pub rows: HeadRows,
    /// In F32.
    pub bias: Option<&'a Bytes>,
}

impl Part<'_> {
    /// Elements of activations and of outputs a row, of one head.
    fn widths(&self, direction: Direction) -> (usize, usize) {
        let (k, len) = (self.weight.shape().1, self.rows.len);
        match direction {
            Direction::Rows => (k, len),
            Direction::Columns => (len, k),
        }
    }
}

/// What a device is to run, part by part, and the output's shape.
pub(super) struct Planned {
    pub plans: Vec<Plan>,
    pub shape: Shape,
}

impl<'a> Products<'a> {
    /// Products with whole weights; `None` where one is not in FP4, which no kernel takes yet.
    pub fn with(
        op: &'static str,
        weights: impl Iterator<Item = (&'a Weight, Option<&'a Bytes>)>,
    ) -> Option<Self> {
        let parts = weights.map(|(weight, bias)| {
            let Weight::Fp4(weight) = weight else { return None };
            let n = weight.shape().0;
            let rows = HeadRows {
                heads: 1,
                stride: n,
                start: 0,
                len: n,
            };
            Some(Part { weight, rows, bias })
        });
        Some(Self {
            op,
            direction: Direction::Rows,
            parts: parts.collect::<Option<_>>()?,
            per_head: false,
        })
    }

    /// A product a head.
    pub fn per_head(
        op: &'static str,
        weight: &'a Weight,
        rows: HeadRows,
        direction: Direction,
    ) -> Option<Self> {
        let Weight::Fp4(weight) = weight else { return None };
        Some(Self {
            op,
            direction,
            parts: vec![Part {
                weight,
                rows,
                bias: None,
            }],
            per_head: true,
        })
    }

    /// The parts.
    pub fn parts(&self) -> &[Part<'a>] {
        &self.parts
    }

    /// Plans for activations that lie so.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape that does not fit, and for rows that do not lie one stride apart:
    /// [`regular`] tells.
    pub fn plan(&self, layout: &Layout, dtype: DType) -> Result<Planned> {
        let heads = self.parts[0].rows.heads;
        let (from, _) = self.parts[0].widths(self.direction);
        let to = self.parts.iter().map(|part| part.widths(self.direction).1).sum();
        let mut dims = layout.dims().to_vec();
        let last = if self.per_head {
            vec![heads, from]
        } else {
            vec![from]
        };
        if !dims.ends_with(&last) {
            let expected = format!("last dimensions of {last:?}");
            return Err(Error::argument(self.op, "x", expected, format!("shape {dims:?}")));
        }
        let leading = dims.len() - last.len();
        let Some(x_row) = row_stride(layout, leading) else {
            let found = format!("strides {:?} of {dims:?}", layout.stride());
            return Err(Error::argument(self.op, "x", "rows one stride apart", found));
        };
        let x_head = if self.per_head {
            layout.stride()[leading]
        } else {
            0
        };
        let size = dtype.size_in_bytes();
        let m = dims[..leading].iter().product();
        if let Some(last) = dims.last_mut() {
            *last = to;
        }
        let mut start = 0;
        let plans = self.parts.iter().map(|part| {
            let product = Product {
                weight: part.weight,
                rows: part.rows,
                direction: self.direction,
                bias: part.bias.is_some(),
                dtype,
                m,
                x_offset: layout.start_offset() * size,
                x_row,
                x_head,
                y_offset: start * size,
                y_row: heads * to,
                y_head: to,
            };
            start += part.widths(self.direction).1;
            product.plan()
        });
        Ok(Planned {
            plans: plans.collect::<Result<_>>()?,
            shape: dims.into(),
        })
    }
}

/// Whether rows of the last `inner` dimensions lie one stride apart, and a row's elements together: what kernels take as
/// it is.
pub(super) fn regular(layout: &Layout, inner: usize) -> bool {
    layout
        .dims()
        .len()
        .checked_sub(inner)
        .is_some_and(|leading| row_stride(layout, leading).is_some())
}

/// Elements from one row to the next, the first `leading` dimensions counting rows.
fn row_stride(layout: &Layout, leading: usize) -> Option<usize> {
    let (dims, strides) = (layout.dims(), layout.stride());
    if *dims.last()? > 1 && *strides.last()? != 1 {
        return None;
    }
    let mut rows = dims[..leading]
        .iter()
        .zip(strides)
        .filter(|(dim, _)| **dim != 1)
        .rev();
    let Some((dim, stride)) = rows.next() else {
        // One row.
        return Some(dims[leading..].iter().product());
    };
    let mut expected = dim * stride;
    for (dim, stride) in rows {
        if *stride != expected {
            return None;
        }
        expected *= dim;
    }
    Some(*stride)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn stride(x: &Tensor, inner: usize) -> Option<usize> {
        row_stride(x.layout(), x.rank() - inner)
    }

    #[test]
    fn rows_one_stride_apart_are_found() {
        let x = Tensor::zeros((2, 3, 4, 8), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(stride(&x, 1), Some(8));
        assert_eq!(stride(&x, 2), Some(32));
        assert_eq!(stride(&x.narrow(3, 2, 4).unwrap(), 1), Some(8));
        assert_eq!(stride(&x.narrow(1, 1, 2).unwrap(), 1), None);
        assert_eq!(
            stride(&x.narrow(0, 1, 1).unwrap().narrow(1, 1, 2).unwrap(), 1),
            Some(8)
        );
        assert_eq!(stride(&x.narrow(2, 0, 1).unwrap(), 1), Some(32));
        assert_eq!(stride(&x.t().unwrap(), 1), None);
        assert_eq!(
            stride(&Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap(), 1),
            Some(8)
        );
        assert_eq!(stride(&x.transpose(0, 1).unwrap(), 1), None);
    }
}
