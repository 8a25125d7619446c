//! Matrices that stay in floating point, used where they lie as the FP4 ones are.

use super::{BlockTensor, Bytes, Fp4Tensor, Int8Tensor};
use crate::{Error, Result};
use half::{bf16, f16};

/// The element type of a [`DenseTensor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatKind {
    /// 32-bit IEEE.
    F32,
    /// 16-bit IEEE.
    F16,
    /// bfloat16.
    BF16,
}

impl FloatKind {
    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A matrix `[N, K]` of little-endian floats, row-major. Its bytes need no alignment.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    shape: (usize, usize),
    kind: FloatKind,
    bytes: Bytes,
}

impl DenseTensor {
    /// Checks the size and puts the parts together. `name` appears in errors.
    ///
    /// # Errors
    /// [`Error::Tensor`] where `bytes` is not `N · K` elements long.
    pub fn new(name: &str, shape: (usize, usize), kind: FloatKind, bytes: Bytes) -> Result<Self> {
        let needed = shape
            .0
            .checked_mul(shape.1)
            .and_then(|n| n.checked_mul(kind.size()));
        if needed != Some(bytes.len()) || bytes.is_empty() {
            let problem = format!(
                "{} bytes; a {kind:?} matrix of [{}, {}] needs {}",
                bytes.len(),
                shape.0,
                shape.1,
                needed.map_or("more than there is".into(), |n| n.to_string())
            );
            return Err(Error::tensor(name, None, problem));
        }
        Ok(Self { shape, kind, bytes })
    }

    /// `(N, K)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The element type.
    pub fn kind(&self) -> FloatKind {
        self.kind
    }

    /// The elements as they lie.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The whole matrix in f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let (n, k) = self.shape;
        let mut values = vec![0.0; n * k];
        for (i, row) in values.chunks_exact_mut(k).enumerate() {
            self.decode_row_part(i, 0, row);
        }
        values
    }

    pub(crate) fn relocated(&self, bytes: Bytes) -> Self {
        debug_assert_eq!(bytes.len(), self.bytes.len());
        Self {
            bytes,
            ..self.clone()
        }
    }

    #[inline]
    pub(crate) fn decode_row_part(&self, n: usize, start: usize, row: &mut [f32]) {
        let size = self.kind.size();
        let bytes = &self.bytes[(n * self.shape.1 + start) * size..][..row.len() * size];
        match self.kind {
            FloatKind::F32 => {
                for (value, b) in row.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            FloatKind::F16 => {
                for (value, b) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            FloatKind::BF16 => {
                for (value, b) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
        }
    }
}

/// A weight matrix `[N, K]` as a checkpoint holds it, or rounded while loading: the ops take any kind, tensor by tensor.
#[derive(Debug, Clone)]
pub enum Weight {
    /// 4-bit codes and scales.
    Fp4(Fp4Tensor),
    /// Floating point.
    Dense(DenseTensor),
    /// Eight bits and a scale a block of 128.
    Int8(Int8Tensor),
    /// Integers in GGML's blocks.
    Blocks(BlockTensor),
}

impl Weight {
    /// `(N, K)`: output features, input features.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Fp4(tensor) => tensor.shape(),
            Self::Dense(tensor) => tensor.shape(),
            Self::Int8(tensor) => tensor.shape(),
            Self::Blocks(tensor) => tensor.shape(),
        }
    }

    /// Bytes the weight takes where it lies.
    pub fn size_in_bytes(&self) -> usize {
        self.regions().map(|bytes| bytes.len()).sum()
    }

    /// Writes row `n` in f32 to `row`.
    ///
    /// # Panics
    /// If there is no such row or `row` is not `K` long.
    pub fn decode_row(&self, n: usize, row: &mut [f32]) {
        assert_eq!(row.len(), self.shape().1, "row length");
        self.decode_row_part(n, 0, row);
    }

    /// The whole matrix in f32, row-major.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let (n, k) = self.shape();
        let mut values = vec![0.0; n * k];
        for (row, values) in values.chunks_exact_mut(k).enumerate() {
            self.decode_row_part(row, 0, values);
        }
        values
    }

    /// Writes a part of row `n` to `row`; both ends are multiples of the group where there is one.
    #[inline]
    pub(crate) fn decode_row_part(&self, n: usize, start: usize, row: &mut [f32]) {
        match self {
            Self::Fp4(tensor) => tensor.decode_row_part(n, start, row),
            Self::Dense(tensor) => tensor.decode_row_part(n, start, row),
            Self::Int8(tensor) => tensor.decode_row_part(n, start, row),
            Self::Blocks(tensor) => tensor.decode_row_part(n, start, row),
        }
    }

    /// The bytes it consists of: codes and scales, floats, or blocks.
    pub fn regions(&self) -> impl Iterator<Item = &Bytes> + Clone {
        let (first, second) = match self {
            Self::Fp4(tensor) => (tensor.codes(), Some(tensor.scales())),
            Self::Dense(tensor) => (tensor.bytes(), None),
            Self::Int8(tensor) => (tensor.codes(), Some(tensor.scales())),
            Self::Blocks(tensor) => (tensor.bytes(), None),
        };
        std::iter::once(first).chain(second)
    }

    /// The same weight over copies of its [regions](Self::regions), in their order.
    pub(crate) fn relocated(&self, mut regions: impl FnMut(&Bytes) -> Bytes) -> Self {
        match self {
            Self::Fp4(tensor) => {
                let codes = regions(tensor.codes());
                Self::Fp4(tensor.relocated(codes, regions(tensor.scales())))
            }
            Self::Dense(tensor) => Self::Dense(tensor.relocated(regions(tensor.bytes()))),
            Self::Blocks(tensor) => Self::Blocks(tensor.relocated(regions(tensor.bytes()))),
            Self::Int8(tensor) => {
                let codes = regions(tensor.codes());
                Self::Int8(tensor.relocated(codes, regions(tensor.scales())))
            }
        }
    }
}

impl From<Fp4Tensor> for Weight {
    fn from(tensor: Fp4Tensor) -> Self {
        Self::Fp4(tensor)
    }
}

impl From<DenseTensor> for Weight {
    fn from(tensor: DenseTensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<BlockTensor> for Weight {
    fn from(tensor: BlockTensor) -> Self {
        Self::Blocks(tensor)
    }
}

impl From<Int8Tensor> for Weight {
    fn from(tensor: Int8Tensor) -> Self {
        Self::Int8(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_decode_at_any_alignment() {
        let values = [1.5f32, -2.0, 0.25, 100.0, -0.0, 7.0];
        for kind in [FloatKind::F32, FloatKind::F16, FloatKind::BF16] {
            let mut bytes = vec![0xee];
            for v in values {
                match kind {
                    FloatKind::F32 => bytes.extend(v.to_le_bytes()),
                    FloatKind::F16 => bytes.extend(f16::from_f32(v).to_le_bytes()),
                    FloatKind::BF16 => bytes.extend(bf16::from_f32(v).to_le_bytes()),
                }
            }
            let odd = Bytes::copy_from(&bytes).unwrap().slice(1..bytes.len()).unwrap();
            let weight = Weight::from(DenseTensor::new("w", (2, 3), kind, odd.clone()).unwrap());
            let mut row = [0.0; 3];
            weight.decode_row(1, &mut row);
            assert_eq!(row, values[3..], "{kind:?}");
            assert!(DenseTensor::new("w", (2, 4), kind, odd).is_err());
        }
    }
}
