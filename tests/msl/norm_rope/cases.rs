//! Inputs of norms, rotary position embedding and sums, and what the plain reference makes of them.

use crate::linear::cases::{DTYPES, Lies, activations};
use crate::{grid, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{HeadView, Pairing, reference};
use candle_mmfp4::ops::{LatentRows, RmsNorm, Rope};

pub const LENGTHS: [usize; 13] = [1, 7, 8, 31, 32, 33, 64, 96, 512, 768, 2048, 2049, 2052];
const ROWS: [usize; 7] = [1, 2, 3, 8, 17, 32, 33];
const LIES: [Lies; 6] = [
    Lies::Together,
    Lies::Offset,
    Lies::WideRows,
    Lies::OddRows,
    Lies::Batches,
    Lies::Transposed,
];
const EPS: [f64; 4] = [1e-5, 1e-6, 0.0, 0.25];
/// Magnitudes: squares of the second overflow f16, the mean of the third's is about an epsilon.
const MAGNITUDES: [f32; 3] = [1.0, 3e4, 3e-3];
pub const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::Halves];

/// Rows of a norm or a sum.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub dtype: DType,
    pub rows: usize,
    pub d: usize,
    pub lies: Lies,
    pub eps: f64,
    pub magnitude: f32,
}

impl Default for Rows {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            rows: 2,
            d: 64,
            lies: Lies::Together,
            eps: 1e-5,
            magnitude: 1.0,
        }
    }
}

/// The grid of rows.
pub fn grid() -> Vec<Rows> {
    let axes = [
        DTYPES.len(),
        LENGTHS.len(),
        ROWS.len(),
        LIES.len(),
        EPS.len(),
        MAGNITUDES.len(),
    ];
    let case = |at: [usize; 6]| Rows {
        dtype: DTYPES[at[0]],
        d: LENGTHS[at[1]],
        rows: ROWS[at[2]],
        lies: LIES[at[3]],
        eps: EPS[at[4]],
        magnitude: MAGNITUDES[at[5]],
    };
    grid::chosen(axes).into_iter().map(case).collect()
}

impl Rows {
    /// Rows lying as they are to.
    pub fn x(&self) -> candle_core::Result<Tensor> {
        self.lying(self.lies, 1)
    }

    /// What is added to them: as many, lying otherwise.
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        match self.lies {
            Lies::Batches => self.lying(Lies::Batches, 2),
            Lies::Together | Lies::Transposed => self.lying(Lies::Offset, 2),
            _ => self.lying(Lies::Together, 2),
        }
    }

    fn lying(&self, lies: Lies, seed: u64) -> candle_core::Result<Tensor> {
        let of = |(rows, d): (usize, usize)| {
            let values = noise(rows * d, seed).into_iter().map(|v| v * self.magnitude);
            Tensor::from_iter(values, &Device::Cpu)?
                .reshape((rows, d))?
                .to_dtype(self.dtype)
        };
        lies.take((self.rows, self.d), of)
    }

    pub fn norm(&self) -> RmsNorm {
        RmsNorm::new(noise(self.d, 3), self.eps).unwrap()
    }

    /// What the norm of rows should be.
    pub fn normed(&self, x: &Tensor) -> Vec<f32> {
        reference::rms_norm(&together(x), &noise(self.d, 3), self.eps as f32)
    }

    /// What their sum should be, as it is stored.
    pub fn sum(&self, x: &Tensor, delta: &Tensor) -> Tensor {
        let sum = together(x).into_iter().zip(together(delta)).map(|(a, b)| a + b);
        let sum = Tensor::from_iter(sum, &Device::Cpu).unwrap();
        sum.reshape(x.shape()).unwrap().to_dtype(self.dtype).unwrap()
    }
}

/// A tensor's values in row-major order.
pub fn together(x: &Tensor) -> Vec<f32> {
    values(&x.contiguous().unwrap())
}

/// Tokens: latents with rotary keys, and heads of queries.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    pub dtype: DType,
    pub tokens: usize,
    pub heads: usize,
    pub pairs: usize,
    pub latent: usize,
    pub pairing: Pairing,
    pub lies: HeadsLie,
}

/// How heads of queries lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadsLie {
    Together,
    /// A part of each, behind five elements of others.
    Narrowed,
    /// Heads before tokens.
    HeadsFirst,
    /// The elements of a head apart.
    Transposed,
}

impl HeadsLie {
    /// Activations `[tokens, heads, d]`.
    pub fn take(self, shape: (usize, usize, usize), dtype: DType) -> candle_core::Result<Tensor> {
        self.lay(shape, |count| activations((1, count), dtype, 6).flatten_all())
    }

    /// `[tokens, heads, d]` of a vector of as many elements as that takes.
    pub fn lay(
        self,
        (tokens, heads, d): (usize, usize, usize),
        of: impl FnOnce(usize) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Together => of(tokens * heads * d)?.reshape((tokens, heads, d)),
            Self::Narrowed => of(tokens * heads * (d + 5))?
                .reshape((tokens, heads, d + 5))?
                .narrow(2, 5, d),
            Self::HeadsFirst => of(tokens * heads * d)?
                .reshape((heads, tokens, d))?
                .transpose(0, 1),
            Self::Transposed => of(tokens * heads * d)?
                .reshape((tokens, d, heads))?
                .transpose(1, 2),
        }
    }
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            tokens: 2,
            heads: 3,
            pairs: 4,
            latent: 32,
            pairing: Pairing::Interleaved,
            lies: HeadsLie::Narrowed,
        }
    }
}

/// The grid of tokens.
pub fn tokens() -> Vec<Tokens> {
    const TOKENS: [usize; 6] = [1, 2, 3, 5, 17, 33];
    const HEADS: [usize; 4] = [1, 2, 5, 20];
    const PAIRS: [usize; 6] = [1, 3, 4, 32, 33, 64];
    const LIES: [HeadsLie; 4] = [
        HeadsLie::Together,
        HeadsLie::Narrowed,
        HeadsLie::HeadsFirst,
        HeadsLie::Transposed,
    ];
    let axes = [
        DTYPES.len(),
        TOKENS.len(),
        HEADS.len(),
        PAIRS.len(),
        LENGTHS.len(),
        PAIRINGS.len(),
        LIES.len(),
    ];
    let case = |at: [usize; 7]| Tokens {
        dtype: DTYPES[at[0]],
        tokens: TOKENS[at[1]],
        heads: HEADS[at[2]],
        pairs: PAIRS[at[3]],
        latent: LENGTHS[at[4]],
        pairing: PAIRINGS[at[5]],
        lies: LIES[at[6]],
    };
    grid::chosen(axes).into_iter().map(case).collect()
}

impl Tokens {
    /// Latents and keys, narrowed out of what a joined projection gives: behind eight elements.
    pub fn kv(&self) -> candle_core::Result<Tensor> {
        let width = self.latent + 2 * self.pairs;
        let both = activations((self.tokens, 8 + width), self.dtype, 5);
        both.narrow(1, 8, width)
    }

    /// Heads of queries.
    pub fn queries(&self) -> candle_core::Result<Tensor> {
        self.lies
            .take((self.tokens, self.heads, 2 * self.pairs), self.dtype)
    }

    /// Cosines, and sines as rows of a wider tensor.
    pub fn angles(&self) -> candle_core::Result<(Tensor, Tensor)> {
        let angles = activations((self.tokens, self.pairs + 1), DType::F32, 7);
        let angles = (angles * 1e3)?;
        let cos = angles.narrow(1, 0, self.pairs)?.contiguous()?.cos()?;
        Ok((cos, angles.sin()?.narrow(1, 0, self.pairs)?))
    }

    pub fn rope(&self) -> Rope {
        Rope::new(self.pairing)
    }

    pub fn latent_rows(&self) -> LatentRows {
        let norm = RmsNorm::new(noise(self.latent, 3), 1e-6).unwrap();
        LatentRows::new(norm, self.pairing)
    }

    /// What heads turned should be.
    pub fn turned(&self, x: &Tensor) -> Vec<f32> {
        let (data, (cos, sin)) = (together(x), self.angles().unwrap());
        let (heads, width) = (x.dims()[1], x.dims()[2]);
        let x = HeadView {
            data: &data,
            row: heads * width,
            head: width,
            width,
        };
        let angles = (&*together(&cos), &*together(&sin));
        reference::rope(self.pairing, x, heads, angles, self.tokens)
    }

    /// What a cache should keep.
    pub fn kept(&self, kv: &Tensor) -> Vec<f32> {
        let latents = together(&kv.narrow(1, 0, self.latent).unwrap());
        let latents = reference::rms_norm(&latents, &noise(self.latent, 3), 1e-6);
        let keys = kv.narrow(1, self.latent, 2 * self.pairs).unwrap();
        let keys = self.turned(&keys.unsqueeze(1).unwrap());
        let rows = latents.chunks(self.latent).zip(keys.chunks(2 * self.pairs));
        rows.flat_map(|(latent, key)| [latent, key].concat()).collect()
    }
}
