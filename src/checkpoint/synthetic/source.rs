//! Where the bytes of a synthetic checkpoint come from.

use crate::Result;
use crate::checkpoint::layout::Entry;
use crate::fp4::code;
use crate::random::Random;
use half::{bf16, f16};

/// Random bytes made at a time: small enough for the second-level cache.
const PIECE: usize = 128 << 10;
const SEED: u64 = 47;

/// What a tensor's bytes are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content {
    /// Uniform over all sixteen.
    Codes,
    /// Scales of a weight of this root mean square, each within a quarter of their mean.
    Scales { rms: f32 },
    /// BF16 around 0, of this root mean square.
    Uniform { rms: f32 },
    /// BF16.
    Ones,
    /// F32.
    Zeros,
}

/// Where the bytes come from, piece by piece.
pub(super) struct Source {
    random: Random,
    piece: Vec<u8>,
    halves: Vec<u8>,
}

impl Source {
    pub(super) fn new() -> Self {
        Self {
            random: Random::new(SEED),
            piece: vec![0; PIECE],
            halves: Vec::with_capacity(2 * PIECE),
        }
    }

    pub(super) fn produce(
        &mut self,
        entry: &Entry<Content>,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match entry.content {
            Content::Codes => {
                let mut left = entry.size;
                while left > 0 {
                    let piece = &mut self.piece[..left.min(PIECE)];
                    self.random.fill(piece);
                    put(piece)?;
                    left -= piece.len();
                }
                Ok(())
            }
            Content::Scales { rms } => {
                let square = code::VALUES.iter().map(|value| value * value).sum::<f32>() / 16.0;
                let mean = rms / square.sqrt();
                self.halves(entry.size, put, |u| {
                    f16::from_f32(mean * (1.0 + u / 4.0)).to_le_bytes()
                })
            }
            Content::Uniform { rms } => {
                let bound = rms * 3f32.sqrt();
                self.halves(entry.size, put, |u| bf16::from_f32(bound * u).to_le_bytes())
            }
            Content::Ones => self.halves(entry.size, put, |_| bf16::ONE.to_le_bytes()),
            Content::Zeros => put(&vec![0; entry.size]),
        }
    }

    /// `size` bytes of 16-bit floats, each `value` of one of 256 numbers evenly spread over -1 to 1.
    fn halves(
        &mut self,
        size: usize,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
        value: impl Fn(f32) -> [u8; 2],
    ) -> Result<()> {
        let table: [[u8; 2]; 256] = std::array::from_fn(|index| value((2.0 * index as f32 - 255.0) / 255.0));
        let mut left = size / 2;
        while left > 0 {
            let piece = &mut self.piece[..left.min(PIECE)];
            self.random.fill(piece);
            self.halves.clear();
            self.halves
                .extend(piece.iter().flat_map(|byte| table[usize::from(*byte)]));
            put(&self.halves)?;
            left -= piece.len();
        }
        Ok(())
    }
}
