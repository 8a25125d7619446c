//! Plans of attention over a paged cache: `metal/paged_latents.metal`, `metal/paged_heads.metal`, `metal/paged_rows.metal`.
//!
//! Positions are cut into splits from position 0 on, as long as a query's own position says, whatever the batch. A query has those
//! of which it sees something, from the first on that its window reaches into; each gives a part of its output, which
//! [`Attention::merge`] (or a product that reads parts) puts together: so a query's output is the same bits beside whatever other
//! queries.

use super::args::{Argument, GatherArgs, MergeArgs, PagedArgs};
use super::cache;
use super::checked::{aligned, narrow, suffix};
use super::norm_rope::Heads;
use super::plan::{Binding, Constant, Launch, Plan, Work};
use crate::kv::{CacheFormat, RowKind, RowLayout};
use crate::{Error, Result};
use candle_core::DType;
use std::ops::Range;

const OP: &str = "mmfp4-paged-attention";
const GATHER: &str = "mmfp4-gather-paged";

/// Positions of a split, or what whole blocks make of it: at least so many.
const SPLIT: usize = 64;
/// Splits of a context, at most, and positions for which there may be one more: what splits leave is written and read again, and
/// is not to be much beside what is read anyway, which is weights and, for each position, a row of the cache.
const MOST_SPLITS: usize = 22;
const FOR_ONE_MORE: usize = 4096;
/// Heads of latents that share a read, at most: twelve simdgroups of two, whose registers a GPU's core has.
const MOST_HEADS: usize = 24;
/// The widest latent, rotary key, and key or value of a head, that kernels take.
const MOST_LATENT: usize = 512;
const MOST_ROTARY: usize = 64;
const MOST_OF_HEAD: usize = 256;
/// Bytes that parts of many queries' outputs take at a time.
const PARTS: usize = 64 << 20;
/// Threads that merge a head's parts, at most.
const MERGING: usize = 256;
/// Vectors that a threadgroup gathers.
const GATHERED: usize = 4;

/// Where an operand that is no tensor of heads begins.
#[derive(Debug, Clone, Copy)]
pub struct At {
    /// Index into the operands.
    pub operand: usize,
    /// Bytes before its first.
    pub offset: usize,
}

impl At {
    fn read(self) -> Binding {
        Binding::Read {
            operand: self.operand,
            offset: self.offset,
        }
    }
}

/// Attention of a batch's new tokens.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Where the numbers of a token lie in the pool.
    pub layout: &'a RowLayout,
    /// F32, F16 or BF16, of queries and outputs.
    pub dtype: DType,
    /// What scores are multiplied by.
    pub scale: f32,
    /// How many positions a query sees, its own included; `None`: all up to its own.
    pub window: Option<usize>,
    /// New tokens of all sequences.
    pub tokens: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Splits that a query sees something of, at most: the largest of [`splits_seen`].
    pub splits: usize,
    /// Tokens in the cache that any query sees.
    pub seen: usize,
    /// Pairs of a query and a token that it sees.
    pub pairs: usize,
    /// The queries, or of MLA their parts that meet latents.
    pub queries: Heads,
    /// Of MLA with rotary keys the parts that meet these.
    pub rotary: Option<Heads>,
    /// Whole blocks.
    pub pool: At,
    /// What [`PagedBatch`](crate::ops::PagedBatch) has for a device.
    pub index: At,
}

/// What a launch writes.
#[derive(Debug, Clone, Copy)]
enum Output {
    /// Outputs themselves, of the one split that there is.
    Whole(usize),
    /// Parts and stats.
    Parts(usize, usize),
}

/// Refuses vectors of a layout that no kernel takes.
///
/// # Errors
/// [`Error::Argument`] says how wide they may be.
pub fn check(layout: &RowLayout) -> Result<()> {
    let taken = match layout.kind() {
        RowKind::Latent { latent, rope } => latent <= MOST_LATENT && rope <= MOST_ROTARY,
        RowKind::Heads {
            key_dim, value_dim, ..
        } => key_dim.max(value_dim) <= MOST_OF_HEAD,
    };
    if taken {
        return Ok(());
    }
    let expected = format!(
        "latents up to {MOST_LATENT}, rotary keys up to {MOST_ROTARY}, keys and values up to {MOST_OF_HEAD}"
    );
    let found = format!("{:?}", layout.kind());
    Err(Error::argument(OP, "layout", expected, found))
}

/// Whether vectors are a multiple of four long, rotary keys aside.
fn by_fours(layout: &RowLayout) -> (u16, Constant) {
    let fours = match layout.kind() {
        RowKind::Latent { latent, .. } => latent.is_multiple_of(4),
        RowKind::Heads {
            key_dim, value_dim, ..
        } => key_dim.is_multiple_of(4) && value_dim.is_multiple_of(4),
    };
    (35, Constant::Bool(fours))
}

/// Positions of a split, at least.
fn least_tokens(layout: &RowLayout) -> usize {
    SPLIT.next_multiple_of(layout.block_tokens())
}

/// Of how many splits a query sees something that sees these positions, its own the last of them.
pub fn splits_seen(layout: &RowLayout, visible: &Range<usize>) -> usize {
    let most = MOST_SPLITS + visible.end / FOR_ONE_MORE;
    let block = layout.block_tokens();
    let tokens = least_tokens(layout).max(visible.end.div_ceil(most * block) * block);
    visible.end.div_ceil(tokens) - visible.start / tokens
}

const fn write(operand: usize) -> Binding {
    Binding::Write { operand, offset: 0 }
}

impl Attention<'_> {
    /// How many tokens have parts at a time.
    pub fn at_once(&self) -> usize {
        (PARTS / self.scratch(1)[0].max(1)).clamp(1, self.tokens.max(1))
    }

    /// Elements of an output of a head.
    pub fn width(&self) -> usize {
        crate::cpu::value_width(self.layout)
    }

    /// Bytes of parts, F32 `[tokens, heads, splits, width]`, and of stats, F32 `[tokens, heads, splits, 2]`, of so many tokens.
    pub fn scratch(&self, tokens: usize) -> [usize; 2] {
        let parts = tokens * self.queries.count * self.splits;
        [
            parts * self.width() * size_of::<f32>(),
            parts * 2 * size_of::<f32>(),
        ]
    }

    /// The launch that writes all tokens' parts and stats: of each split that a query sees something of `Σ 2^(s − m) · v`, and the
    /// largest score `m` in base 2 with `Σ 2^(s − m)`; of others zeros, and the least number with zero.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has, sizes beyond 32 bits, vectors that no kernel takes.
    pub fn parts(&self, parts: usize, stats: usize) -> Result<Launch> {
        self.launch(0..self.tokens, Output::Parts(parts, stats))
    }

    /// The launches that write the outputs `y`, `[tokens, heads, width]` of the dtype, and the sizes of the scratch that is their
    /// operands from `scratch` on. Where queries have several splits, only so many at a time have parts.
    ///
    /// # Errors
    /// As [`parts`](Self::parts).
    pub fn launches(&self, y: usize, scratch: usize) -> Result<(Vec<Launch>, Vec<usize>)> {
        if self.tokens == 0 {
            return Ok((Vec::new(), Vec::new()));
        }
        if self.splits <= 1 {
            let launch = self.launch(0..self.tokens, Output::Whole(y))?;
            return Ok((vec![launch], Vec::new()));
        }
        let at_once = self.at_once();
        let mut launches = Vec::new();
        for first in (0..self.tokens).step_by(at_once) {
            let tokens = first..(first + at_once).min(self.tokens);
            launches.push(self.launch(tokens.clone(), Output::Parts(scratch, scratch + 1))?);
            launches.push(self.merge(tokens, [scratch, scratch + 1], y)?);
        }
        Ok((launches, self.scratch(at_once).to_vec()))
    }

    /// The launch that merges the parts and stats of some tokens, whose outputs lie in `y` behind those of the tokens before.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has and sizes beyond 32 bits.
    pub fn merge(&self, tokens: Range<usize>, [parts, stats]: [usize; 2], y: usize) -> Result<Launch> {
        let (rows, width) = (tokens.len() * self.queries.count, self.width());
        let args = MergeArgs {
            splits: narrow(OP, "tables", self.splits)?,
            width: narrow(OP, "layout", width)?,
        };
        let size = width * self.dtype.size_in_bytes();
        let read = |operand| Binding::Read { operand, offset: 0 };
        let to = Binding::Write {
            operand: y,
            offset: tokens.start * self.queries.count * size,
        };
        let [of_parts, of_stats] = self.scratch(tokens.len());
        Ok(Launch {
            kernel: format!("merge_parts_{}", suffix(OP, self.dtype)?),
            constants: Vec::new(),
            threadgroups: [rows, 1, 1],
            threads: [width.next_multiple_of(32).min(MERGING), 1, 1],
            bindings: vec![
                (0, read(parts)),
                (1, read(stats)),
                (2, to),
                (3, Binding::Bytes(args.bytes())),
            ],
            work: Work {
                weights: 0,
                read: (of_parts + of_stats) as u64,
                written: (rows * size) as u64,
                operations: 0,
            },
        })
    }

    /// The launch of some tokens.
    fn launch(&self, tokens: Range<usize>, output: Output) -> Result<Launch> {
        let dtype = suffix(OP, self.dtype)?;
        check(self.layout)?;
        aligned(OP, "pool", self.pool.offset, 16)?;
        let splits = self.splits.max(1);
        // Positions of splits that a query does not have are counted too, in 32 bits: one has as many as it takes to have one more,
        // and what whole blocks make of it, or the least.
        let least = least_tokens(self.layout);
        let longest_split = least.max(FOR_ONE_MORE + self.layout.block_tokens());
        narrow(OP, "tables", self.longest + splits * longest_split)?;
        narrow(OP, "queries", tokens.end)?;
        let (kernel, threads, groups, together) = match self.layout.kind() {
            RowKind::Latent { latent, .. } => {
                let groups = self.queries.count.div_ceil(MOST_HEADS);
                let together = self.queries.count.div_ceil(groups);
                let width = if latent <= 128 { 128 } else { MOST_LATENT };
                let kernel = format!("paged_latents_{dtype}_w{width}");
                (kernel, 32 * together.div_ceil(2), groups, together)
            }
            RowKind::Heads {
                kv_heads,
                key_dim,
                value_dim,
            } => {
                let together = self.queries.count / kv_heads;
                let fours = if key_dim.max(value_dim) <= 128 { 1 } else { 2 };
                let rows = match together {
                    1 => 1,
                    5.. if fours == 1 => 8,
                    _ => 4,
                };
                let simdgroups = if fours * rows > 4 { 4 } else { 8 };
                let kernel = format!("paged_heads_{dtype}_w{}_r{rows}", 128 * fours);
                (
                    kernel,
                    32 * simdgroups,
                    kv_heads * together.div_ceil(rows),
                    together,
                )
            }
        };
        let [keys, values] = cache::parts(OP, self.layout)?;
        let args = PagedArgs {
            keys,
            values,
            tokens: narrow(OP, "queries", self.tokens)?,
            first: narrow(OP, "queries", tokens.start)?,
            heads: narrow(OP, "queries", self.queries.count)?,
            together: narrow(OP, "queries", together)?,
            splits: narrow(OP, "tables", splits)?,
            split_tokens: narrow(OP, "tables", least)?,
            window: self
                .window
                .map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
            q_token: narrow(OP, "queries", self.queries.token)?,
            q_head: narrow(OP, "queries", self.queries.head)?,
            rotary_token: narrow(OP, "queries", self.rotary.map_or(0, |rotary| rotary.token))?,
            rotary_head: narrow(OP, "queries", self.rotary.map_or(0, |rotary| rotary.head))?,
            score_factor: self.scale * std::f32::consts::LOG2_E,
        };
        let is_latent = matches!(self.layout.kind(), RowKind::Latent { .. });
        // Buffers in the kernels' order; of heads there is none for rotary parts.
        let mut buffers = vec![Some(heads(self.queries))];
        if is_latent {
            buffers.push(self.rotary.map(heads));
        }
        buffers.extend([Some(self.pool.read()), Some(self.index.read())]);
        let written = match output {
            Output::Whole(y) => {
                buffers.extend([Some(write(y)), None, None]);
                tokens.len() * self.queries.count * self.width() * self.dtype.size_in_bytes()
            }
            Output::Parts(parts, stats) => {
                buffers.extend([None, Some(write(parts)), Some(write(stats))]);
                self.scratch(tokens.len()).iter().sum()
            }
        };
        buffers.push(Some(Binding::Bytes(args.bytes())));
        let bindings = buffers.into_iter().enumerate();
        let whole = matches!(output, Output::Whole(_));
        let mut constants = cache::constants(self.layout).to_vec();
        constants.extend([
            by_fours(self.layout),
            (36, Constant::Bool(whole)),
            (37, Constant::Bool(!whole)),
        ]);
        if is_latent {
            constants.push((38, Constant::Bool(self.rotary.is_some())));
        }
        let key = crate::cpu::key_width(self.layout);
        let of_queries = tokens.len() * self.queries.count * key * self.dtype.size_in_bytes();
        let of_index = 2 * tokens.len() + self.seen.div_ceil(self.layout.block_tokens());
        Ok(Launch {
            kernel,
            constants,
            threadgroups: [splits, tokens.len(), groups],
            threads: [threads, 1, 1],
            bindings: bindings
                .filter_map(|(index, binding)| binding.map(|binding| (index, binding)))
                .collect(),
            work: Work {
                weights: 0,
                read: (self.seen * self.layout.row_bytes() + of_queries + of_index * size_of::<u32>()) as u64,
                written: written as u64,
                operations: (2 * self.pairs * self.queries.count * (key + self.width())) as u64,
            },
        })
    }
}

fn heads(heads: Heads) -> Binding {
    Binding::Read {
        operand: heads.operand,
        offset: heads.offset,
    }
}

/// Tokens of a sequence as numbers.
#[derive(Debug, Clone)]
pub struct Gather<'a> {
    /// Where the numbers of a token lie in the pool.
    pub layout: &'a RowLayout,
    /// Of the numbers: F32, F16 or BF16.
    pub dtype: DType,
    /// Which tokens.
    pub positions: Range<usize>,
    /// Where in the index the sequence's table begins.
    pub table: usize,
    /// Whole blocks.
    pub pool: At,
    /// What [`PagedBatch`](crate::ops::PagedBatch) has for a device.
    pub index: At,
    /// The output, `[positions, layout.width()]`.
    pub y: usize,
}

impl Gather<'_> {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype that no kernel has and sizes beyond 32 bits.
    pub fn launch(&self) -> Result<Launch> {
        aligned(GATHER, "pool", self.pool.offset, 16)?;
        let (heads, is_latent) = match self.layout.kind() {
            RowKind::Latent { .. } => (1, true),
            RowKind::Heads { kv_heads, .. } => (kv_heads, false),
        };
        let (count, width) = (self.positions.len(), self.layout.width());
        narrow(GATHER, "layout", width)?;
        let [keys, values] = cache::parts(GATHER, self.layout)?;
        let args = GatherArgs {
            keys,
            values,
            heads: narrow(GATHER, "layout", heads)?,
            table: narrow(GATHER, "table", self.table)?,
            first: narrow(GATHER, "positions", self.positions.start)?,
            positions: narrow(GATHER, "positions", count)?,
        };
        narrow(GATHER, "positions", self.positions.end)?;
        let mut constants = cache::constants(self.layout).to_vec();
        constants.extend([by_fours(self.layout), (38, Constant::Bool(is_latent))]);
        let of_index = count.div_ceil(self.layout.block_tokens()) * size_of::<u32>();
        Ok(Launch {
            kernel: format!("gather_paged_{}", suffix(GATHER, self.dtype)?),
            constants,
            threadgroups: [(count * self.layout.parts().len()).div_ceil(GATHERED), 1, 1],
            threads: [32 * GATHERED, 1, 1],
            bindings: vec![
                (0, self.pool.read()),
                (1, self.index.read()),
                (2, write(self.y)),
                (3, Binding::Bytes(args.bytes())),
            ],
            work: Work {
                weights: 0,
                read: (count * self.layout.row_bytes() + of_index) as u64,
                written: (count * width * self.dtype.size_in_bytes()) as u64,
                operations: 0,
            },
        })
    }
}

/// Plans that between them launch every kernel: what can be compiled ahead of the first token, for caches in BF16.
///
/// # Errors
/// [`Error::Argument`] for a dtype that no kernel has.
pub fn every_kernel(dtype: DType) -> Result<Vec<Plan>> {
    let format = CacheFormat::BF16;
    let mut plans = Vec::new();
    let mut add = |layout: RowLayout, count: usize| -> Result<()> {
        let key = crate::cpu::key_width(&layout);
        let is_latent = matches!(layout.kind(), RowKind::Latent { .. });
        let queries = |operand| Heads {
            operand,
            offset: 0,
            count,
            token: count * key,
            head: key,
        };
        let at = |operand| At { operand, offset: 0 };
        let attention = |longest| Attention {
            layout: &layout,
            dtype,
            scale: 1.0,
            window: None,
            tokens: 1,
            longest,
            splits: splits_seen(&layout, &(0..longest)),
            seen: longest,
            pairs: longest,
            queries: queries(0),
            rotary: is_latent.then(|| queries(1)),
            pool: at(2),
            index: at(3),
        };
        for longest in [SPLIT, SPLIT + 1] {
            let (launches, _) = attention(longest).launches(4, 5)?;
            plans.push(Plan { launches });
        }
        let gather = Gather {
            layout: &layout,
            dtype,
            positions: 0..1,
            table: 0,
            pool: at(0),
            index: at(1),
            y: 2,
        };
        plans.push(Plan {
            launches: vec![gather.launch()?],
        });
        Ok(())
    };
    for (latent, rope) in [(128, 32), (MOST_LATENT, MOST_ROTARY)] {
        add(RowLayout::latent(format, latent, rope)?, 2)?;
    }
    for (width, counts) in [(128, &[1, 4, 8][..]), (MOST_OF_HEAD, &[1, 4])] {
        for count in counts {
            add(RowLayout::heads(format, 1, width, width)?, *count)?;
        }
    }
    Ok(plans)
}
