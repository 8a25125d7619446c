//! Plans of products with FP4 weights: `metal/linear.metal`.

use super::args::{Argument, LinearArgs};
use super::checked::{aligned, narrow, suffix};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use super::rows::{Stored, factor_constant, wide};
use crate::cpu::HeadRows;
use crate::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts};
use crate::{Error, Result};
use candle_core::DType;

const OP: &str = "mmfp4-linear";

/// Where the operands of a product stand among a plan's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// The weight's codes.
    pub codes: usize,
    /// The weight's scales.
    pub scales: usize,
    /// Biases in F32, where there are any.
    pub bias: Option<usize>,
    /// Activations.
    pub x: usize,
    /// The output.
    pub y: usize,
}

/// Rows of activations up to which a product goes along the rows of the weight.
pub const FEW: usize = 8;
/// Rows and columns of a tile of outputs.
const TILE: usize = 32;
/// Columns of a threadgroup of the transposed product.
const COLUMNS: usize = 32;
/// Rows of weights (those of all heads) below which simdgroups share rows: there would be too few of them, or none with
/// anything to do while a row's first codes are on their way.
const SHARED_BELOW: usize = 8192;
/// The same, below which a simdgroup has two rows instead of four.
const THIN_UP_TO: usize = 1536;

/// The same, from which on a simdgroup has eight rows, for one row of activations of two bytes.
const TALL_FROM: usize = 32_768;

/// Which way a product goes through a weight `[N, K]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `x · Wᵀ`: sums over K.
    Rows,
    /// `x · W`: sums over the head's rows.
    Columns,
}

/// A product with an FP4 weight.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The weight.
    pub weight: &'a Fp4Tensor,
    /// The rows of each head; all of them are one head's in a plain product.
    pub rows: HeadRows,
    /// Which way.
    pub direction: Direction,
    /// Its operands.
    pub operands: Operands,
    /// F32, F16 or BF16, of activations and output.
    pub dtype: DType,
    /// Rows of activations.
    pub m: usize,
    /// Bytes before the first activation in its buffer.
    pub x_offset: usize,
    /// Elements from one row of activations to the next.
    pub x_row: usize,
    /// Elements from one head's activations to the next's.
    pub x_head: usize,
    /// Bytes before the first output in its buffer.
    pub y_offset: usize,
    /// Elements from one row of the output to the next.
    pub y_row: usize,
    /// Elements from one head's output to the next's.
    pub y_head: usize,
}

/// A second weight, whose outputs stand beside the first's: of the same K and [of the same kind](Product::takes_beside).
#[derive(Debug, Clone, Copy)]
pub struct Beside<'a> {
    /// The weight.
    pub weight: &'a Fp4Tensor,
    /// Operand: its codes.
    pub codes: usize,
    /// Operand: its scales.
    pub scales: usize,
}

/// An RMS norm of the activations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normed {
    /// Operand: its weight, F32.
    pub weight: usize,
    /// What is added to the mean of the squares.
    pub eps: f32,
}

/// What a [`Product`] of [few rows](Product::few) does along the way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras<'a> {
    /// A second product of the same activations.
    pub beside: Option<Beside<'a>>,
    /// The norm is multiplied in place of the activations.
    pub normed: Option<Normed>,
}

/// Plans that between them launch every kernel on weights of a format: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has; [`Error::Tensor`] for a format that cannot be.
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    // A weight for every way to share out its rows.
    for (n, k) in [
        (8, 2 * format.group),
        (8, 1024),
        (THIN_UP_TO + 8, 1024),
        (SHARED_BELOW, 1024),
        (TALL_FROM, 2 * format.group),
    ] {
        let weight = zeros((n, k), format)?;
        let beside = Beside {
            weight: &weight,
            codes: 4,
            scales: 5,
        };
        let normed = Normed { weight: 6, eps: 1e-5 };
        let extras = [
            Extras::default(),
            Extras {
                beside: Some(beside),
                normed: None,
            },
            Extras {
                beside: None,
                normed: Some(normed),
            },
        ];
        for (direction, widths) in [(Direction::Rows, (k, n)), (Direction::Columns, (n, k))] {
            for m in [1, 2, 4, FEW, FEW + 1] {
                let product = Product {
                    weight: &weight,
                    rows: HeadRows {
                        heads: 1,
                        stride: n,
                        start: 0,
                        len: n,
                    },
                    direction,
                    operands: Operands {
                        codes: 0,
                        scales: 1,
                        bias: None,
                        x: 2,
                        y: 3,
                    },
                    dtype,
                    m,
                    x_offset: 0,
                    x_row: widths.0,
                    x_head: 0,
                    y_offset: 0,
                    y_row: widths.1,
                    y_head: 0,
                };
                for extras in extras.iter().take(if product.few() { 3 } else { 1 }) {
                    plans.push(Plan {
                        launches: vec![product.launch_with(*extras)?],
                    });
                }
            }
        }
    }
    Ok(plans)
}

/// A weight that stands for others of its shape and format.
pub(super) fn zeros((n, k): (usize, usize), format: Format) -> Result<Fp4Tensor> {
    let parts = Parts {
        shape: (n, k),
        group: format.group,
        codes: Bytes::copy_from(&vec![0; n * k / 2])?,
        scales: Bytes::copy_from(&vec![0; n * k / format.group * format.kind.size()])?,
        kind: format.kind,
        factor: Factor::None,
    };
    Fp4Tensor::new("w", parts)
}

impl Product<'_> {
    /// Whether a simdgroup has these rows of activations all at once: then [`Extras`] can be had.
    pub fn few(&self) -> bool {
        self.direction == Direction::Rows && self.m <= FEW
    }

    /// Whether the product with another weight can be in the same launch.
    pub fn takes_beside(&self, other: &Fp4Tensor) -> bool {
        let kind = |weight: &Fp4Tensor| {
            let factor = std::mem::discriminant(&weight.factor());
            (weight.shape().1, weight.group(), weight.scale_kind(), factor)
        };
        self.few() && self.rows.heads == 1 && self.operands.bias.is_none() && kind(self.weight) == kind(other)
    }

    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has, for sizes beyond 32 bits, and for codes or scales that are not
    /// aligned.
    pub fn launch(&self) -> Result<Launch> {
        self.launch_with(Extras::default())
    }

    /// Its launch, with more in it.
    ///
    /// # Errors
    /// As [`launch`](Self::launch); and [`Error::Argument`] where a product of this kind cannot have these extras.
    pub fn launch_with(&self, extras: Extras<'_>) -> Result<Launch> {
        let kind = suffix(OP, self.dtype)?;
        let Extras { beside, normed } = extras;
        if beside.is_some_and(|beside| !self.takes_beside(beside.weight)) {
            let expected = "one of the same K and format, no bias, and few rows of activations";
            return Err(Error::argument(OP, "second weight", expected, "another"));
        }
        if normed.is_some() && !self.few() {
            let expected = format!("at most {FEW} rows of activations");
            return Err(Error::argument(OP, "x", expected, self.m.to_string()));
        }
        loadable(self.weight)?;
        beside.map_or(Ok(()), |beside| loadable(beside.weight))?;
        let (_, k) = self.weight.shape();
        let HeadRows {
            heads,
            start,
            len,
            stride,
        } = self.rows;
        let mut constants = self.constants(beside);
        let (kernel, threadgroups, threads) = match (self.direction, self.m <= FEW) {
            (Direction::Rows, true) => {
                let second = beside.map_or(0, |beside| beside.weight.shape().0);
                let plain = beside.is_none() && normed.is_none();
                let short = self.m == 1 && self.dtype.size_in_bytes() == 2;
                let tall = plain && short && self.wide(None) && heads * len >= TALL_FROM;
                if tall {
                    let kernel = format!("linear_rows_{kind}_tall");
                    (kernel, [len.div_ceil(16), 1, heads], 64)
                } else {
                    let shape = Shares::of(self.m, k, heads * (len + second));
                    let blocks = |rows: usize| rows.div_ceil(shape.of_threadgroup());
                    constants.extend([
                        (5, Constant::Bool(beside.is_some())),
                        (6, Constant::Bool(normed.is_some())),
                        (7, Constant::U16(shape.sharing as u16)),
                    ]);
                    let m = self.m.next_power_of_two();
                    let of_x = if shape.thin {
                        "thin".to_string()
                    } else {
                        format!("m{m}")
                    };
                    (
                        format!("linear_rows_{kind}_{of_x}"),
                        [blocks(len) + blocks(second), self.m.div_ceil(m), heads],
                        32 * shape.simdgroups(),
                    )
                }
            }
            (Direction::Rows, false) => (
                format!("linear_tiles_{kind}"),
                [len.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
            (Direction::Columns, true) => {
                let rows = if self.m == 1 { 1 } else { 4 };
                (
                    format!("linear_columns_{kind}_m{rows}"),
                    [k.div_ceil(COLUMNS), self.m.div_ceil(rows), heads],
                    256,
                )
            }
            (Direction::Columns, false) => (
                format!("linear_columns_tiles_{kind}"),
                [k.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
        };
        let narrow = |argument, size| narrow(OP, argument, size);
        // Kernels count words and scales of a weight in 32 bits.
        for weight in std::iter::once(self.weight).chain(beside.map(|beside| beside.weight)) {
            narrow("weight", weight.codes().len() / 4)?;
            narrow("weight", weight.scales().len())?;
        }
        let args = LinearArgs {
            m: narrow("x", self.m)?,
            n: narrow("weight", len)?,
            k: narrow("weight", k)?,
            x_row: narrow("x", self.x_row)?,
            x_head: narrow("x", self.x_head)?,
            y_row: narrow("y", self.y_row)?,
            y_head: narrow("y", self.y_head)?,
            weight_row: narrow("rows", start)?,
            weight_head: narrow("rows", stride)?,
            factor: factor_of(self.weight),
            second_n: narrow("weight", beside.map_or(0, |beside| beside.weight.shape().0))?,
            second_factor: beside.map_or(1.0, |beside| factor_of(beside.weight)),
            eps: normed.map_or(0.0, |normed| normed.eps),
        };
        let read = |operand, offset| Binding::Read { operand, offset };
        let mut bindings = vec![
            (0, read(self.operands.codes, 0)),
            (1, read(self.operands.scales, 0)),
            (2, read(self.operands.x, self.x_offset)),
            (
                3,
                Binding::Write {
                    operand: self.operands.y,
                    offset: self.y_offset,
                },
            ),
            (4, Binding::Bytes(args.bytes())),
        ];
        if self.direction == Direction::Rows {
            constants.push((4, Constant::Bool(self.operands.bias.is_some())));
            bindings.extend(self.operands.bias.map(|bias| (5, read(bias, 0))));
        }
        if let Some(beside) = beside {
            bindings.extend([(6, read(beside.codes, 0)), (7, read(beside.scales, 0))]);
        }
        bindings.extend(normed.map(|normed| (8, read(normed.weight, 0))));
        Ok(Launch {
            kernel,
            constants,
            threadgroups,
            threads: [threads, 1, 1],
            bindings,
            work: self.work(extras),
        })
    }

    fn work(&self, extras: Extras<'_>) -> Work {
        let (HeadRows { heads, len, .. }, (n, k)) = (self.rows, self.weight.shape());
        let (from, to) = match self.direction {
            Direction::Rows => (k, len),
            Direction::Columns => (len, k),
        };
        let element = self.dtype.size_in_bytes();
        let of_weight = (self.weight.codes().len() + self.weight.scales().len()) / n;
        let bias = self.operands.bias.map_or(0, |_| len * size_of::<f32>());
        let (second, of_second) = extras.beside.map_or((0, 0), |beside| {
            let weight = beside.weight;
            (weight.shape().0, weight.codes().len() + weight.scales().len())
        });
        let norm = extras.normed.map_or(0, |_| k * size_of::<f32>());
        Work {
            weights: (heads * (len * of_weight + bias) + of_second + norm) as u64,
            read: (self.m * heads * from * element) as u64,
            written: (self.m * (heads * to + second) * element) as u64,
            operations: (2 * self.m * (heads * len + second) * k) as u64,
        }
    }

    /// The constants of `metal/fp4.h` and `metal/rows.h`.
    fn constants(&self, beside: Option<Beside<'_>>) -> Vec<(u16, Constant)> {
        let length = match self.direction {
            Direction::Rows => self.weight.shape().1,
            Direction::Columns => self.rows.len,
        };
        Stored {
            kind: self.weight.scale_kind(),
            group: self.weight.group(),
            factor: factor_constant(self.weight.factor()),
        }
        .constants(self.wide(beside), length)
    }

    /// Whether loads of 16 bytes of codes and of activations are aligned. (Buffers begin at pages.)
    fn wide(&self, beside: Option<Beside<'_>>) -> bool {
        let size = self.dtype.size_in_bytes();
        wide(self.weight)
            && beside.is_none_or(|beside| wide(beside.weight))
            && self.x_offset.is_multiple_of(16)
            && (self.x_row * size).is_multiple_of(16)
            && (self.x_head * size).is_multiple_of(16)
    }
}

/// How the rows of a weight are shared out among simdgroups, for few rows of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shares {
    /// Two rows a simdgroup.
    thin: bool,
    /// Rows a simdgroup has.
    rows: usize,
    /// Simdgroups that have the same rows, and each a part of K: those of a threadgroup, unless it is one.
    sharing: usize,
}

impl Shares {
    fn of(m: usize, k: usize, all_rows: usize) -> Self {
        // The lanes of a simdgroup take 16 codes each in a turn.
        let turns = k.div_ceil(16 * 32);
        let thin = m == 1 && all_rows <= THIN_UP_TO;
        Self {
            thin,
            rows: if thin || m > 4 { 2 } else { 4 },
            sharing: match turns {
                0..=1 => 1,
                _ if all_rows >= SHARED_BELOW => 1,
                2 => 2,
                _ => 4,
            },
        }
    }

    fn simdgroups(self) -> usize {
        if self.sharing == 1 { 4 } else { self.sharing }
    }

    fn of_threadgroup(self) -> usize {
        if self.sharing == 1 {
            4 * self.rows
        } else {
            self.rows
        }
    }
}

/// What every scale is multiplied or divided by.
pub(super) fn factor_of(weight: &Fp4Tensor) -> f32 {
    match weight.factor() {
        Factor::None => 1.0,
        Factor::Mul(factor) | Factor::Div(factor) => factor,
    }
}

/// Refuses codes and scales that kernels cannot load.
pub(super) fn loadable(weight: &Fp4Tensor) -> Result<()> {
    aligned(OP, "codes", weight.codes().offset(), 4)?;
    aligned(OP, "scales", weight.scales().offset(), weight.scale_kind().size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_out_by_how_many_there_are() {
        let shares = |m, k, rows| {
            let shares = Shares::of(m, k, rows);
            (shares.rows, shares.sharing)
        };
        // GLM-4.7-Flash's q_a with kv_a, q_b, o, a half of kv_b, lm_head.
        assert_eq!(shares(1, 2048, 1344), (2, 4));
        assert_eq!(shares(1, 768, 5120), (4, 2));
        assert_eq!(shares(1, 5120, 2048), (4, 4));
        assert_eq!(shares(1, 512, 5120), (4, 1));
        assert_eq!(shares(1, 2048, 154_880), (4, 1));
        assert_eq!(shares(8, 2048, 154_880), (2, 1));
    }
}
