//! A cache of many sequences in blocks of one pool a layer.

use super::memory::zeros;
use crate::cpu::PagedSequence;
use crate::kv::{BlockCopy, BlockStatistics, Blocks, RowLayout, SequenceId};
use crate::ops::PagedBatch;
use crate::{Error, Result, memory};
use candle_core::{DType, Device, Tensor};
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
#[derive(Debug, Clone, Copy)]
pub struct PassSequence<'a> {
    /// Which one.
    pub id: SequenceId,
    /// The position of its first new token.
    pub position: usize,
    /// Its new tokens.
    pub tokens: &'a [u32],
    /// The blocks of all its tokens.
    pub table: &'a [u32],
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
    /// sequence began alike: whole blocks, and never the last token, whose output nobody has kept.
    pub fn start(&mut self, prompt: &[u32]) -> (SequenceId, usize) {
        let all_but_last = prompt.len().saturating_sub(1);
        self.blocks.start(&prompt[..all_but_last])
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
mod tests {
    use super::*;
    use crate::kv::{CacheFormat, codec};
    use crate::ops::AppendHeads;

    /// A cache of two layers for rows of two numbers.
    struct Tested {
        cache: PagedKvCache,
        op: AppendHeads,
    }

    impl Tested {
        fn new(tokens: usize) -> Self {
            let op = AppendHeads::new(RowLayout::heads(CacheFormat::F16, 1, 1, 1).unwrap()).unwrap();
            let layout = op.layout().clone();
            let cache = PagedKvCache::new(2, layout, CacheSize::Tokens(tokens), 100, &Device::Cpu).unwrap();
            Self { cache, op }
        }

        /// Writes a layer: of each token its position and itself, plus the layer.
        fn write(&self, layer: usize) {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for sequence in self.cache.pass() {
                for (i, token) in sequence.tokens.iter().enumerate() {
                    keys.push((sequence.position + i + layer) as f32);
                    values.push(*token as f32 + layer as f32);
                }
            }
            let shape = (keys.len(), 1, 1);
            let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            let pool = self.cache.pool(layer).unwrap();
            self.op
                .forward(pool, &tensor(keys), &tensor(values), self.cache.batch())
                .unwrap();
        }

        fn add(&mut self, sequences: &[(SequenceId, &[u32])]) -> Result<()> {
            self.cache.begin(sequences)?;
            (0..2).for_each(|layer| self.write(layer));
            self.cache.commit();
            Ok(())
        }

        fn assert_holds(&self, id: SequenceId, tokens: &[u32]) {
            assert_eq!(self.cache.len(id).unwrap(), tokens.len());
            let table = self.cache.blocks.table(id).unwrap();
            for layer in 0..2 {
                let pool = self.cache.pool(layer).unwrap().to_vec1::<u8>().unwrap();
                for (i, token) in tokens.iter().enumerate() {
                    let mut row = [0.0; 2];
                    let slot = table[i / 16] * 16 + i as u32 % 16;
                    codec::read(self.op.layout(), &pool, slot, &mut row).unwrap();
                    assert_eq!(row, [(i + layer) as f32, *token as f32 + layer as f32]);
                }
            }
        }
    }

    #[test]
    fn kv_sequences_of_different_lengths_pass_together() {
        let mut tested = Tested::new(160);
        let (a, _) = tested.cache.start(&[]);
        let (b, _) = tested.cache.start(&[]);
        let tokens: Vec<u32> = (100..140).collect();
        tested.add(&[(a, &tokens[..20]), (b, &[7, 8, 9])]).unwrap();
        tested.add(&[(b, &[10]), (a, &tokens[20..])]).unwrap();
        tested.assert_holds(a, &tokens);
        tested.assert_holds(b, &[7, 8, 9, 10]);
        let fork = tested.cache.fork(a).unwrap();
        tested.add(&[(fork, &[1]), (a, &[2])]).unwrap();
        tested.assert_holds(fork, &[&tokens[..], &[1]].concat());
        tested.assert_holds(a, &[&tokens[..], &[2]].concat());
        tested.cache.truncate(a, 5).unwrap();
        tested.add(&[(a, &[3])]).unwrap();
        tested.assert_holds(a, &[&tokens[..5], &[3]].concat());
        tested.assert_holds(fork, &[&tokens[..], &[1]].concat());
        let (c, cached) = tested.cache.start(&tokens);
        assert_eq!(cached, 32);
        tested.assert_holds(c, &tokens[..32]);
        // Of a prompt of whole blocks the last one is computed again, for the last token's sake.
        assert_eq!(tested.cache.start(&tokens[..32]).1, 16);
        // In a pass both of a fork get a copy: if it fails, what they shared is still there.
        assert_eq!(tested.cache.statistics().copies, 3);
    }

    #[test]
    fn kv_a_copied_block_takes_no_more_than_its_own_memory() {
        let pool = Tensor::from_iter(0..96u8, &Device::Cpu).unwrap();
        let block = copy_of(&pool, 32, 16).unwrap();
        let (storage, _) = block.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cpu(candle_core::CpuStorage::U8(bytes)) => {
                assert_eq!(bytes, &(32..48).collect::<Vec<u8>>());
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn kv_a_failed_pass_leaves_all_sequences_as_they_were() {
        let mut tested = Tested::new(64);
        let (a, _) = tested.cache.start(&[]);
        tested.add(&[(a, &[1, 2, 3])]).unwrap();
        let fork = tested.cache.fork(a).unwrap();
        let before = tested.cache.statistics();
        let many = [5u32; 70];
        // The first of them has its blocks, a copy among them, when the second fails.
        let failures: [&[(SequenceId, &[u32])]; 3] = [
            &[(a, &[4]), (fork, &many)],
            &[(a, &[4]), (a, &[5])],
            &[(a, &many[..64]), (fork, &many[..60])],
        ];
        for failure in failures {
            assert!(tested.cache.begin(failure).is_err());
            assert!(tested.cache.batch().slots().is_empty() && tested.cache.pass().next().is_none());
            assert_eq!(tested.cache.statistics().used, before.used);
        }
        // Nor is what is cached given up for the first of them.
        let (past, _) = tested.cache.start(&[]);
        tested.add(&[(past, &many[..16])]).unwrap();
        tested.cache.free(past).unwrap();
        let evictions = tested.cache.statistics().evictions;
        assert!(
            tested
                .cache
                .begin(&[(a, &many[..45]), (fork, &many[..50])])
                .is_err()
        );
        assert_eq!(tested.cache.cached(&many[..17]), 16);
        assert_eq!(tested.cache.statistics().evictions, evictions);
        // One that fails between the layers.
        tested.cache.begin(&[(a, &[4, 5])]).unwrap();
        tested.write(0);
        tested.cache.begin(&[(a, &[6])]).unwrap();
        (0..2).for_each(|layer| tested.write(layer));
        tested.cache.commit();
        tested.assert_holds(a, &[1, 2, 3, 6]);
        tested.assert_holds(fork, &[1, 2, 3]);
        // Nothing to end.
        tested.cache.commit();
        tested.assert_holds(a, &[1, 2, 3, 6]);
        let error = tested.cache.begin(&[(a, &[0; 97])]).unwrap_err();
        assert!(matches!(
            error,
            Error::ContextLength {
                tokens: 101,
                limit: 100
            }
        ));
        tested.cache.free(a).unwrap();
        tested.cache.free(fork).unwrap();
        assert_eq!(tested.cache.statistics().used, 0);
        assert!(tested.cache.len(a).is_err() && tested.cache.pool(2).is_err());
    }

    #[test]
    fn kv_sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("1.5g", 3 << 29),
            ("64K", 64 << 10),
            ("1T", 1 << 40),
            ("99999999999T", u64::MAX),
        ] {
            assert_eq!(
                text.parse::<CacheSize>().unwrap(),
                CacheSize::Bytes(bytes),
                "{text}"
            );
        }
        for text in [
            "", "G", "-1", "+1", "1e9", "inf", "2GB", "2 G", "1.2.3", "0x10", "1µ", "ä",
        ] {
            let error = text.parse::<CacheSize>().unwrap_err().to_string();
            assert!(
                error.contains("512M") && error.contains(&format!("`{text}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn kv_a_cache_is_as_large_as_was_said_and_no_larger_than_the_machine() {
        let layout = RowLayout::latent(CacheFormat::fp4(), 512, 64).unwrap();
        let new = |size| PagedKvCache::new(3, layout.clone(), size, 1000, &Device::Cpu);
        assert_eq!(new(CacheSize::Tokens(17)).unwrap().size_in_bytes(), 3 * 32 * 416);
        let bytes = 3 * 16 * 416;
        assert_eq!(
            new(CacheSize::Bytes(2 * bytes + 1)).unwrap().size_in_bytes() as u64,
            2 * bytes
        );
        for size in [CacheSize::Tokens(0), CacheSize::Bytes(bytes - 1)] {
            assert!(new(size).unwrap_err().to_string().contains("a block at least"));
        }
        for size in [
            CacheSize::Tokens(usize::MAX),
            CacheSize::Tokens(1 << 40),
            CacheSize::Bytes(u64::MAX),
        ] {
            assert!(new(size).is_err());
        }
        fits(1 << 30, 416, Some(1 << 30)).unwrap();
        fits(1 << 30, 416, None).unwrap();
        let error = fits(3 << 30, 1024, Some(2 << 30)).unwrap_err().to_string();
        for part in ["2048 MiB", "3072 MiB", "2097152 tokens"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
