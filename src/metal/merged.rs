//! Plans of products with what attention's parts come to: `metal/merged.metal`.

use super::args::{Argument, MergedArgs};
use super::checked::{narrow, suffix};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use super::rows::{Stored, factor_constant, known, wide};
use super::{dense, linear};
use crate::cpu::HeadRows;
use crate::fp4::{Bytes, DenseTensor, FloatKind, Format, Fp4Tensor, Weight};
use crate::{Error, Result};
use candle_core::DType;

const OP: &str = "mmfp4-merged-per-head";

/// Tokens up to which parts are merged where they are multiplied. Each threadgroup merges all tokens' rows of its head again:
/// with more of them that costs more than a dispatch of its own does.
const FEW: usize = 8;
/// Columns of a weight, at most: a threadgroup's memory has that much of each token.
const COLUMNS: usize = 512;
/// Simdgroups of a threadgroup.
const SIMDGROUPS: usize = 8;

/// A weight, and where it stands among a plan's operands.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// In FP4.
    Fp4 {
        /// The weight.
        weight: &'a Fp4Tensor,
        /// Operand: its codes.
        codes: usize,
        /// Operand: its scales.
        scales: usize,
    },
    /// In floating point.
    Dense {
        /// The weight.
        weight: &'a DenseTensor,
        /// Its operand.
        operand: usize,
    },
}

impl<'a> Operand<'a> {
    /// A weight whose regions are the operands from `first` on; `None` where it is in integers, which no kernel takes.
    pub fn from(weight: &'a Weight, first: usize) -> Option<Self> {
        match weight {
            Weight::Fp4(weight) => Some(Self::Fp4 {
                weight,
                codes: first,
                scales: first + 1,
            }),
            Weight::Dense(weight) => Some(Self::Dense {
                weight,
                operand: first,
            }),
            Weight::Int8(_) | Weight::Blocks(_) => None,
        }
    }

    fn shape(self) -> (usize, usize) {
        match self {
            Self::Fp4 { weight, .. } => weight.shape(),
            Self::Dense { weight, .. } => weight.shape(),
        }
    }

    /// Bytes of a row.
    fn row_bytes(self) -> usize {
        match self {
            Self::Fp4 { weight, .. } => (weight.codes().len() + weight.scales().len()) / weight.shape().0,
            Self::Dense { weight, .. } => weight.shape().1 * weight.kind().size(),
        }
    }

    /// What every scale is multiplied or divided by.
    fn factor(self) -> f32 {
        match self {
            Self::Fp4 { weight, .. } => linear::factor_of(weight),
            Self::Dense { .. } => 1.0,
        }
    }

    /// How kernels' names tell it.
    fn name(self) -> &'static str {
        match self {
            Self::Fp4 { .. } => "fp4",
            Self::Dense { .. } => "dense",
        }
    }

    /// In the order in which they are bound.
    fn operands(self) -> impl Iterator<Item = usize> {
        let (first, second) = match self {
            Self::Fp4 { codes, scales, .. } => (codes, Some(scales)),
            Self::Dense { operand, .. } => (operand, None),
        };
        std::iter::once(first).chain(second)
    }

    fn constants(self) -> Vec<(u16, Constant)> {
        match self {
            Self::Fp4 { weight, .. } => Stored {
                kind: weight.scale_kind(),
                group: weight.group(),
                factor: factor_constant(weight.factor()),
            }
            .constants(wide(weight), weight.shape().1),
            Self::Dense { weight, .. } => {
                let mut constants = dense::stored(weight, dense::loads(weight)).to_vec();
                constants.push((11, known(weight.shape().1)));
                constants
            }
        }
    }

    /// Refuses what kernels cannot load.
    fn check(self) -> Result<()> {
        match self {
            Self::Fp4 { weight, .. } => {
                linear::loadable(weight)?;
                // Words and scales are counted in 32 bits.
                narrow(OP, "weight", weight.codes().len() / 4)?;
                narrow(OP, "weight", weight.scales().len())?;
            }
            Self::Dense { weight, .. } => dense::loadable(weight)?,
        }
        Ok(())
    }
}

/// A product of each head's rows of a weight `[N, K]` with what parts `[m, heads, splits, K]` come to.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The weight.
    pub weight: Operand<'a>,
    /// The rows of each head.
    pub rows: HeadRows,
    /// Operand: the parts, in F32.
    pub parts: usize,
    /// Operand: of each part its largest score and its sum, `[m, heads, splits, 2]` in F32.
    pub stats: usize,
    /// Operand: the output, `[m, heads, len]`.
    pub y: usize,
    /// F32, F16 or BF16, of the output.
    pub dtype: DType,
    /// Tokens.
    pub m: usize,
    /// Parts of a token's head.
    pub splits: usize,
}

/// Whether one launch does both for so many tokens and such a weight.
pub fn takes(weight: &Weight, m: usize) -> bool {
    !matches!(weight, Weight::Int8(_) | Weight::Blocks(_))
        && weight.shape().1 <= COLUMNS
        && (1..=FEW).contains(&m)
}

/// Plans that between them launch every kernel on weights of a format, or in floating point of any kind: what can be compiled
/// ahead of the first token.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has; [`Error::Tensor`] for a format that cannot be; [`Error::Io`] without
/// memory.
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<Plan>> {
    let (n, k) = (8, format.group.max(8));
    let mut weights = vec![Weight::from(linear::zeros((n, k), format)?)];
    for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
        let zeros = Bytes::copy_from(&vec![0; n * k * kind.size()])?;
        weights.push(DenseTensor::new("w", (n, k), kind, zeros)?.into());
    }
    let mut plans = Vec::new();
    for weight in weights.iter().filter_map(|weight| Operand::from(weight, 0)) {
        for m in [1, 2, 4, FEW] {
            let product = Product {
                weight,
                rows: HeadRows {
                    heads: 1,
                    stride: n,
                    start: 0,
                    len: n,
                },
                parts: 2,
                stats: 3,
                y: 4,
                dtype,
                m,
                splits: 1,
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
    /// [`Error::Argument`] for more tokens or columns than it [takes], a dtype that no kernel has, sizes beyond 32 bits, and
    /// weights that are not aligned.
    pub fn launch(&self) -> Result<Launch> {
        let kind = suffix(OP, self.dtype)?;
        let (_, k) = self.weight.shape();
        let refused = |argument, expected, found: usize| {
            let expected = format!("1 to {expected}");
            Err(Error::argument(OP, argument, expected, found.to_string()))
        };
        if !(1..=FEW).contains(&self.m) {
            return refused("parts", FEW, self.m);
        }
        if k > COLUMNS {
            return refused("weight", COLUMNS, k);
        }
        if self.splits == 0 {
            return refused("splits", u32::MAX as usize, 0);
        }
        let HeadRows {
            heads,
            stride,
            start,
            len,
        } = self.rows;
        self.weight.check()?;
        let narrow = |argument, size| narrow(OP, argument, size);
        // A row of the last head.
        narrow("rows", heads * stride)?;
        let args = MergedArgs {
            m: narrow("parts", self.m)?,
            n: narrow("rows", len)?,
            k: narrow("weight", k)?,
            heads: narrow("rows", heads)?,
            splits: narrow("splits", self.splits)?,
            weight_row: narrow("rows", start)?,
            weight_head: narrow("rows", stride)?,
            factor: self.weight.factor(),
        };
        let (m, rows) = block(self.m);
        let read = |operand| Binding::Read { operand, offset: 0 };
        let mut bindings: Vec<_> = (0..).zip(self.weight.operands().map(read)).collect();
        bindings.extend([
            (2, read(self.parts)),
            (3, read(self.stats)),
            (
                4,
                Binding::Write {
                    operand: self.y,
                    offset: 0,
                },
            ),
            (5, Binding::Bytes(args.bytes())),
        ]);
        Ok(Launch {
            kernel: format!("merged_{}_{kind}_m{m}", self.weight.name()),
            constants: self.weight.constants(),
            threadgroups: [len.div_ceil(rows), self.m.div_ceil(m), heads],
            threads: [32 * SIMDGROUPS, 1, 1],
            bindings,
            work: self.work(),
        })
    }

    fn work(&self) -> Work {
        let (HeadRows { heads, len, .. }, (_, k)) = (self.rows, self.weight.shape());
        let rows = self.m * heads;
        Work {
            weights: (heads * len * self.weight.row_bytes()) as u64,
            // A part, its largest score and its sum.
            read: (rows * self.splits * (k + 2) * size_of::<f32>()) as u64,
            written: (rows * len * self.dtype.size_in_bytes()) as u64,
            operations: (2 * rows * (self.splits + len) * k) as u64,
        }
    }
}

/// Tokens that a threadgroup has, for so many in all, and rows of the weight: with more tokens, which are merged for each
/// threadgroup, more rows.
fn block(m: usize) -> (usize, usize) {
    let m = m.next_power_of_two();
    let of_simdgroup = if m > 2 { 8 } else { 4 };
    (m, SIMDGROUPS * of_simdgroup)
}
