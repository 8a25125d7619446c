//! Plans of products with weights in floating point: `metal/dense.metal`.

use super::activations::{narrow, suffix};
use super::args::DenseArgs;
use super::linear::Direction;
use super::plan::{Binding, Constant, Launch, Plan, Work};
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
const COLUMNS: usize = 128;

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

/// Plans that between them launch every kernel on weights of a kind: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has; [`Error::Io`] without memory.
pub fn every_kernel(kind: FloatKind, dtype: DType) -> Result<Vec<Plan>> {
    let (n, k) = (8, 8);
    let zeros = Bytes::copy_from(&vec![0; n * k * kind.size()])?;
    let weight = DenseTensor::new("w", (n, k), kind, zeros)?;
    let mut plans = Vec::new();
    for direction in [Direction::Rows, Direction::Columns] {
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
                x_row: k,
                x_head: 0,
                y_offset: 0,
                y_row: n,
                y_head: 0,
            };
            plans.push(Plan {
                launches: vec![product.launch()?],
            });
        }
    }
    Ok(plans)
}

impl Product<'_> {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has, for sizes beyond 32 bits, and for a weight that is not aligned
    /// to its elements.
    pub fn launch(&self) -> Result<Launch> {
        let kind = suffix(OP, self.dtype)?;
        let (element, offset) = (self.weight.kind().size(), self.weight.bytes().offset());
        if !offset.is_multiple_of(element) {
            let expected = format!("a multiple of {element} bytes from the start of the file");
            return Err(Error::argument(OP, "weight", expected, offset.to_string()));
        }
        let (_, k) = self.weight.shape();
        let HeadRows {
            heads,
            start,
            len,
            stride,
        } = self.rows;
        let (kernel, threadgroups, threads) = match (self.direction, self.m <= FEW) {
            (Direction::Rows, true) => {
                let rows = self.m.next_power_of_two();
                // Two simdgroups, each with as many rows of the weight as registers hold sums for.
                let of_weight = 2 * if rows == 8 { 2 } else { 4 };
                (
                    format!("dense_rows_{kind}_m{rows}"),
                    [len.div_ceil(of_weight), self.m.div_ceil(rows), heads],
                    64,
                )
            }
            (Direction::Rows, false) => (
                format!("dense_tiles_{kind}"),
                [len.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
            (Direction::Columns, true) => {
                let rows = if self.m == 1 { 1 } else { 4 };
                (
                    format!("dense_columns_{kind}_m{rows}"),
                    [k.div_ceil(COLUMNS), self.m.div_ceil(rows), heads],
                    128,
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
        };
        // A row of the last head.
        narrow(OP, "rows", heads * stride)?;
        let read = |operand, offset| Binding::Read { operand, offset };
        let mut constants = self.constants();
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
        Ok(Launch {
            kernel,
            constants,
            threadgroups,
            threads: [threads, 1, 1],
            bindings,
            work: self.work(),
        })
    }

    fn work(&self) -> Work {
        let (HeadRows { heads, len, .. }, (_, k)) = (self.rows, self.weight.shape());
        let (from, to) = match self.direction {
            Direction::Rows => (k, len),
            Direction::Columns => (len, k),
        };
        let element = self.dtype.size_in_bytes();
        let bias = self.operands.bias.map_or(0, |_| len * size_of::<f32>());
        Work {
            weights: (heads * (len * k * self.weight.kind().size() + bias)) as u64,
            read: (self.m * heads * from * element) as u64,
            written: (self.m * heads * to * element) as u64,
            operations: (2 * self.m * heads * len * k) as u64,
        }
    }

    fn constants(&self) -> Vec<(u16, Constant)> {
        let kind = match self.weight.kind() {
            FloatKind::F32 => 0,
            FloatKind::F16 => 1,
            FloatKind::BF16 => 2,
        };
        vec![(24, Constant::U16(kind)), (25, Constant::U16(self.loads()))]
    }

    /// Bytes that a load of the weight may take: 0, an element. (Buffers begin at pages.)
    fn loads(&self) -> u16 {
        let ((_, k), offset) = (self.weight.shape(), self.weight.bytes().offset());
        // Along the columns of a weight activations are read one by one.
        let four = 4 * self.dtype.size_in_bytes();
        let activations = self.direction == Direction::Columns
            || self.x_offset.is_multiple_of(four)
                && self.x_row.is_multiple_of(4)
                && self.x_head.is_multiple_of(4);
        if !k.is_multiple_of(8) || !activations {
            return 0;
        }
        if offset.is_multiple_of(16) {
            16
        } else if offset.is_multiple_of(8) {
            8
        } else {
            0
        }
    }
}
