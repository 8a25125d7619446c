//! Products with FP4 weights on devices that run launch plans.

use super::planned::{Planned, row_stride};
use crate::cpu::HeadRows;
use crate::fp4::{Bytes, Fp4Tensor, Weight};
use crate::metal::linear::{Direction, Operands, Product};
use crate::{Error, Result};
use candle_core::{DType, Layout};

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

    /// The launches for activations that lie so: one a part.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape that does not fit, and for rows that do not lie one stride apart, which
    /// [`prepared`](super::planned::prepared) mends.
    pub fn planned(&self, layout: &Layout, dtype: DType) -> Result<Planned<'a, 1>> {
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
        let Some(x_row) = row_stride(layout, last.len()) else {
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
        let mut bytes = Vec::new();
        let mut add = |part: &'a Bytes| {
            bytes.push(part);
            bytes.len() - 1
        };
        let weights: Vec<_> = self
            .parts
            .iter()
            .map(|part| {
                (
                    add(part.weight.codes()),
                    add(part.weight.scales()),
                    part.bias.map(&mut add),
                )
            })
            .collect();
        let (x, mut start) = (bytes.len(), 0);
        let launches = self
            .parts
            .iter()
            .zip(weights)
            .map(|(part, (codes, scales, bias))| {
                let product = Product {
                    weight: part.weight,
                    rows: part.rows,
                    direction: self.direction,
                    operands: Operands {
                        codes,
                        scales,
                        bias,
                        x,
                        y: x + 1,
                    },
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
                product.launch()
            });
        Ok(Planned {
            launches: launches.collect::<Result<_>>()?,
            bytes,
            outputs: [(dims.into(), dtype)],
            scratch: Vec::new(),
        })
    }
}
