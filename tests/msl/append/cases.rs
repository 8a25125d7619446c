//! New tokens of a paged cache, and what the CPU's kernels make of them.

use crate::linear::cases::{DTYPES, Lies, activations};
use crate::norm_rope::cases::{HeadsLie, PAIRINGS};
use crate::{grid, noise};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{PagedSequence, Pairing};
use candle_mmfp4::kv::{CacheFormat, RowLayout, codec};
use candle_mmfp4::ops::{AppendHeads, AppendLatents, PagedBatch, RmsNorm};

/// Blocks of a pool.
pub const BLOCKS: usize = 9;
/// What a pool is full of: kernels write no byte of others.
const UNTOUCHED: u8 = 0xee;
const TOKENS: [usize; 6] = [1, 2, 3, 5, 17, 33];

/// Whole bytes of a pool that nobody has written.
pub fn pool(layout: &RowLayout, device: &Device) -> candle_core::Result<Tensor> {
    let len = layout.pool_bytes(BLOCKS)?;
    Tensor::from_vec(vec![UNTOUCHED; len], len, &Device::Cpu)?.to_device(device)
}

/// So many tokens, of up to three sequences: the first goes on in a block that has tokens, the second lies in blocks in no
/// order, the third begins at the start of one.
pub fn batch(tokens: usize, device: &Device) -> candle_mmfp4::Result<PagedBatch> {
    let first = tokens.min(3);
    let third = (tokens - first) / 4;
    let second = tokens - first - third;
    let of = |table, len, queries| PagedSequence { table, len, queries };
    let sequences = [
        of(&[7, 3][..], 14 + first, first),
        of(&[8, 0, 5, 2][..], 20 + second, second),
        of(&[4][..], third, third),
    ];
    PagedBatch::new(&sequences, 16, device)
}

/// What a pool holds of a batch's tokens, as numbers.
pub fn decoded(layout: &RowLayout, pool: &[u8], tokens: usize) -> Vec<f32> {
    let mut all = vec![0.0; tokens * layout.width()];
    let batch = batch(tokens, &Device::Cpu).unwrap();
    for (row, slot) in all.chunks_mut(layout.width()).zip(batch.slots().as_slice()) {
        codec::read(layout, pool, *slot, row).unwrap();
    }
    all
}

/// Latents with rotary keys, and heads of queries.
#[derive(Debug, Clone, Copy)]
pub struct Latents {
    pub dtype: DType,
    pub format: CacheFormat,
    pub latent: usize,
    pub rope: usize,
    pub tokens: usize,
    pub heads: usize,
    pub pairing: Pairing,
    pub lies: Lies,
    pub queries_lie: HeadsLie,
    /// Whether sums of squares are exact, and with them all that is stored.
    pub exact: bool,
}

impl Default for Latents {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            format: CacheFormat::BF16,
            latent: 64,
            rope: 6,
            tokens: 5,
            heads: 3,
            pairing: Pairing::Interleaved,
            lies: Lies::Together,
            queries_lie: HeadsLie::Narrowed,
            exact: true,
        }
    }
}

/// The grid of latents.
pub fn latents() -> Vec<Latents> {
    // Of latents and rotary keys: those of FP4 are of whole groups, and more than a chunk of 1,024.
    const WIDTHS: [(usize, usize); 6] = [(512, 64), (128, 32), (32, 2), (96, 0), (1056, 6), (2048, 64)];
    const ANY_WIDTHS: [(usize, usize); 6] = [(512, 64), (128, 32), (131, 6), (7, 2), (1, 0), (1030, 66)];
    const HEADS: [usize; 3] = [1, 5, 20];
    const LIES: [Lies; 4] = [Lies::Together, Lies::Offset, Lies::OddRows, Lies::Transposed];
    const QUERIES_LIE: [HeadsLie; 3] = [HeadsLie::Narrowed, HeadsLie::HeadsFirst, HeadsLie::Transposed];
    let axes = [
        DTYPES.len(),
        CacheFormat::ALL.len(),
        WIDTHS.len(),
        TOKENS.len(),
        HEADS.len(),
        PAIRINGS.len(),
        LIES.len(),
        QUERIES_LIE.len(),
        2,
    ];
    let case = |at: [usize; 9]| {
        let format = CacheFormat::ALL[at[1]];
        let (latent, rope) = match format {
            CacheFormat::Fp4 { .. } => WIDTHS[at[2]],
            _ => ANY_WIDTHS[at[2]],
        };
        Latents {
            dtype: DTYPES[at[0]],
            format,
            latent,
            rope,
            tokens: TOKENS[at[3]],
            heads: HEADS[at[4]],
            pairing: PAIRINGS[at[5]],
            lies: LIES[at[6]],
            queries_lie: QUERIES_LIE[at[7]],
            exact: at[8] == 0,
        }
    };
    grid::chosen(axes).into_iter().map(case).collect()
}

impl Latents {
    pub fn layout(&self) -> RowLayout {
        RowLayout::latent(self.format, self.latent, self.rope).unwrap()
    }

    pub fn op(&self) -> AppendLatents {
        let norm = RmsNorm::new(noise(self.latent, 3), 1e-6).unwrap();
        AppendLatents::new(norm, self.pairing, self.layout()).unwrap()
    }

    /// Latents and keys, lying as they are to. Where sums are to be exact, all are eighths.
    pub fn kv(&self) -> candle_core::Result<Tensor> {
        let of = |(rows, d)| {
            let values = activations((rows, d), DType::F32, 5);
            let values = if self.exact {
                ((values * 8.0)?.round()? / 8.0)?
            } else {
                values
            };
            values.to_dtype(self.dtype)
        };
        self.lies.take((self.tokens, self.latent + self.rope), of)
    }

    pub fn queries(&self) -> candle_core::Result<Tensor> {
        self.queries_lie
            .take((self.tokens, self.heads, self.rope), self.dtype)
    }

    /// Cosines, and sines as rows of a wider tensor.
    pub fn angles(&self) -> candle_core::Result<[Tensor; 2]> {
        let pairs = self.rope / 2;
        let angles = (activations((self.tokens, pairs + 1), DType::F32, 7) * 1e3)?;
        let cos = angles.narrow(1, 0, pairs)?.contiguous()?.cos()?;
        Ok([cos, angles.sin()?.narrow(1, 0, pairs)?])
    }

    /// Stores the tokens by whatever runs ops here; gives the pool, and the queries where they are turned too.
    pub fn append(
        &self,
        kv: &Tensor,
        with_queries: bool,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let [cos, sin] = self.angles()?;
        let (cos, sin) = (cos.to_device(device)?, sin.to_device(device)?);
        let (pool, kv) = (pool(&self.layout(), device)?, kv.to_device(device)?);
        let batch = batch(self.tokens, device)?;
        let turned = if with_queries {
            let queries = self.queries()?.to_device(device)?;
            Some(
                self.op()
                    .forward_with_queries(&pool, &kv, &queries, &cos, &sin, &batch)?,
            )
        } else {
            self.op().forward(&pool, &kv, &cos, &sin, &batch)?;
            None
        };
        Ok((pool, turned))
    }
}

/// Keys and values of heads.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Of keys, and of values.
    pub dtypes: [DType; 2],
    pub format: CacheFormat,
    pub kv_heads: usize,
    /// Of keys, and of values.
    pub widths: [usize; 2],
    pub tokens: usize,
    pub lie: HeadsLie,
    pub numbers: Numbers,
}

/// What is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Of all magnitudes from 2^-20 to 16, zeros among them.
    Ordinary,
    /// Ties between codes: small integers and their halves and quarters. First comes a group of which two scales of FP4 are
    /// so nearly as good that the last bits of sums decide.
    Ties,
    /// NaN and infinity, numbers that a format cannot hold, and the smallest ones.
    Extreme,
}

impl Default for Heads {
    fn default() -> Self {
        Self {
            dtypes: [DType::F32; 2],
            format: CacheFormat::BF16,
            kv_heads: 3,
            widths: [96, 64],
            tokens: 5,
            lie: HeadsLie::Together,
            numbers: Numbers::Ordinary,
        }
    }
}

/// The grid of heads.
pub fn heads() -> Vec<Heads> {
    const HEADS: [usize; 4] = [1, 2, 3, 8];
    const WIDTHS: [[usize; 2]; 5] = [[96, 64], [128, 128], [256, 32], [32, 1056], [64, 64]];
    const ANY_WIDTHS: [[usize; 2]; 5] = [[97, 65], [128, 128], [256, 1], [3, 1030], [129, 64]];
    const LIES: [HeadsLie; 4] = [
        HeadsLie::Together,
        HeadsLie::Narrowed,
        HeadsLie::HeadsFirst,
        HeadsLie::Transposed,
    ];
    const NUMBERS: [Numbers; 3] = [Numbers::Ordinary, Numbers::Ties, Numbers::Extreme];
    let axes = [
        DTYPES.len(),
        DTYPES.len(),
        CacheFormat::ALL.len(),
        WIDTHS.len(),
        TOKENS.len(),
        HEADS.len(),
        LIES.len(),
        NUMBERS.len(),
    ];
    let case = |at: [usize; 8]| {
        let format = CacheFormat::ALL[at[2]];
        Heads {
            dtypes: [DTYPES[at[0]], DTYPES[at[1]]],
            format,
            widths: match format {
                CacheFormat::Fp4 { .. } => WIDTHS[at[3]],
                _ => ANY_WIDTHS[at[3]],
            },
            tokens: TOKENS[at[4]],
            kv_heads: HEADS[at[5]],
            lie: LIES[at[6]],
            numbers: NUMBERS[at[7]],
        }
    };
    grid::chosen(axes).into_iter().map(case).collect()
}

impl Numbers {
    /// So many of them.
    fn take(self, len: usize, seed: u64) -> Vec<f32> {
        const EXTREME: [f32; 12] = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            -f32::NAN,
            1e6,
            380_900.0,
            -380_928.0,
            65_520.0,
            1e-30,
            -1e-7,
            3e38,
            -0.0,
        ];
        /// In 8,192nds. Without rounding squares before they are added another scale would be the best.
        const CLOSE: [i16; 16] = [
            3490, -26065, -27283, 19465, 7219, 12816, 8270, 13868, 5488, -18897, 32521, 23565, 17660, 5765,
            26827, 14051,
        ];
        let (signs, sizes) = (noise(len, seed), noise(len, seed + 1));
        let both = signs.into_iter().zip(sizes).enumerate();
        both.map(|(i, (sign, size))| match self {
            Self::Ordinary if size < -0.8 => 0.0,
            Self::Ordinary => sign * (size * 12.0 - 8.0).exp2(),
            Self::Ties if i < CLOSE.len() => f32::from(CLOSE[i]) / 8192.0,
            Self::Ties => (sign * 24.0).round() / 4.0,
            // In every other stretch of 128, a group of FP8.
            Self::Extreme if i / 128 % 2 == 0 && size > 0.9 => EXTREME[i % EXTREME.len()],
            Self::Extreme => sign,
        })
        .collect()
    }
}

impl Heads {
    pub fn layout(&self) -> RowLayout {
        let [keys, values] = self.widths;
        RowLayout::heads(self.format, self.kv_heads, keys, values).unwrap()
    }

    /// Keys, and values.
    pub fn inputs(&self) -> candle_core::Result<[Tensor; 2]> {
        let of = |index: usize| {
            let take = |len| {
                Tensor::from_vec(self.numbers.take(len, 7 + 2 * index as u64), len, &Device::Cpu)?
                    .to_dtype(self.dtypes[index])
            };
            self.lie
                .lay((self.tokens, self.kv_heads, self.widths[index]), take)
        };
        Ok([of(0)?, of(1)?])
    }

    /// Stores the tokens by whatever runs ops here.
    pub fn append(&self, device: &Device) -> candle_core::Result<Tensor> {
        let [keys, values] = self.inputs()?;
        let (keys, values) = (keys.to_device(device)?, values.to_device(device)?);
        let pool = pool(&self.layout(), device)?;
        let batch = batch(self.tokens, device)?;
        AppendHeads::new(self.layout())?.forward(&pool, &keys, &values, &batch)?;
        Ok(pool)
    }
}
