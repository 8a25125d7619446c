//! The tokens of a pass over a paged cache.

use crate::cpu::PagedSequence;
use crate::kv::{RowLayout, Slots};
use crate::ops::planned;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::ops::Range;

const OP: &str = "mmfp4-paged-batch";

/// The new tokens of one sequence or many: the slot that each is written to, and the blocks that it sees. Made once for
/// all layers of a pass, with a copy for the device where one runs the ops.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::cpu::PagedSequence;
/// use candle_mmfp4::ops::PagedBatch;
///
/// // The last two of 18 tokens, the first 16 of which lie in block 5.
/// let sequence = PagedSequence { table: &[5, 2], len: 18, queries: 2 };
/// let batch = PagedBatch::new(&[sequence], 16, &Device::Cpu)?;
/// assert_eq!(batch.slots().as_slice(), [32, 33]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct PagedBatch {
    slots: Slots,
    /// The tables of all sequences, one after the other.
    tables: Vec<u32>,
    sequences: Vec<Lies>,
    block_tokens: usize,
    index: Option<Tensor>,
}

/// A sequence of a batch.
#[derive(Debug, Clone)]
struct Lies {
    table: Range<usize>,
    len: usize,
    queries: usize,
}

impl PagedBatch {
    /// A batch of sequences, each with as many new tokens as it has queries, over blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence with more new tokens than tokens or a table that is too short for them, or a
    /// slot that two tokens share; those of the device.
    pub fn new(sequences: &[PagedSequence<'_>], block_tokens: usize, device: &Device) -> Result<Self> {
        let (mut slots, mut tables, mut lie) = (Vec::new(), Vec::new(), Vec::new());
        for (index, sequence) in sequences.iter().enumerate() {
            let PagedSequence { table, len, queries } = *sequence;
            if queries > len {
                let expected = format!("at most {len}, the tokens of sequence {index}");
                return Err(Error::argument(OP, "queries", expected, queries.to_string()));
            }
            // Slots and positions are 32 bits wide; so no product here overflows.
            let narrow = u32::try_from(block_tokens).is_ok() && u32::try_from(len).is_ok();
            if !narrow || block_tokens == 0 || table.len() < len.div_ceil(block_tokens) {
                let expected = format!("blocks for the {len} tokens of sequence {index}");
                let found = format!("{} of {block_tokens} tokens", table.len());
                return Err(Error::argument(OP, "tables", expected, found));
            }
            for position in len - queries..len {
                let slot = u64::from(table[position / block_tokens]) * block_tokens as u64
                    + (position % block_tokens) as u64;
                slots.push(u32::try_from(slot).map_err(|_| {
                    Error::argument(OP, "tables", "blocks of slots below 2³²", format!("slot {slot}"))
                })?);
            }
            let start = tables.len();
            tables.extend_from_slice(table);
            lie.push(Lies {
                table: start..tables.len(),
                len,
                queries,
            });
        }
        let mut batch = Self {
            slots: Slots::new(slots)?,
            tables,
            sequences: lie,
            block_tokens,
            index: None,
        };
        if planned::runs_on(device) {
            batch.index = Some(batch.on_device(device)?);
        }
        Ok(batch)
    }

    /// What kernels read, in U32: of each new token its slot; of each its position; of each where, in this tensor, the
    /// table of its sequence begins; the tables.
    fn on_device(&self, device: &Device) -> Result<Tensor> {
        let tokens = self.slots.len();
        let mut words = Vec::with_capacity(3 * tokens + self.tables.len());
        words.extend_from_slice(self.slots.as_slice());
        for lies in &self.sequences {
            words.extend((lies.len - lies.queries..lies.len).map(|position| position as u32));
        }
        for lies in &self.sequences {
            words.extend(std::iter::repeat_n(
                (3 * tokens + lies.table.start) as u32,
                lies.queries,
            ));
        }
        words.extend_from_slice(&self.tables);
        if u32::try_from(words.len()).is_err() {
            let found = format!("{} words", words.len());
            return Err(Error::argument(OP, "tables", "fewer than 2³² words", found));
        }
        if words.is_empty() {
            // A GPU has no buffers of no bytes.
            words.push(0);
        }
        let len = words.len();
        Ok(Tensor::from_vec(words, len, device)?)
    }

    /// Checks that a pool's blocks are as long as the tables say.
    pub(super) fn check_blocks(&self, op: &'static str, layout: &RowLayout) -> Result<()> {
        if self.sequences.is_empty() || self.block_tokens == layout.block_tokens() {
            return Ok(());
        }
        let expected = format!("blocks of {} tokens", layout.block_tokens());
        let found = format!("of {}", self.block_tokens);
        Err(Error::argument(op, "batch", expected, found))
    }

    /// The slots that the new tokens are written to, sequence after sequence.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// New tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.slots.len()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// The sequences, in the order in which their tokens lie in tensors.
    pub fn sequences(&self) -> impl Iterator<Item = PagedSequence<'_>> {
        self.sequences.iter().map(|lies| PagedSequence {
            table: &self.tables[lies.table.clone()],
            len: lies.len,
            queries: lies.queries,
        })
    }

    /// Where in that copy the table of a sequence begins.
    pub(crate) fn table_start(&self, sequence: usize) -> Option<usize> {
        let lies = self.sequences.get(sequence)?;
        Some(3 * self.tokens() + lies.table.start)
    }

    /// The copy for a device: see [`on_device`](Self::on_device).
    pub(crate) fn index(&self) -> Option<&Tensor> {
        self.index.as_ref()
    }
}

#[cfg(all(test, msl_host))]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_no_buffer_of_no_bytes() {
        let host = std::sync::Arc::new(crate::metal::host::Host::recorder(false));
        let batch = host.install(|| PagedBatch::new(&[], 16, &Device::Cpu)).unwrap();
        assert!(batch.index().is_some_and(|index| index.elem_count() > 0));
        assert_eq!(batch.tokens(), 0);
    }
}
