//! Plans of what stores new tokens in a paged cache: `metal/append.metal`.

use super::args::{AppendHeadsArgs, AppendLatentsArgs, Argument};
use super::cache;
use super::checked::{aligned, narrow, suffix};
use super::norm_rope::{Angles, Heads, LatentRows, Rows, read, write};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use crate::Result;
use crate::cpu::Pairing;
use crate::kv::{CacheFormat, RowLayout};
use candle_core::DType;

const LATENTS: &str = "mmfp4-append-latents";
const HEADS: &str = "mmfp4-append-heads";

/// Threads that share a vector, at most.
const THREADS: usize = 512;

/// What kernels have to know of a pool that they write, but for which operand it is.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// How its tokens lie.
    pub layout: &'a RowLayout,
    /// Bytes before its first block, a multiple of 16.
    pub offset: usize,
    /// Index into the operands of tokens' slots, U32.
    pub slots: usize,
}

/// What MLA keeps of each token, into a pool; and queries turned.
#[derive(Debug, Clone, Copy)]
pub struct AppendLatents<'a> {
    /// The tokens; `rows` is the pool.
    pub latents: LatentRows,
    /// A pool of latents of that width.
    pub pool: Pool<'a>,
}

/// Keys and values of heads, into a pool.
#[derive(Debug, Clone, Copy)]
pub struct AppendHeads<'a> {
    /// F32, F16 or BF16, of both.
    pub dtype: DType,
    /// How many tokens.
    pub tokens: usize,
    /// The keys.
    pub keys: Heads,
    /// The values, of as many heads.
    pub values: Heads,
    /// The output: the pool.
    pub rows: usize,
    /// A pool of that many heads.
    pub pool: Pool<'a>,
}

impl Pool<'_> {
    fn binding(&self, op: &'static str, operand: usize) -> Result<Binding> {
        aligned(op, "pool", self.offset, 16)?;
        Ok(Binding::Write {
            operand,
            offset: self.offset,
        })
    }

    /// Bytes of so many tokens, without what only rounds them up.
    fn bytes(&self, tokens: usize) -> usize {
        let of_one = self.layout.parts().iter();
        tokens
            * of_one
                .map(|part| part.code_bytes() + part.scale_bytes())
                .sum::<usize>()
    }
}

/// Threads that share vectors of this width.
fn threads(width: usize) -> usize {
    width.div_ceil(2).next_multiple_of(32).min(THREADS)
}

impl AppendLatents<'_> {
    /// Its launch.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, for sizes beyond 32 bits and for a pool
    /// that begins in the middle of 16 bytes.
    pub fn launch(&self) -> Result<Launch> {
        let Self { latents, pool } = self;
        let (kind, angles) = (suffix(LATENTS, latents.dtype)?, latents.angles);
        let (queries, turned) = latents.queries.unzip();
        let threads = threads(latents.latent);
        let [latent, key] = cache::parts(LATENTS, pool.layout)?;
        let args = AppendLatentsArgs {
            latent,
            key,
            rows: latents.args(LATENTS, threads)?,
        };
        let operands = [
            Some(latents.kv.read()),
            Some(read(latents.weight)),
            Some(angles.cos.read()),
            Some(angles.sin.read()),
            Some(read(pool.slots)),
            Some(pool.binding(LATENTS, latents.rows)?),
            Some(Binding::Bytes(args.bytes())),
            queries.map(Heads::read),
            turned.map(write),
        ];
        let query_pairs = latents.query_pairs();
        let of_queries = latents.tokens * 2 * query_pairs * latents.dtype.size_in_bytes();
        let of_kv = latents.tokens * latents.width() * latents.dtype.size_in_bytes();
        let slots = latents.tokens * size_of::<u32>();
        let mut constants = vec![
            (16, Constant::Bool(latents.wide())),
            angles.interleaved(),
            (18, Constant::Bool(queries.is_some())),
        ];
        constants.extend(cache::constants(pool.layout));
        Ok(Launch {
            kernel: format!("append_latents_{kind}"),
            constants,
            threadgroups: [1 + query_pairs.div_ceil(threads), latents.tokens, 1],
            threads: [threads, 1, 1],
            bindings: operands.into_iter().flatten().enumerate().collect(),
            work: Work {
                weights: (latents.latent * size_of::<f32>()) as u64,
                read: (of_kv + of_queries + angles.bytes(latents.tokens) + slots) as u64,
                written: (pool.bytes(latents.tokens) + of_queries) as u64,
                operations: 0,
            },
        })
    }
}

impl AppendHeads<'_> {
    /// Its launch.
    ///
    /// # Errors
    /// As [`AppendLatents::launch`].
    pub fn launch(&self) -> Result<Launch> {
        let Self {
            keys, values, pool, ..
        } = self;
        let kind = suffix(HEADS, self.dtype)?;
        let parts = cache::parts(HEADS, pool.layout)?;
        let widest = parts.map(|part| part.width as usize).into_iter().max();
        let args = AppendHeadsArgs {
            keys: parts[0],
            values: parts[1],
            heads: narrow(HEADS, "keys", keys.count)?,
            key_token: narrow(HEADS, "keys", keys.token)?,
            key_head: narrow(HEADS, "keys", keys.head)?,
            value_token: narrow(HEADS, "values", values.token)?,
            value_head: narrow(HEADS, "values", values.head)?,
        };
        let operands = [
            keys.read(),
            values.read(),
            read(pool.slots),
            pool.binding(HEADS, self.rows)?,
            Binding::Bytes(args.bytes()),
        ];
        let of_tokens = self.tokens * pool.layout.width() * self.dtype.size_in_bytes();
        Ok(Launch {
            kernel: format!("append_heads_{kind}"),
            constants: cache::constants(pool.layout).into(),
            threadgroups: [2 * keys.count, self.tokens, 1],
            threads: [threads(widest.unwrap_or_default()), 1, 1],
            bindings: operands.into_iter().enumerate().collect(),
            work: Work {
                weights: 0,
                read: (of_tokens + self.tokens * size_of::<u32>()) as u64,
                written: pool.bytes(self.tokens) as u64,
                operations: 0,
            },
        })
    }
}

/// Plans that between them launch every kernel, in every format of a cache: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has.
pub fn every_kernel(dtype: DType, pairing: Pairing) -> Result<Vec<Plan>> {
    let at = |operand| Rows {
        operand,
        offset: 0,
        row: 64,
    };
    let heads = |operand| Heads {
        operand,
        offset: 0,
        count: 1,
        token: 64,
        head: 64,
    };
    let mut plans = Vec::new();
    for format in CacheFormat::ALL {
        let of_latents = RowLayout::latent(format, 32, 2)?;
        let of_heads = RowLayout::heads(format, 1, 32, 32)?;
        let pool = |layout, slots| Pool {
            layout,
            offset: 0,
            slots,
        };
        let latents = LatentRows {
            dtype,
            tokens: 1,
            latent: 32,
            eps: 1e-6,
            kv: at(1),
            weight: 0,
            angles: Angles {
                pairing,
                pairs: 1,
                cos: at(2),
                sin: at(3),
            },
            rows: 5,
            queries: None,
        };
        let with_queries = LatentRows {
            queries: Some((heads(6), 7)),
            ..latents
        };
        let both = [latents, with_queries].map(|latents| AppendLatents {
            latents,
            pool: pool(&of_latents, 4),
        });
        let of_heads = AppendHeads {
            dtype,
            tokens: 1,
            keys: heads(0),
            values: heads(1),
            rows: 3,
            pool: pool(&of_heads, 2),
        };
        for launch in [both[0].launch()?, both[1].launch()?, of_heads.launch()?] {
            plans.push(Plan {
                launches: vec![launch],
            });
        }
    }
    Ok(plans)
}
