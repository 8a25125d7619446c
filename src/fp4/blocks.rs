//! Integers in GGML's blocks (Q8_0, Q4_K and their kin), decoded by Candle's own block types where they lie.

use super::Bytes;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
    GgmlType, QK_K,
};

/// A weight matrix `[N, K]` in blocks of one of GGML's integer types, row-major: what GGUF files hold beside FP4.
///
/// Rows are decoded as Candle's [`QTensor`](candle_core::quantized::QTensor) decodes them, but from a mapped file: nothing is
/// copied. Products are with activations as they are, in any arithmetic.
#[derive(Debug, Clone)]
pub struct BlockTensor {
    shape: (usize, usize),
    kind: GgmlDType,
    bytes: Bytes,
}

/// What one type decodes with.
type Decode = fn(&[u8], &mut [f32]);

impl BlockTensor {
    /// Checks the parts and puts them together; blocks at an odd address are copied. `name` appears in errors.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a type that weights are not stored in (floats, Q8_1, Q8K), a K that is not a multiple of its
    /// block, or bytes of the wrong size.
    pub fn new(name: &str, shape: (usize, usize), kind: GgmlDType, bytes: Bytes) -> Result<Self> {
        let (n, k) = shape;
        let refuse = |problem: String| Err(Error::tensor(name, None, problem));
        if decoder(kind).is_none() {
            return refuse(format!("type {kind:?}; expected integers in blocks"));
        }
        if n == 0 || k == 0 || !k.is_multiple_of(kind.block_size()) {
            let block = kind.block_size();
            return refuse(format!(
                "shape [{n}, {k}]; K must be a multiple of the block of {block}, neither be 0"
            ));
        }
        let needed = n.checked_mul(k / kind.block_size() * kind.type_size());
        if needed != Some(bytes.len()) {
            let needed = needed.map_or("more than there is".into(), |n| n.to_string());
            return refuse(format!(
                "{} bytes; {kind:?} blocks of [{n}, {k}] need {needed}",
                bytes.len()
            ));
        }
        // Every type's size is even, so that all blocks are aligned where the first is.
        let bytes = match bytes.as_ptr().align_offset(align_of::<BlockQ8_0>()) {
            0 => bytes,
            _ => Bytes::copy_from(&bytes)?,
        };
        Ok(Self { shape, kind, bytes })
    }

    /// `(N, K)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The type of its blocks.
    pub fn kind(&self) -> GgmlDType {
        self.kind
    }

    /// The blocks as they lie.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The same tensor over a copy of its bytes, at an even address.
    pub(crate) fn relocated(&self, bytes: Bytes) -> Self {
        debug_assert_eq!(bytes.len(), self.bytes.len());
        Self {
            bytes,
            ..self.clone()
        }
    }

    /// Writes the elements of row `n` from `start` on to `row`; neither end needs to be a block's.
    pub(crate) fn decode_row_part(&self, n: usize, start: usize, row: &mut [f32]) {
        let (block, size) = (self.kind.block_size(), self.kind.type_size());
        let row_size = self.shape.1 / block * size;
        let bytes = &self.bytes[n * row_size..][..row_size];
        let decode = decoder(self.kind).expect("a kind that `new` accepted");
        let (mut at, mut rest) = (start, row);
        while !rest.is_empty() {
            let (first, skip) = (at / block * size, at % block);
            let whole = rest.len() / block;
            let done = if skip == 0 && whole > 0 {
                decode(&bytes[first..][..whole * size], &mut rest[..whole * block]);
                whole * block
            } else {
                let mut values = [0.0; QK_K];
                decode(&bytes[first..][..size], &mut values[..block]);
                let part = rest.len().min(block - skip);
                rest[..part].copy_from_slice(&values[skip..][..part]);
                part
            };
            at += done;
            rest = &mut rest[done..];
        }
    }
}

fn decoder(kind: GgmlDType) -> Option<Decode> {
    Some(match kind {
        GgmlDType::Q4_0 => decode::<BlockQ4_0>,
        GgmlDType::Q4_1 => decode::<BlockQ4_1>,
        GgmlDType::Q5_0 => decode::<BlockQ5_0>,
        GgmlDType::Q5_1 => decode::<BlockQ5_1>,
        GgmlDType::Q8_0 => decode::<BlockQ8_0>,
        GgmlDType::Q2K => decode::<BlockQ2K>,
        GgmlDType::Q3K => decode::<BlockQ3K>,
        GgmlDType::Q4K => decode::<BlockQ4K>,
        GgmlDType::Q5K => decode::<BlockQ5K>,
        GgmlDType::Q6K => decode::<BlockQ6K>,
        _ => return None,
    })
}

/// Whole blocks to f32.
fn decode<T: GgmlType>(bytes: &[u8], values: &mut [f32]) {
    assert_eq!(
        bytes.as_ptr().align_offset(align_of::<T>()),
        0,
        "blocks' alignment"
    );
    // SAFETY: T is one of the `repr(C)` blocks listed above, plain numbers for which any bits are a value; the address is
    // aligned for it, as asserted, and no more blocks are taken than fit into `bytes`, which are borrowed as long.
    let blocks =
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<T>(), bytes.len() / size_of::<T>()) };
    T::to_float(blocks, values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::Weight;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    const KINDS: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    #[test]
    fn rows_and_parts_are_what_candle_makes_of_them() {
        let values: Vec<f32> = (0..3 * 512).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        let tensor = Tensor::from_vec(values, (3, 512), &Device::Cpu).unwrap();
        for kind in KINDS {
            let packed = QTensor::quantize(&tensor, kind).unwrap();
            let expected = packed.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let data = packed.data().unwrap();
            // At an even address, and at an odd one.
            for odd in [0, 1] {
                let held = Bytes::copy_from(&[&[0; 1][..odd], &data].concat()).unwrap();
                let bytes = held.slice(odd..held.len()).unwrap();
                let blocks = BlockTensor::new("w", (3, 512), kind, bytes.clone()).unwrap();
                assert_eq!(
                    Weight::from(blocks.clone()).to_f32(),
                    expected.concat(),
                    "{kind:?}"
                );
                let mut part = [0.0; 300];
                blocks.decode_row_part(1, 100, &mut part);
                assert_eq!(part, expected[1][100..400], "{kind:?}");
                for shape in [(3, 500), (2, 512), (3, 0), (usize::MAX, 512)] {
                    assert!(BlockTensor::new("w", shape, kind, bytes.clone()).is_err());
                }
            }
        }
        let bytes = Bytes::copy_from(&[0; 1024]).unwrap();
        assert!(BlockTensor::new("w", (1, 512), GgmlDType::F16, bytes).is_err());
    }
}
