//! Plans of products with weights in floating point: `metal/dense.metal`.

use super::args::{Argument, DenseArgs};
use super::checked::{aligned, narrow, suffix};
use super::linear::Direction;
use super::plan::{Binding, Constant, Launch, Plan, Work};
use super::rows::known;
use crate::cpu::HeadRows;
use crate::fp4::{Bytes, DenseTensor, FloatKind};
use crate::{Error, Result};
use candle_core::DType;

const OP: &str = "mmfp4-linear";

/// Rows of activations up to which a product goes along the rows of the weight.
const FEW: usize = 8;
/// Rows and columns of a tile of outputs.
const TILE: usize = 32;
/// Columns of a weight that a threadgroup takes.
const COLUMNS: usize = 32;
/// Rows of weights (those of all heads) up to which a simdgroup has two rows instead of four, for one row of activations.
const THIN_UP_TO: usize = 1536;
/// Simdgroups from which on each has rows of its own: with fewer, too little of a weight is on its way at once.
const ENOUGH: usize = 4096;
/// Simdgroups that share rows, at most.
const SHARING: usize = 8;

/// Where the operands of a product stand among a plan's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// The weight.
    pub weight: usize,
    /// Biases in F32, where there are any.
    pub bias: Option<usize>,
    /// Activations.
    pub x: usize,
    /// The output.
    pub y: usize,
}

/// A product with a weight in floating point.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The weight.
    pub weight: &'a DenseTensor,
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
    pub weight: &'a DenseTensor,
    /// Its operand.
    pub operand: usize,
}

/// Plans that between them launch every kernel on weights of a kind: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has; [`Error::Io`] without memory.
pub fn every_kernel(kind: FloatKind, dtype: DType) -> Result<Vec<Plan>> {
    let k = 8;
    let mut plans = Vec::new();
    // A weight for every way to share out its rows.
    for n in [8, THIN_UP_TO + 8] {
        let zeros = Bytes::copy_from(&vec![0; n * k * kind.size()])?;
        let weight = DenseTensor::new("w", (n, k), kind, zeros)?;
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
                        weight: 0,
                        bias: None,
                        x: 1,
                        y: 2,
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
                let beside = Beside {
                    weight: &weight,
                    operand: 3,
                };
                for beside in [None, Some(beside)] {
                    if beside.is_none_or(|beside| product.takes_beside(beside.weight)) {
                        plans.push(Plan {
                            launches: vec![product.launch_beside(beside)?],
                        });
                    }
                }
            }
        }
    }
    Ok(plans)
}

impl Product<'_> {
    /// Whether the product with another weight can be in the same launch.
    pub fn takes_beside(&self, other: &DenseTensor) -> bool {
        let kind = |weight: &DenseTensor| (weight.shape().1, weight.kind());
        let plain = self.rows.heads == 1 && self.operands.bias.is_none();
        self.direction == Direction::Rows && self.m <= FEW && plain && kind(self.weight) == kind(other)
    }

    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has, for sizes beyond 32 bits, and for a weight that is not aligned
    /// to its elements.
    pub fn launch(&self) -> Result<Launch> {
        self.launch_beside(None)
    }

    /// Its launch, with the product of a second weight in it.
    ///
    /// # Errors
    /// As [`launch`](Self::launch); and [`Error::Argument`] for a second weight that does not fit.
    pub fn launch_beside(&self, beside: Option<Beside<'_>>) -> Result<Launch> {
        let kind = suffix(OP, self.dtype)?;
        if beside.is_some_and(|beside| !self.takes_beside(beside.weight)) {
            let expected = "one of the same K and kind, no bias, and few rows of activations";
            return Err(Error::argument(OP, "second weight", expected, "another"));
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
        let second = beside.map_or(0, |beside| beside.weight.shape().0);
        let mut constants = self.constants(beside);
        let (kernel, threadgroups, threads) = match (self.direction, self.m <= FEW) {
            (Direction::Rows, true) => {
                let shape = Shares::of(self.m, k, heads * (len + second));
                let blocks = |rows: usize| rows.div_ceil(shape.of_threadgroup());
                constants.extend([
                    (11, known(k)),
                    (27, Constant::U16(shape.sharing as u16)),
                    (28, Constant::Bool(beside.is_some())),
                ]);
                let rows = self.m.next_power_of_two();
                let of_x = if shape.thin {
                    "thin".to_string()
                } else {
                    format!("m{rows}")
                };
                (
                    format!("dense_rows_{kind}_{of_x}"),
                    [blocks(len) + blocks(second), self.m.div_ceil(rows), heads],
                    32 * shape.simdgroups(),
                )
            }
            (Direction::Rows, false) => (
                format!("dense_tiles_{kind}"),
                [len.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
            (Direction::Columns, true) => {
                let rows = if self.m == 1 { 1 } else { 4 };
                // What the sum runs over.
                constants.push((11, known(len)));
                (
                    format!("dense_columns_{kind}_m{rows}"),
                    [k.div_ceil(COLUMNS), self.m.div_ceil(rows), heads],
                    256,
                )
            }
            (Direction::Columns, false) => (
                format!("dense_columns_tiles_{kind}"),
                [k.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
        };
        let args = DenseArgs {
            m: narrow(OP, "x", self.m)?,
            n: narrow(OP, "weight", len)?,
            k: narrow(OP, "weight", k)?,
            x_row: narrow(OP, "x", self.x_row)?,
            x_head: narrow(OP, "x", self.x_head)?,
            y_row: narrow(OP, "y", self.y_row)?,
            y_head: narrow(OP, "y", self.y_head)?,
            weight_row: narrow(OP, "rows", start)?,
            weight_head: narrow(OP, "rows", stride)?,
            second_n: narrow(OP, "second weight", second)?,
        };
        // A row of the last head.
        narrow(OP, "rows", heads * stride)?;
        let read = |operand, offset| Binding::Read { operand, offset };
        let mut bindings = vec![
            (0, read(self.operands.weight, 0)),
            (1, read(self.operands.x, self.x_offset)),
            (
                2,
                Binding::Write {
                    operand: self.operands.y,
                    offset: self.y_offset,
                },
            ),
            (3, Binding::Bytes(args.bytes())),
        ];
        // The kernel of columns for few rows of activations takes no bias; nothing has both.
        if self.direction == Direction::Rows || self.m > FEW {
            constants.push((26, Constant::Bool(self.operands.bias.is_some())));
            bindings.extend(self.operands.bias.map(|bias| (4, read(bias, 0))));
        }
        bindings.extend(beside.map(|beside| (5, read(beside.operand, 0))));
        Ok(Launch {
            kernel,
            constants,
            threadgroups,
            threads: [threads, 1, 1],
            bindings,
            work: self.work(second),
        })
    }

    /// Beside it, a second weight has so many rows.
    fn work(&self, second: usize) -> Work {
        let (HeadRows { heads, len, .. }, (_, k)) = (self.rows, self.weight.shape());
        let (from, to) = match self.direction {
            Direction::Rows => (k, len),
            Direction::Columns => (len, k),
        };
        let element = self.dtype.size_in_bytes();
        let bias = self.operands.bias.map_or(0, |_| len * size_of::<f32>());
        let rows = heads * len + second;
        Work {
            weights: (rows * k * self.weight.kind().size() + heads * bias) as u64,
            read: (self.m * heads * from * element) as u64,
            written: (self.m * (heads * to + second) * element) as u64,
            operations: (2 * self.m * rows * k) as u64,
        }
    }

    fn constants(&self, beside: Option<Beside<'_>>) -> Vec<(u16, Constant)> {
        stored(self.weight, self.loads(beside)).into()
    }

    /// Bytes that a load may take: 0, an element. (Buffers begin at pages.)
    fn loads(&self, beside: Option<Beside<'_>>) -> u16 {
        let size = self.dtype.size_in_bytes();
        // Along the columns of a weight activations are read one by one.
        let activations_at = |bytes: usize| {
            self.direction == Direction::Columns
                || self.x_offset.is_multiple_of(bytes)
                    && (self.x_row * size).is_multiple_of(bytes)
                    && (self.x_head * size).is_multiple_of(bytes)
        };
        let other = beside.map_or(16, |beside| loads(beside.weight));
        match loads(self.weight).min(other) {
            _ if !activations_at(4 * size) => 0,
            16 if !activations_at(16) => 8,
            bytes => bytes,
        }
    }
}

/// The constants of `metal/dense.h`, for loads of so many bytes.
pub(super) fn stored(weight: &DenseTensor, loads: u16) -> [(u16, Constant); 2] {
    let kind = match weight.kind() {
        FloatKind::F32 => 0,
        FloatKind::F16 => 1,
        FloatKind::BF16 => 2,
    };
    [(24, Constant::U16(kind)), (25, Constant::U16(loads))]
}

/// Bytes that a load of a weight may take: 16, 8 or, an element, 0.
pub(super) fn loads(weight: &DenseTensor) -> u16 {
    let starts = |bytes: usize| weight.bytes().offset().is_multiple_of(bytes);
    match weight.shape().1.is_multiple_of(8) {
        true if starts(16) => 16,
        true if starts(8) => 8,
        _ => 0,
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
        let thin = m == 1 && all_rows <= THIN_UP_TO;
        let rows = if thin || m > 4 { 2 } else { 4 };
        let sharing = if all_rows.div_ceil(rows) < ENOUGH {
            // The lanes of a simdgroup take eight elements each in a turn. No more simdgroups than it takes to have as few
            // turns each.
            let turns = k.div_ceil(8 * 32);
            turns.div_ceil(turns.div_ceil(SHARING))
        } else {
            1
        };
        Self { thin, rows, sharing }
    }

    fn simdgroups(self) -> usize {
        if self.sharing == 1 { 2 } else { self.sharing }
    }

    fn of_threadgroup(self) -> usize {
        if self.sharing == 1 {
            self.simdgroups() * self.rows
        } else {
            self.rows
        }
    }
}

/// Refuses a weight that kernels cannot load.
pub(super) fn loadable(weight: &DenseTensor) -> Result<()> {
    aligned(OP, "weight", weight.bytes().offset(), weight.kind().size())
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
        assert_eq!(shares(1, 2048, 1344), (2, 8));
        assert_eq!(shares(1, 768, 5120), (4, 3));
        assert_eq!(shares(1, 5120, 2048), (4, 7));
        assert_eq!(shares(1, 512, 5120), (4, 2));
        assert_eq!(shares(1, 2048, 154_880), (4, 1));
        assert_eq!(shares(8, 2048, 154_880), (2, 1));
        // What a simdgroup has in one turn is not shared.
        assert_eq!(shares(1, 256, 8), (2, 1));
    }
}
