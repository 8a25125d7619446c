//! A cache of many sequences in blocks of one pool a layer.

use super::memory::zeros;
use crate::cpu::PagedSequence;
use crate::kv::{BlockCopy, BlockStatistics, Blocks, RowLayout, SequenceId};
use crate::ops::PagedBatch;
use crate::{Error, Result, memory};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;
use std::str::FromStr;

const OP: &str = "kv-cache";

/// How large a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheSize {
    /// Room for so many tokens, of all sequences together.
    Tokens(usize),
    /// At most so many bytes, of all layers together.
    Bytes(u64),
}

impl FromStr for CacheSize {
    type Err = Error;

    /// Bytes: a number, and K, M, G or T for powers of 1,024, as `512M` or `1.5G`.
    fn from_str(text: &str) -> Result<Self> {
        let (number, power) = match text.char_indices().next_back() {
            Some((at, letter)) if letter.is_ascii_alphabetic() => {
                let power = "KMGT".find(letter.to_ascii_uppercase());
                (&text[..at], power.map(|power| power + 1))
            }
            _ => (text, Some(0)),
        };
        let plain = number.starts_with(|first: char| first.is_ascii_digit())
            && number.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number: Option<f64> = number.parse().ok().filter(|_| plain);
        match (number, power) {
            // Beyond 2⁶⁴ it is as much as there can be, which no machine has.
            (Some(number), Some(power)) => Ok(Self::Bytes((number * 1024f64.powi(power as i32)) as u64)),
            _ => {
                let expected = "bytes, or a number with K, M, G or T after it, as in 512M or 1.5G";
                Err(Error::argument(OP, "size", expected, format!("`{text}`")))
            }
        }
    }
}

/// What attention has to remember of any number of sequences, in the format of its [layout](RowLayout): all memory is
/// taken at the start, a pool a layer, and blocks of it are the sequences' ([`Blocks`]).
///
/// A forward pass *begins* with the new tokens of one or several sequences, writes their rows in each layer's
/// [pool](Self::pool) as its [batch](Self::batch) says, and *commits*. If it fails between, the sequences are as
/// they were.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_mmfp4::kv::{CacheFormat, RowLayout};
/// use candle_mmfp4::nn::{CacheSize, PagedKvCache};
/// use candle_mmfp4::ops::AppendHeads;
///
/// let append = AppendHeads::new(RowLayout::heads(CacheFormat::fp4(), 2, 64, 64)?)?;
/// let mut cache = PagedKvCache::new(1, append.layout().clone(), CacheSize::Tokens(256), 1024, &Device::Cpu)?;
/// let prompt: Vec<u32> = (0..20).collect();
/// let (sequence, cached) = cache.start(&prompt);
/// cache.begin(&[(sequence, &prompt[cached..])])?;
/// let rows = Tensor::ones((20, 2, 64), DType::F32, &Device::Cpu)?; // keys and values of a model
/// append.forward(cache.pool(0)?, &rows, &rows, cache.batch())?;
/// cache.commit();
///
/// // Whoever starts alike finds the prompt's whole blocks there, but for its last token, which is to be computed.
/// assert_eq!(cache.start(&prompt).1, 16);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct PagedKvCache {
    layout: RowLayout,
    pools: Vec<Tensor>,
    blocks: Blocks,
    limit: usize,
    /// The sequences of a pass that has not ended, and where each of them begins it.
    pass: Vec<(SequenceId, usize)>,
    batch: PagedBatch,
    device: Device,
}

/// A sequence of a pass, as attention reads it.
#[derive(Debug, Clone)]
pub struct PassSequence<'a> {
    /// Which one.
    pub id: SequenceId,
    /// The position of its first new token.
    pub position: usize,
    /// Its new tokens.
    pub tokens: &'a [u32],
    /// The blocks of all its tokens.
    pub table: &'a [u32],
    /// The positions of the prompt that its new tokens are a part of, where one was
    /// [announced](PagedKvCache::announce).
    pub prompt: Option<Range<usize>>,
}

impl PagedKvCache {
    /// A cache of `layers` layers for sequences of at most `limit` tokens each.
    ///
    /// # Errors
    /// [`Error::Argument`] where not even a block fits the size, or the size does not fit the machine's memory or u32
    /// slots; those of the device.
    pub fn new(
        layers: usize,
        layout: RowLayout,
        size: CacheSize,
        limit: usize,
        device: &Device,
    ) -> Result<Self> {
        let of_block = (layout.block_bytes() as u64).saturating_mul(layers.max(1) as u64);
        let blocks = match size {
            CacheSize::Tokens(tokens) => tokens.div_ceil(layout.block_tokens()),
            CacheSize::Bytes(bytes) => usize::try_from(bytes / of_block).unwrap_or(usize::MAX),
        };
        if blocks == 0 {
            let expected = format!(
                "a block at least: {} tokens, {of_block} bytes",
                layout.block_tokens()
            );
            return Err(Error::argument(OP, "size", expected, format!("{size:?}")));
        }
        let of_layer = layout.pool_bytes(blocks)?;
        check_memory(
            of_block.saturating_mul(blocks as u64),
            (layout.row_bytes() as u64).saturating_mul(layers as u64),
            device,
        )?;
        // A GPU has the memory of a cache that is gone only once it has come to rest.
        device.synchronize()?;
        let pools = (0..layers).map(|_| zeros(of_layer, DType::U8, device));
        Ok(Self {
            pools: pools.collect::<candle_core::Result<_>>()?,
            blocks: Blocks::new(blocks, layout.block_tokens())?,
            layout,
            limit,
            pass: Vec::new(),
            batch: PagedBatch::default(),
            device: device.clone(),
        })
    }

    /// Where the numbers of a token lie.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    /// Where its pools are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The most tokens of a sequence.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes of memory it holds.
    pub fn size_in_bytes(&self) -> usize {
        self.pools.iter().map(Tensor::elem_count).sum()
    }

    /// How its blocks are used.
    pub fn statistics(&self) -> BlockStatistics {
        self.blocks.statistics()
    }

    /// A new sequence that is to begin with these tokens; tells how many of them it has already, because another
    /// sequence began alike: whole blocks, and never the last token, whose output nobody has kept. The rest is
    /// [announced](Self::announce).
    pub fn start(&mut self, prompt: &[u32]) -> (SequenceId, usize) {
        let all_but_last = prompt.len().saturating_sub(1);
        let (id, cached) = self.blocks.start(&prompt[..all_but_last]);
        // It was started just now.
        _ = self.blocks.announce(id, prompt.len());
        (id, cached)
    }

    /// Says that what a sequence goes on with, up to `len` tokens in all, is one prompt, in however many passes it comes: a
    /// model that could compute it in several ways then decides for all of it, so that the numbers do not depend on
    /// the passes. [Truncating](Self::truncate) forgets it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn announce(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.blocks.announce(sequence, len)
    }

    /// How many of these tokens [`start`](Self::start) would find.
    pub fn cached(&self, prompt: &[u32]) -> usize {
        self.blocks.cached(&prompt[..prompt.len().saturating_sub(1)])
    }

    /// Bytes of the blocks that a sequence holds in all layers, others' among them where they are shared.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn bytes_of(&self, sequence: SequenceId) -> Result<usize> {
        // No more than the pools have: a table names no block twice.
        Ok(self.blocks.table(sequence)?.len() * self.layout.block_bytes() * self.pools.len())
    }

    /// A new sequence of the same tokens. No memory is copied until one of the two goes on.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.forget();
        self.blocks.fork(sequence)
    }

    /// Forgets all but the first `len` tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] where it has fewer, or is not there.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.forget();
        self.blocks.truncate(sequence, len)
    }

    /// Gives up a sequence. What it began with can be found until its blocks are needed.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        self.forget();
        self.blocks.free(sequence)
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn len(&self, sequence: SequenceId) -> Result<usize> {
        self.blocks.len(sequence)
    }

    /// Whether a sequence has no tokens.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    pub fn is_empty(&self, sequence: SequenceId) -> Result<bool> {
        Ok(self.len(sequence)? == 0)
    }

    /// Begins a pass that adds tokens to sequences, none of which is there twice. A pass that has not ended is
    /// forgotten.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`]; [`Error::ContextLength`] where a sequence would exceed the limit; [`Error::Argument`]
    /// for a sequence that is not there, or is there twice; those of the device. All sequences are then as they were, and
    /// so is what is cached of past ones, unless the device failed.
    pub fn begin(&mut self, sequences: &[(SequenceId, &[u32])]) -> Result<()> {
        self.forget();
        let begun = self.reserve(sequences);
        if begun.is_err() {
            self.forget();
        }
        begun
    }

    fn reserve(&mut self, sequences: &[(SequenceId, &[u32])]) -> Result<()> {
        for (id, tokens) in sequences {
            let position = self.blocks.len(*id)?;
            let total = position.saturating_add(tokens.len());
            if total > self.limit {
                return Err(Error::ContextLength {
                    tokens: total,
                    limit: self.limit,
                });
            }
        }
        let copies = self.blocks.append_all(sequences)?;
        for (id, _) in sequences {
            self.pass.push((*id, self.blocks.len(*id)?));
        }
        let mut pass = Vec::with_capacity(sequences.len());
        for ((id, position), (_, tokens)) in self.pass.iter().zip(sequences) {
            pass.push(PagedSequence {
                table: self.blocks.table(*id)?,
                len: position + tokens.len(),
                queries: tokens.len(),
            });
        }
        self.batch = PagedBatch::new(&pass, self.layout.block_tokens(), &self.device)?;
        for copy in copies {
            self.copy(copy)?;
        }
        Ok(())
    }

    /// Copies a block in all layers.
    fn copy(&self, BlockCopy { from, to }: BlockCopy) -> Result<()> {
        let bytes = self.layout.block_bytes();
        for pool in &self.pools {
            let block = copy_of(pool, from as usize * bytes, bytes)?;
            pool.slice_set(&block, 0, to as usize * bytes)?;
        }
        Ok(())
    }

    /// The sequences of the pass, in the order in which it began with them.
    pub fn pass(&self) -> impl Iterator<Item = PassSequence<'_>> {
        self.pass.iter().filter_map(|(id, position)| {
            Some(PassSequence {
                id: *id,
                position: *position,
                tokens: self.blocks.tokens(*id).ok()?.get(*position..)?,
                table: self.blocks.table(*id).ok()?,
                prompt: self.blocks.prompt(*id).ok()?,
            })
        })
    }

    /// The pass's tokens, as ops over the pools take them.
    pub fn batch(&self) -> &PagedBatch {
        &self.batch
    }

    /// A layer's bytes: of the pass's tokens, once it has written them, as of those before.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that is not there.
    pub fn pool(&self, layer: usize) -> Result<&Tensor> {
        self.pools.get(layer).ok_or_else(|| {
            let expected = format!("below {}, the number of layers", self.pools.len());
            Error::argument(OP, "layer", expected, layer.to_string())
        })
    }

    /// Ends the pass: its tokens are the sequences'.
    pub fn commit(&mut self) {
        for (id, _) in std::mem::take(&mut self.pass) {
            // The pass began with it, and a sequence cannot be freed without ending the pass.
            _ = self.blocks.commit(id);
        }
        self.batch = PagedBatch::default();
    }

    /// Forgets a pass that has not ended: its sequences are as they were before.
    pub fn forget(&mut self) {
        for (id, _) in std::mem::take(&mut self.pass) {
            // As above.
            _ = self.blocks.forget(id);
        }
        self.batch = PagedBatch::default();
    }
}

/// Some bytes of a pool in memory of their own: `Tensor::copy` would take as much as the whole pool.
fn copy_of(pool: &Tensor, start: usize, len: usize) -> candle_core::Result<Tensor> {
    pool.narrow(0, start, len)?.force_contiguous()
}

/// Checks that a device has so many bytes, which tokens of `a_token` bytes are to fill.
///
/// # Errors
/// [`Error::Argument`] where it has fewer.
pub(crate) fn check_memory(bytes: u64, a_token: u64, device: &Device) -> Result<()> {
    #[cfg(target_os = "macos")]
    if let Device::Metal(device) = device {
        return crate::metal::device::check_memory(device, bytes);
    }
    match device {
        Device::Cpu => fits(bytes, a_token, memory::available()),
        _ => Ok(()),
    }
}

fn fits(bytes: u64, a_token: u64, available: Option<u64>) -> Result<()> {
    match available {
        Some(available) if bytes > available => {
            let mib = |bytes: u64| bytes >> 20;
            let tokens = available / a_token.max(1);
            let expected = format!(
                "at most {} MiB, the memory that is available: {tokens} tokens",
                mib(available)
            );
            let found = format!("{} MiB; take a smaller cache or a smaller format", mib(bytes));
            Err(Error::argument(OP, "size", expected, found))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod operations;

#[cfg(test)]
mod tests;
