//! Products with weights on devices that run launch plans.

use super::planned::{Planned, row_stride};
use crate::cpu::HeadRows;
use crate::fp4::{Bytes, Weight};
use crate::metal::linear::Direction;
use crate::metal::plan::Launch;
use crate::metal::{dense, linear};
use crate::{Error, Result};
use candle_core::{DType, Layout};

/// Products of one tensor of activations, their outputs side by side.
pub(super) struct Products<'a> {
    op: &'static str,
    direction: Direction,
    parts: Vec<Part<'a>>,
    /// An RMS norm of the activations, its weight in F32 and its epsilon: for few rows and weights in FP4.
    norm: Option<(&'a Bytes, f32)>,
    /// Whether heads are a dimension of their own, the last but one.
    per_head: bool,
}

/// A product among them.
pub(super) struct Part<'a> {
    pub weight: &'a Weight,
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
    /// Products with whole weights; `None` where one is in eight bits, which no kernel takes.
    pub fn with(
        op: &'static str,
        weights: impl Iterator<Item = (&'a Weight, Option<&'a Bytes>)>,
    ) -> Option<Self> {
        let parts = weights.map(|(weight, bias)| {
            let n = weight.shape().0;
            let rows = HeadRows {
                heads: 1,
                stride: n,
                start: 0,
                len: n,
            };
            taken(weight).then_some(Part { weight, rows, bias })
        });
        Some(Self {
            op,
            direction: Direction::Rows,
            parts: parts.collect::<Option<_>>()?,
            norm: None,
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
        taken(weight).then_some(Self {
            op,
            direction,
            parts: vec![Part {
                weight,
                rows,
                bias: None,
            }],
            norm: None,
            per_head: true,
        })
    }

    /// The same products of the activations' norm.
    pub fn of_norm(self, weight: &'a Bytes, eps: f32) -> Self {
        Self {
            norm: Some((weight, eps)),
            ..self
        }
    }

    /// The launches for activations that lie so: one a part, or one for two parts that [fit](linear::Product::takes_beside).
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
                let regions: Vec<_> = part.weight.regions().map(&mut add).collect();
                (regions, part.bias.map(&mut add))
            })
            .collect();
        let normed = self.norm.map(|(weight, eps)| linear::Normed {
            weight: add(weight),
            eps,
        });
        let (x, mut start) = (bytes.len(), 0);
        let lies = Lies {
            dtype,
            m,
            x_offset: layout.start_offset() * size,
            x_row,
            x_head,
            y_row: heads * to,
            y_head: to,
            x,
            normed,
        };
        let mut launches = Vec::with_capacity(self.parts.len());
        let mut parts = self.parts.iter().zip(&weights).peekable();
        while let Some((part, (regions, bias))) = parts.next() {
            let next = parts
                .peek()
                .filter(|(_, (_, bias))| bias.is_none())
                .map(|(next, (regions, _))| (next.weight, &regions[..]));
            let (launch, joined) = self.launch(part, (regions, *bias), start * size, lies, next)?;
            launches.push(launch);
            start += part.widths(self.direction).1;
            if joined && let Some((next, _)) = parts.next() {
                start += next.widths(self.direction).1;
            }
        }
        Ok(Planned {
            launches,
            bytes,
            outputs: [(dims.into(), dtype)],
            scratch: Vec::new(),
        })
    }

    /// The launch of a part whose weight's regions and bias are these operands, and whether the next part's product, of a weight
    /// with these regions and without a bias, is in it.
    fn launch(
        &self,
        part: &Part<'_>,
        (regions, bias): (&[usize], Option<usize>),
        y_offset: usize,
        lies: Lies,
        next: Option<(&Weight, &[usize])>,
    ) -> Result<(Launch, bool)> {
        let Lies {
            dtype,
            m,
            x_offset,
            x_row,
            x_head,
            y_row,
            y_head,
            x,
            normed,
        } = lies;
        let (rows, direction, y) = (part.rows, self.direction, x + 1);
        match (part.weight, regions) {
            (Weight::Fp4(weight), &[codes, scales]) => {
                let product = linear::Product {
                    weight,
                    rows,
                    direction,
                    operands: linear::Operands {
                        codes,
                        scales,
                        bias,
                        x,
                        y,
                    },
                    dtype,
                    m,
                    x_offset,
                    x_row,
                    x_head,
                    y_offset,
                    y_row,
                    y_head,
                };
                let beside = match next {
                    Some((Weight::Fp4(weight), &[codes, scales])) if product.takes_beside(weight) => {
                        Some(linear::Beside {
                            weight,
                            codes,
                            scales,
                        })
                    }
                    _ => None,
                };
                let launch = product.launch_with(linear::Extras { beside, normed })?;
                Ok((launch, beside.is_some()))
            }
            (Weight::Dense(weight), &[region]) if normed.is_none() => {
                let product = dense::Product {
                    weight,
                    rows,
                    direction,
                    operands: dense::Operands {
                        weight: region,
                        bias,
                        x,
                        y,
                    },
                    dtype,
                    m,
                    x_offset,
                    x_row,
                    x_head,
                    y_offset,
                    y_row,
                    y_head,
                };
                let beside = match next {
                    Some((Weight::Dense(weight), &[operand])) if product.takes_beside(weight) => {
                        Some(dense::Beside { weight, operand })
                    }
                    _ => None,
                };
                Ok((product.launch_beside(beside)?, beside.is_some()))
            }
            (weight, _) => {
                let found = format!("{:?} in integers", weight.shape());
                Err(Error::argument(self.op, "weight", "FP4 or floating point", found))
            }
        }
    }
}

/// Whether there is a kernel for such weights.
fn taken(weight: &Weight) -> bool {
    !matches!(weight, Weight::Int8(_) | Weight::Blocks(_))
}

/// Where activations and outputs lie, as of a plan's launches, and of what dtype they are.
#[derive(Clone, Copy)]
struct Lies {
    dtype: DType,
    m: usize,
    x_offset: usize,
    x_row: usize,
    x_head: usize,
    y_row: usize,
    y_head: usize,
    /// The operand; the output is the next.
    x: usize,
    normed: Option<linear::Normed>,
}
