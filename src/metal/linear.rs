//! Plans of products with FP4 weights: `metal/linear.metal`.

use super::args::LinearArgs;
use super::plan::{Binding, Constant, Launch, Plan, Work};
use crate::cpu::HeadRows;
use crate::fp4::{Factor, Format, Fp4Tensor, ScaleKind, ScaleRule, quantize};
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
const FEW: usize = 8;
/// Rows and columns of a tile of outputs.
const TILE: usize = 32;

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

/// Plans that between them launch every kernel on weights of a format: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has; [`Error::Tensor`] for a format that cannot be.
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<Plan>> {
    let (n, k) = (2, format.group * 2);
    let weight = quantize("w", &vec![0.0; n * k], (n, k), format, ScaleRule::Maximum)?;
    let rows = HeadRows {
        heads: 1,
        stride: n,
        start: 0,
        len: n,
    };
    let mut plans = Vec::new();
    for (direction, widths) in [(Direction::Rows, (k, n)), (Direction::Columns, (n, k))] {
        for m in [1, 2, 4, FEW, FEW + 1] {
            let product = Product {
                weight: &weight,
                rows,
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
                // Rows of activations begin at multiples of four in a model.
                x_row: widths.0.next_multiple_of(4),
                x_head: 0,
                y_offset: 0,
                y_row: widths.1,
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
    /// [`Error::Argument`] for a dtype that no kernel has, for sizes beyond 32 bits, and for codes or scales that are not
    /// aligned.
    pub fn launch(&self) -> Result<Launch> {
        let kind = match self.dtype {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            other => {
                let found = format!("{other:?}");
                return Err(Error::argument(OP, "x", "F32, F16 or BF16", found));
            }
        };
        for (argument, bytes, alignment) in [
            ("codes", self.weight.codes(), 4),
            ("scales", self.weight.scales(), self.weight.scale_kind().size()),
        ] {
            if !bytes.offset().is_multiple_of(alignment) {
                let expected = format!("a multiple of {alignment} bytes from the start of the file");
                return Err(Error::argument(
                    OP,
                    argument,
                    expected,
                    bytes.offset().to_string(),
                ));
            }
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
                    format!("linear_rows_{kind}_m{rows}"),
                    [len.div_ceil(of_weight), self.m.div_ceil(rows), heads],
                    64,
                )
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
                    [k.div_ceil(256), self.m.div_ceil(rows), heads],
                    128,
                )
            }
            (Direction::Columns, false) => (
                format!("linear_columns_tiles_{kind}"),
                [k.div_ceil(TILE), self.m.div_ceil(TILE), heads],
                128,
            ),
        };
        let narrow = |argument: &'static str, value: usize| {
            u32::try_from(value)
                .map_err(|_| Error::argument(OP, argument, "a size below 2^32", value.to_string()))
        };
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
            factor: match self.weight.factor() {
                Factor::None => 1.0,
                Factor::Mul(factor) | Factor::Div(factor) => factor,
            },
        };
        let read = |operand, offset| Binding::Read { operand, offset };
        let mut constants = self.constants();
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
        let (HeadRows { heads, len, .. }, (n, k)) = (self.rows, self.weight.shape());
        let (from, to) = match self.direction {
            Direction::Rows => (k, len),
            Direction::Columns => (len, k),
        };
        let element = self.dtype.size_in_bytes();
        let of_weight = (self.weight.codes().len() + self.weight.scales().len()) / n;
        let bias = self.operands.bias.map_or(0, |_| len * size_of::<f32>());
        Work {
            weights: (heads * (len * of_weight + bias)) as u64,
            read: (self.m * heads * from * element) as u64,
            written: (self.m * heads * to * element) as u64,
            operations: (2 * self.m * heads * len * k) as u64,
        }
    }

    /// The constants of `metal/fp4.h`.
    fn constants(&self) -> Vec<(u16, Constant)> {
        let kind = match self.weight.scale_kind() {
            ScaleKind::F16 => 0,
            ScaleKind::BF16 => 1,
            ScaleKind::E8M0 => 2,
            ScaleKind::E4M3 => 3,
        };
        let factor = match self.weight.factor() {
            Factor::None => 0,
            Factor::Mul(_) => 1,
            Factor::Div(_) => 2,
        };
        let group = self.weight.group() as u16;
        vec![
            (0, Constant::U16(kind)),
            (1, Constant::U16(group)),
            (2, Constant::U16(factor)),
            (3, Constant::Bool(self.wide())),
        ]
    }

    /// Whether loads of 16 bytes of codes and of four activations are aligned. (Buffers begin at pages.)
    fn wide(&self) -> bool {
        let (_, k) = self.weight.shape();
        let four = 4 * self.dtype.size_in_bytes();
        self.weight.codes().offset().is_multiple_of(16)
            && k.is_multiple_of(32)
            && self.x_offset.is_multiple_of(four)
            && self.x_row.is_multiple_of(4)
            && self.x_head.is_multiple_of(4)
    }
}
