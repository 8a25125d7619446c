//! Plans of norms, rotary position embedding and sums: `metal/norm_rope.metal`.

use super::args::{AddArgs, Argument, LatentArgs, NormArgs, RopeArgs};
use super::checked::{narrow, suffix};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use crate::Result;
use crate::cpu::Pairing;
use candle_core::DType;

const NORM: &str = "mmfp4-rms-norm";
const ROPE: &str = "mmfp4-rope";
const LATENT: &str = "mmfp4-latent-rows";
const ADD: &str = "mmfp4-add";

/// Elements that a thread takes at a time.
const STEP: usize = 4;
/// Threads that share a row, at most.
const THREADS: usize = 512;
/// Threads that each turn a pair.
const PAIRS: usize = 128;

/// Where rows lie, a stride apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Index into the operands.
    pub operand: usize,
    /// Bytes before the first row.
    pub offset: usize,
    /// Elements from one row to the next.
    pub row: usize,
}

impl Rows {
    pub(super) fn read(self) -> Binding {
        Binding::Read {
            operand: self.operand,
            offset: self.offset,
        }
    }

    /// Whether every row begins where four elements can be loaded at once. (Buffers begin at pages.)
    fn wide(self, dtype: DType) -> bool {
        self.offset.is_multiple_of(STEP * dtype.size_in_bytes()) && self.row.is_multiple_of(STEP)
    }
}

/// Where heads lie, a stride apart, of tokens that lie a stride apart.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Index into the operands.
    pub operand: usize,
    /// Bytes before the first head.
    pub offset: usize,
    /// Heads of a token.
    pub count: usize,
    /// Elements from one token to the next.
    pub token: usize,
    /// Elements from one head to the next.
    pub head: usize,
}

impl Heads {
    pub(super) fn read(self) -> Binding {
        Binding::Read {
            operand: self.operand,
            offset: self.offset,
        }
    }
}

/// Cosines and sines in F32, a row a token and a column a pair.
#[derive(Debug, Clone, Copy)]
pub struct Angles {
    /// Which elements are pairs.
    pub pairing: Pairing,
    /// Pairs of a head.
    pub pairs: usize,
    /// Cosines.
    pub cos: Rows,
    /// Sines.
    pub sin: Rows,
}

impl Angles {
    pub(super) fn interleaved(self) -> (u16, Constant) {
        (17, Constant::Bool(self.pairing == Pairing::Interleaved))
    }

    pub(super) fn bytes(self, tokens: usize) -> usize {
        2 * tokens * self.pairs * size_of::<f32>()
    }
}

/// `norm(x)`, or with [`added`](Self::added) the sum and its norm.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// F32, F16 or BF16, of x and outputs.
    pub dtype: DType,
    /// How many rows.
    pub rows: usize,
    /// Elements of a row.
    pub d: usize,
    /// What is added to the mean of the squares.
    pub eps: f32,
    /// The rows.
    pub x: Rows,
    /// What is added to them, and where the sums go.
    pub added: Option<(Rows, usize)>,
    /// The weight in F32, at a multiple of 16 bytes.
    pub weight: usize,
    /// The output, its rows together.
    pub y: usize,
}

/// Pairs turned by their angles.
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    /// F32, F16 or BF16, of x and output.
    pub dtype: DType,
    /// How many tokens.
    pub tokens: usize,
    /// What is turned.
    pub x: Heads,
    /// By how much.
    pub angles: Angles,
    /// The output, its heads together.
    pub y: usize,
}

/// What MLA keeps of each token, and with [`queries`](Self::queries) those turned in the same dispatch.
#[derive(Debug, Clone, Copy)]
pub struct LatentRows {
    /// F32, F16 or BF16, of inputs and outputs.
    pub dtype: DType,
    /// How many tokens.
    pub tokens: usize,
    /// Elements that are normalised.
    pub latent: usize,
    /// What is added to the mean of their squares.
    pub eps: f32,
    /// Latents and, behind each, its rotary key.
    pub kv: Rows,
    /// The norm's weight in F32, at a multiple of 16 bytes.
    pub weight: usize,
    /// Of keys and queries.
    pub angles: Angles,
    /// The output, its rows together.
    pub rows: usize,
    /// Queries' rotary parts, and where they go, heads together.
    pub queries: Option<(Heads, usize)>,
}

/// A sum of rows.
#[derive(Debug, Clone, Copy)]
pub struct Add {
    /// F32, F16 or BF16, of both and the output.
    pub dtype: DType,
    /// How many rows.
    pub rows: usize,
    /// Elements of a row.
    pub d: usize,
    /// The ones.
    pub a: Rows,
    /// The others.
    pub b: Rows,
    /// The output, its rows together.
    pub y: usize,
}

/// Plans that between them launch every kernel: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has.
pub fn every_kernel(dtype: DType, pairing: Pairing) -> Result<Vec<Plan>> {
    let at = |operand| Rows {
        operand,
        offset: 0,
        row: 8,
    };
    let heads = |operand| Heads {
        operand,
        offset: 0,
        count: 1,
        token: 4,
        head: 4,
    };
    let angles = |cos, sin| Angles {
        pairing,
        pairs: 2,
        cos: at(cos),
        sin: at(sin),
    };
    let norm = RmsNorm {
        dtype,
        rows: 1,
        d: 8,
        eps: 1e-6,
        x: at(1),
        added: None,
        weight: 0,
        y: 2,
    };
    let latent = LatentRows {
        dtype,
        tokens: 1,
        latent: 4,
        eps: 1e-6,
        kv: at(1),
        weight: 0,
        angles: angles(2, 3),
        rows: 4,
        queries: None,
    };
    let launches = [
        norm.launch()?,
        RmsNorm {
            added: Some((at(2), 3)),
            y: 4,
            ..norm
        }
        .launch()?,
        Rope {
            dtype,
            tokens: 1,
            x: heads(0),
            angles: angles(1, 2),
            y: 3,
        }
        .launch()?,
        latent.launch()?,
        LatentRows {
            rows: 5,
            queries: Some((heads(4), 6)),
            ..latent
        }
        .launch()?,
        Add {
            dtype,
            rows: 1,
            d: 8,
            a: at(0),
            b: at(1),
            y: 2,
        }
        .launch()?,
    ];
    let plan = |launch| Plan {
        launches: vec![launch],
    };
    Ok(launches.map(plan).into())
}

pub(super) const fn write(operand: usize) -> Binding {
    Binding::Write { operand, offset: 0 }
}

pub(super) const fn read(operand: usize) -> Binding {
    Binding::Read { operand, offset: 0 }
}

/// Threads that share a row of `d` elements.
fn threads(d: usize) -> usize {
    d.div_ceil(STEP).next_multiple_of(32).min(THREADS)
}

impl RmsNorm {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, and for sizes beyond 32 bits.
    pub fn launch(&self) -> Result<Launch> {
        let kind = suffix(NORM, self.dtype)?;
        let (delta, sum) = self.added.unzip();
        let args = NormArgs {
            d: narrow(NORM, "weight", self.d)?,
            x_row: narrow(NORM, "x", self.x.row)?,
            delta_row: narrow(NORM, "delta", delta.map_or(0, |delta| delta.row))?,
            eps: self.eps,
        };
        let operands = [
            Some(self.x.read()),
            delta.map(Rows::read),
            Some(read(self.weight)),
            sum.map(write),
            Some(write(self.y)),
            Some(Binding::Bytes(args.bytes())),
        ];
        let name = if self.added.is_some() {
            "add_rms_norm"
        } else {
            "rms_norm"
        };
        let wide = self.d.is_multiple_of(STEP)
            && self.x.wide(self.dtype)
            && delta.is_none_or(|delta| delta.wide(self.dtype));
        let values = self.rows * self.d * self.dtype.size_in_bytes();
        let each = if self.added.is_some() { 2 } else { 1 };
        Ok(Launch {
            kernel: format!("{name}_{kind}"),
            constants: vec![(16, Constant::Bool(wide))],
            threadgroups: [self.rows, 1, 1],
            threads: [threads(self.d), 1, 1],
            bindings: operands.into_iter().flatten().enumerate().collect(),
            work: Work {
                weights: (self.d * size_of::<f32>()) as u64,
                read: (each * values) as u64,
                written: (each * values) as u64,
                operations: 0,
            },
        })
    }
}

impl Rope {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, and for sizes beyond 32 bits.
    pub fn launch(&self) -> Result<Launch> {
        let (kind, angles) = (suffix(ROPE, self.dtype)?, self.angles);
        let pairs = self.x.count * angles.pairs;
        // A place among a token's pairs, of threads without one too.
        narrow(ROPE, "x", pairs + PAIRS)?;
        let args = RopeArgs {
            heads: narrow(ROPE, "x", self.x.count)?,
            pairs: narrow(ROPE, "x", angles.pairs)?,
            x_token: narrow(ROPE, "x", self.x.token)?,
            x_head: narrow(ROPE, "x", self.x.head)?,
            cos_row: narrow(ROPE, "cos", angles.cos.row)?,
            sin_row: narrow(ROPE, "sin", angles.sin.row)?,
        };
        let operands = [
            self.x.read(),
            angles.cos.read(),
            angles.sin.read(),
            write(self.y),
            Binding::Bytes(args.bytes()),
        ];
        let values = 2 * self.tokens * pairs * self.dtype.size_in_bytes();
        Ok(Launch {
            kernel: format!("rope_{kind}"),
            constants: vec![angles.interleaved()],
            threadgroups: [pairs.div_ceil(PAIRS), self.tokens, 1],
            threads: [PAIRS, 1, 1],
            bindings: operands.into_iter().enumerate().collect(),
            work: Work {
                weights: 0,
                read: (values + angles.bytes(self.tokens)) as u64,
                written: values as u64,
                operations: 0,
            },
        })
    }
}

impl LatentRows {
    /// Pairs of all heads of a token's queries.
    pub(super) fn query_pairs(&self) -> usize {
        self.queries
            .map_or(0, |(queries, _)| queries.count * self.angles.pairs)
    }

    /// What its kernels are told, threadgroups having so many threads.
    pub(super) fn args(&self, op: &'static str, threads: usize) -> Result<LatentArgs> {
        narrow(op, "queries", self.query_pairs() + threads)?;
        let queries = self.queries.as_ref().map(|(queries, _)| queries);
        let of_queries = |value: fn(&Heads) -> usize| narrow(op, "queries", queries.map_or(0, value));
        narrow(op, "kv", self.width())?;
        Ok(LatentArgs {
            latent: narrow(op, "kv", self.latent)?,
            pairs: narrow(op, "cos", self.angles.pairs)?,
            kv_row: narrow(op, "kv", self.kv.row)?,
            cos_row: narrow(op, "cos", self.angles.cos.row)?,
            sin_row: narrow(op, "sin", self.angles.sin.row)?,
            heads: of_queries(|queries| queries.count)?,
            q_token: of_queries(|queries| queries.token)?,
            q_head: of_queries(|queries| queries.head)?,
            eps: self.eps,
        })
    }

    /// Whether latents can be loaded by fours.
    pub(super) fn wide(&self) -> bool {
        self.latent.is_multiple_of(STEP) && self.kv.wide(self.dtype)
    }

    /// Elements of a token.
    pub(super) fn width(&self) -> usize {
        self.latent + 2 * self.angles.pairs
    }

    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, and for sizes beyond 32 bits.
    pub fn launch(&self) -> Result<Launch> {
        let (kind, angles) = (suffix(LATENT, self.dtype)?, self.angles);
        let (queries, turned) = self.queries.unzip();
        let threads = threads(self.latent);
        let args = self.args(LATENT, threads)?;
        let operands = [
            Some(self.kv.read()),
            Some(read(self.weight)),
            Some(angles.cos.read()),
            Some(angles.sin.read()),
            Some(write(self.rows)),
            Some(Binding::Bytes(args.bytes())),
            queries.map(Heads::read),
            turned.map(write),
        ];
        // Rows of the output are as long as those of kv are taken.
        let wide = self.width().is_multiple_of(STEP) && self.wide();
        let query_pairs = self.query_pairs();
        let values = self.tokens * (self.width() + 2 * query_pairs) * self.dtype.size_in_bytes();
        Ok(Launch {
            kernel: format!("latent_rows_{kind}"),
            constants: vec![
                (16, Constant::Bool(wide)),
                angles.interleaved(),
                (18, Constant::Bool(queries.is_some())),
            ],
            threadgroups: [1 + query_pairs.div_ceil(threads), self.tokens, 1],
            threads: [threads, 1, 1],
            bindings: operands.into_iter().flatten().enumerate().collect(),
            work: Work {
                weights: (self.latent * size_of::<f32>()) as u64,
                read: (values + angles.bytes(self.tokens)) as u64,
                written: values as u64,
                operations: 0,
            },
        })
    }
}

impl Add {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, and for sizes beyond 32 bits.
    pub fn launch(&self) -> Result<Launch> {
        let kind = suffix(ADD, self.dtype)?;
        let threads = threads(self.d);
        // A place in the row, of threads beyond its end too.
        narrow(ADD, "a", self.d.next_multiple_of(threads * STEP))?;
        let args = AddArgs {
            d: narrow(ADD, "a", self.d)?,
            x_row: narrow(ADD, "a", self.a.row)?,
            delta_row: narrow(ADD, "b", self.b.row)?,
        };
        let operands = [
            self.a.read(),
            self.b.read(),
            write(self.y),
            Binding::Bytes(args.bytes()),
        ];
        let wide = self.d.is_multiple_of(STEP) && self.a.wide(self.dtype) && self.b.wide(self.dtype);
        let values = self.rows * self.d * self.dtype.size_in_bytes();
        Ok(Launch {
            kernel: format!("add_{kind}"),
            constants: vec![(16, Constant::Bool(wide))],
            threadgroups: [self.d.div_ceil(threads * STEP), self.rows, 1],
            threads: [threads, 1, 1],
            bindings: operands.into_iter().enumerate().collect(),
            work: Work {
                weights: 0,
                read: 2 * values as u64,
                written: values as u64,
                operations: 0,
            },
        })
    }
}
