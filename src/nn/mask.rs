//! Attention masks from positions.
//!
//! A mask built from lengths (`n × n`, or `n × total` with the new tokens last) is wrong as soon as a cache
//! already holds tokens: a second turn, a chunk of a long prompt, a padded batch, a sliding window. Built
//! from *where each query and key stands* all of these are one case.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_mmfp4::nn::Mask;
//!
//! // Two tokens are cached, three come in: queries at 2, 3, 4, keys at 0 to 4.
//! let mask = Mask::causal().tensor(2..5, 0..5, DType::F32, &Device::Cpu)?;
//! assert_eq!(mask.dims(), [3, 5]);
//! let blocked = f32::NEG_INFINITY;
//! assert_eq!(mask.get(0)?.to_vec1::<f32>()?, [0., 0., 0., blocked, blocked]);
//! assert_eq!(mask.get(2)?.to_vec1::<f32>()?, [0.; 5]);
//! # Ok::<(), candle_core::Error>(())
//! ```

use candle_core::{DType, Device, Result, Tensor};

/// Which keys a query may see; made into additive masks, 0 where it may and -∞ where it may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    window: Option<usize>,
}

impl Mask {
    /// A query sees its own position and those before it.
    pub const fn causal() -> Self {
        Self { window: None }
    }

    /// A query sees the last `window` positions, its own included (Mistral's and transformers' meaning).
    pub const fn sliding_window(window: usize) -> Self {
        Self { window: Some(window) }
    }

    /// Whether the query at position `query` sees the key at position `key`.
    pub fn visible(&self, query: usize, key: usize) -> bool {
        key <= query && self.window.is_none_or(|window| query - key < window)
    }

    /// The mask `[queries, keys]`, to be broadcast over batch and heads.
    ///
    /// # Errors
    /// Those of the device, or a dtype that is not a float.
    pub fn tensor(
        &self,
        queries: impl IntoIterator<Item = usize>,
        keys: impl IntoIterator<Item = usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        expect_float(dtype)?;
        let queries: Vec<_> = queries.into_iter().map(Some).collect();
        let keys: Vec<_> = keys.into_iter().map(Some).collect();
        let values = self.rows(&queries, &keys);
        Tensor::from_vec(values, (queries.len(), keys.len()), device)?.to_dtype(dtype)
    }

    /// The mask `[batch, 1, queries, keys]` of a padded batch; `None` marks padding, which nobody sees. A
    /// query that is padding itself sees everything: its output is not used, and must not become NaN.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_mmfp4::nn::mask::{Mask, left_padded};
    ///
    /// let positions = left_padded(&[3, 1]);
    /// let mask = Mask::causal().batch(&positions, &positions, DType::F32, &Device::Cpu)?;
    /// let blocked = f32::NEG_INFINITY;
    /// assert_eq!(mask.dims(), [2, 1, 3, 3]);
    /// assert_eq!(mask.get(1)?.squeeze(0)?.get(2)?.to_vec1::<f32>()?, [blocked, blocked, 0.]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Rows of different lengths, or as many query as key rows missing; those of the device, or a dtype that is
    /// not a float.
    pub fn batch(
        &self,
        queries: &[Vec<Option<usize>>],
        keys: &[Vec<Option<usize>>],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        expect_float(dtype)?;
        let (q, k) = (
            queries.first().map_or(0, Vec::len),
            keys.first().map_or(0, Vec::len),
        );
        let even = queries.iter().all(|row| row.len() == q) && keys.iter().all(|row| row.len() == k);
        if queries.len() != keys.len() || !even {
            candle_core::bail!(
                "mask: expected as many rows of queries as of keys, each padded to one length, found {} and {}",
                queries.len(),
                keys.len()
            );
        }
        let values = queries
            .iter()
            .zip(keys)
            .flat_map(|(queries, keys)| self.rows(queries, keys))
            .collect();
        Tensor::from_vec(values, (queries.len(), 1, q, k), device)?.to_dtype(dtype)
    }

    fn rows(&self, queries: &[Option<usize>], keys: &[Option<usize>]) -> Vec<f32> {
        let sees = |query: &Option<usize>, key: &Option<usize>| match (query, key) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(query), Some(key)) => self.visible(*query, *key),
        };
        let value = |visible| if visible { 0.0 } else { f32::NEG_INFINITY };
        queries
            .iter()
            .flat_map(|query| keys.iter().map(move |key| value(sees(query, key))))
            .collect()
    }
}

/// -∞ as an integer is 0, which hides nothing.
fn expect_float(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(()),
        other => {
            candle_core::bail!("mask: expected a dtype of F32, F16, BF16 or F64, a float, found {other:?}")
        }
    }
}

/// Positions of sequences of these lengths, padded at their beginning to the longest.
pub fn left_padded(lengths: &[usize]) -> Vec<Vec<Option<usize>>> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let row = |length: usize| (0..longest).map(|i| (i + length).checked_sub(longest)).collect();
    lengths.iter().copied().map(row).collect()
}

/// Positions of sequences of these lengths, padded at their end to the longest.
pub fn right_padded(lengths: &[usize]) -> Vec<Vec<Option<usize>>> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let row = |length: usize| (0..longest).map(|i| (i < length).then_some(i)).collect();
    lengths.iter().copied().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible(mask: &Tensor) -> Vec<Vec<bool>> {
        let rows = mask.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        rows.into_iter()
            .map(|row| row.into_iter().map(|v| v == 0.0).collect())
            .collect()
    }

    #[test]
    fn chunks_see_what_the_whole_sees() {
        for mask in [Mask::causal(), Mask::sliding_window(3)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let whole = visible(&mask.tensor(0..7, 0..7, dtype, &Device::Cpu).unwrap());
                for cut in 1..7 {
                    let chunk = visible(&mask.tensor(cut..7, 0..7, dtype, &Device::Cpu).unwrap());
                    assert_eq!(chunk, whole[cut..]);
                }
            }
        }
    }

    #[test]
    fn a_window_counts_the_query_itself() {
        let mask = visible(
            &Mask::sliding_window(2)
                .tensor(3..4, 0..5, DType::F32, &Device::Cpu)
                .unwrap(),
        );
        assert_eq!(mask, [[false, false, true, true, false]]);
    }

    #[test]
    fn padding_is_seen_by_nobody_and_sees_everything() {
        for (positions, padding) in [(left_padded(&[2, 4]), 0), (right_padded(&[2, 4]), 3)] {
            let mask = Mask::causal()
                .batch(&positions, &positions, DType::F32, &Device::Cpu)
                .unwrap();
            let short = visible(&mask.get(0).unwrap().squeeze(0).unwrap());
            assert_eq!(short[padding], [true; 4]);
            for (query, row) in short.iter().enumerate() {
                let real = positions[0][query].is_some();
                assert_eq!(
                    row.iter().filter(|v| **v).count(),
                    positions[0][query].map_or(4, |p| p + 1)
                );
                assert!(!real || !row[padding]);
            }
            assert_eq!(
                visible(&mask.get(1).unwrap().squeeze(0).unwrap())[1],
                [true, true, false, false]
            );
        }
        let uneven = [vec![Some(0)], vec![]];
        assert!(
            Mask::causal()
                .batch(&uneven, &uneven, DType::F32, &Device::Cpu)
                .is_err()
        );
    }
}
