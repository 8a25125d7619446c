//! Token embeddings read from the matrix where it lies.

use crate::fp4::Weight;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// An embedding table `[vocabulary, hidden]` in floating point or FP4. A lookup decodes the rows it needs;
/// the table is never copied, so that a tied output head can share it.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Weight,
}

impl Embedding {
    /// Takes the table.
    pub fn new(weight: Weight) -> Self {
        Self { weight }
    }

    /// The table.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The rows of `tokens`, `[tokens, hidden]` in F32.
    ///
    /// # Errors
    /// [`Error::TokenId`] names the first id outside the table.
    pub fn forward(&self, tokens: &[u32], device: &Device) -> Result<Tensor> {
        let (vocab_size, hidden) = self.weight.shape();
        if let Some(index) = tokens.iter().position(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenId {
                id: tokens[index],
                index,
                vocab_size,
            });
        }
        let mut rows = vec![0.0; tokens.len() * hidden];
        for (row, id) in rows.chunks_exact_mut(hidden).zip(tokens) {
            self.weight.decode_row(*id as usize, row);
        }
        Ok(Tensor::from_vec(rows, (tokens.len(), hidden), device)?)
    }
}
