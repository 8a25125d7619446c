//! Which blocks of a pool are whose: sequences of tokens in fixed-size blocks, shared where they begin alike.

mod store;
#[cfg(test)]
mod tests;

use crate::{Error, Result};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use store::{ROOT, Store};

const OP: &str = "kv-cache blocks";

/// A sequence of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

impl SequenceId {
    /// A name that its user has not given yet.
    pub(crate) const fn new(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A block whose bytes have to be copied to another one before a pass writes to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// The block, which others read as well.
    pub from: u32,
    /// The sequence's own from now on.
    pub to: u32,
}

/// How the blocks of a pool are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockStatistics {
    /// All blocks.
    pub total: usize,
    /// Those that sequences hold, each counted once.
    pub used: usize,
    /// Those that sequences can still take: empty ones and cached ones.
    pub free: usize,
    /// Of the free ones, those that still hold the beginning of some sequence of the past.
    pub cached: usize,
    /// Of the used ones, those that several sequences hold.
    pub shared: usize,
    /// Tokens that sequences found in the cache when they started.
    pub hits: u64,
    /// Tokens that sequences were started with.
    pub lookups: u64,
    /// Cached blocks given up for others.
    pub evictions: u64,
    /// Blocks copied because a sequence went on in one that it did not have for itself.
    pub copies: u64,
}

/// The blocks of a pool, and the sequences they belong to.
///
/// A sequence holds its tokens in blocks of a fixed size, in the order of its table; all layers of a model use the
/// same tables. A pass *appends* its tokens, which gives it blocks to write to, and *commits* them, or
/// [forgets](Self::forget) them. Full blocks are known by their contents from then on, that is by their tokens and
/// all those before: who [starts](Self::start) with the same tokens shares them. Nobody writes to a block that
/// someone else may read: a sequence that goes on in such a block is given a copy. What no sequence holds any more
/// stays known until its block is needed, those used longest ago first.
///
/// ```
/// use candle_mmfp4::kv::Blocks;
///
/// let mut blocks = Blocks::new(8, 4)?;
/// let (first, cached) = blocks.start(&[1, 2, 3, 4, 5]);
/// assert_eq!(cached, 0);
/// blocks.append(first, &[1, 2, 3, 4, 5])?;
/// blocks.commit(first)?;
///
/// let (second, cached) = blocks.start(&[1, 2, 3, 4, 9]);
/// assert_eq!(cached, 4); // its first block is the first sequence's
/// blocks.append(second, &[9])?;
/// blocks.commit(second)?;
/// assert_eq!(blocks.table(first)?[0], blocks.table(second)?[0]);
/// assert_eq!(blocks.statistics().used, 3);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct Blocks {
    tokens_per_block: usize,
    store: Store,
    sequences: HashMap<SequenceId, Sequence>,
    next: u64,
    hits: u64,
    lookups: u64,
    copies: u64,
}

#[derive(Debug, Default)]
struct Sequence {
    /// Tokens that passes have written, and after them those of a pass that has not ended.
    tokens: Vec<u32>,
    /// How many of them passes have written.
    len: usize,
    blocks: Vec<u32>,
    /// The block that an unended pass has replaced by its own copy, still held.
    replaced: Option<u32>,
    /// Where the prompt that was announced begins and ends.
    prompt: Range<usize>,
}

/// What a pass takes for a sequence.
struct Need {
    /// Blocks behind those that it has.
    new: usize,
    /// The last block, if the pass begins within it and others may read it, and whether these are the cache alone.
    foreign: Option<(u32, bool)>,
}

impl Need {
    /// Blocks without which there is no pass: what only the cache shares need not be copied.
    fn least(&self) -> usize {
        let copied = self.foreign.is_some_and(|(_, only_cached)| !only_cached);
        self.new.saturating_add(usize::from(copied))
    }
}

impl Blocks {
    /// A pool of so many blocks, all empty.
    ///
    /// # Errors
    /// [`Error::Argument`] for no block, no tokens in one, or more slots than a u32 tells apart.
    pub fn new(blocks: usize, tokens_per_block: usize) -> Result<Self> {
        if tokens_per_block == 0 {
            return Err(Error::argument(OP, "tokens_per_block", "at least 1", "0"));
        }
        let most = u32::MAX as usize / tokens_per_block;
        if blocks == 0 || blocks > most {
            let expected = format!("1 to {most} blocks of {tokens_per_block} tokens");
            return Err(Error::argument(OP, "blocks", expected, blocks.to_string()));
        }
        Ok(Self {
            tokens_per_block,
            store: Store::new(blocks as u32),
            sequences: HashMap::new(),
            next: 0,
            hits: 0,
            lookups: 0,
            copies: 0,
        })
    }

    /// Tokens of a block.
    pub fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }

    /// How many of these tokens, the beginning of a sequence, are cached: whole blocks.
    pub fn cached(&self, tokens: &[u32]) -> usize {
        self.known(tokens).count() * self.tokens_per_block
    }

    /// The blocks that hold the beginning of these tokens.
    fn known<'a>(&'a self, tokens: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        let mut parent = ROOT;
        tokens
            .chunks_exact(self.tokens_per_block)
            .map_while(move |tokens| {
                let block = self.store.lookup(parent, tokens)?;
                parent = self.store.content(block)?;
                Some(block)
            })
    }

    /// A new sequence; it holds as much of the beginning of `tokens` as is cached, which is told: the rest is to be
    /// appended. Who needs the last token's output passes all tokens but the last.
    pub fn start(&mut self, tokens: &[u32]) -> (SequenceId, usize) {
        let blocks: Vec<_> = self.known(tokens).collect();
        blocks.iter().for_each(|block| self.store.hold(*block));
        let len = blocks.len() * self.tokens_per_block;
        self.hits += len as u64;
        self.lookups += tokens.len() as u64;
        let sequence = Sequence {
            tokens: tokens[..len].to_vec(),
            len,
            blocks,
            ..Sequence::default()
        };
        (self.add(sequence), len)
    }

    fn add(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// Gives a pass that adds these tokens to a sequence blocks to write to. An unended pass of the sequence is
    /// forgotten.
    ///
    /// The copy, if there is one, is to be made before the pass writes: the sequence went on in a block that it
    /// shares.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], and [`Error::Argument`] for a sequence that is not there; all is then as it was.
    pub fn append(&mut self, id: SequenceId, tokens: &[u32]) -> Result<Option<BlockCopy>> {
        Ok(self.append_all(&[(id, tokens)])?.pop())
    }

    /// As [`append`](Self::append) for several sequences, all of them or none: where there are too few blocks, nothing
    /// cached is given up.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`Error::Argument`] for a sequence that is there twice.
    pub fn append_all(&mut self, sequences: &[(SequenceId, &[u32])]) -> Result<Vec<BlockCopy>> {
        for (index, (id, _)) in sequences.iter().enumerate() {
            if sequences[..index].iter().any(|(other, _)| other == id) {
                let found = format!("sequence {id} twice");
                return Err(Error::argument(OP, "sequences", "each of them once", found));
            }
            self.find(*id)?;
        }
        for (id, _) in sequences {
            self.forget(*id)?;
        }
        let mut needs = Vec::with_capacity(sequences.len());
        for (id, tokens) in sequences {
            needs.push(self.need(*id, tokens.len())?);
        }
        let needed = needs.iter().map(Need::least).fold(0, usize::saturating_add);
        let free = self.store.available();
        if needed > free {
            return Err(Error::OutOfBlocks {
                needed,
                free,
                total: self.store.statistics().total,
                tokens_per_block: self.tokens_per_block,
            });
        }
        let (mut spare, mut copies) = (free - needed, Vec::new());
        for ((id, tokens), need) in sequences.iter().zip(needs) {
            let copied = match need.foreign {
                // Only the cache shares it, and there is no room for a copy: its contents are given up.
                Some((block, true)) if spare == 0 => {
                    self.store.forget_contents(block);
                    None
                }
                Some((block, only_cached)) => {
                    spare -= usize::from(only_cached);
                    Some(block)
                }
                None => None,
            };
            let store = &mut self.store;
            let mut take = || {
                store.take().ok_or_else(|| {
                    Error::argument(OP, "blocks", "as many free blocks as were counted", "fewer")
                })
            };
            let sequence = find_mut(&mut self.sequences, *id)?;
            if let Some(from) = copied {
                let to = take()?;
                sequence.replaced = sequence.blocks.pop();
                sequence.blocks.push(to);
                copies.push(BlockCopy { from, to });
            }
            for _ in 0..need.new {
                sequence.blocks.push(take()?);
            }
            sequence.tokens.extend_from_slice(tokens);
        }
        self.copies += copies.len() as u64;
        Ok(copies)
    }

    /// What a pass of so many tokens takes for a sequence.
    fn need(&self, id: SequenceId, tokens: usize) -> Result<Need> {
        let (sequence, size) = (self.find(id)?, self.tokens_per_block);
        let last = sequence.blocks.last().copied();
        let within = tokens > 0 && !sequence.len.is_multiple_of(size);
        let foreign = last.filter(|block| within && !self.store.is_own(*block));
        Ok(Need {
            new: sequence.len.saturating_add(tokens).div_ceil(size) - sequence.blocks.len(),
            foreign: foreign.map(|block| (block, self.store.held_once(block))),
        })
    }

    /// Ends a pass: its tokens are the sequence's. Blocks that it has filled are known by their contents from now on;
    /// one whose contents another block has already is given up for that, so that tables may change here.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn commit(&mut self, id: SequenceId) -> Result<()> {
        let size = self.tokens_per_block;
        let sequence = find_mut(&mut self.sequences, id)?;
        let filled = sequence.len / size..sequence.tokens.len() / size;
        for index in filled {
            let parent = match index.checked_sub(1) {
                None => Some(ROOT),
                Some(before) => self.store.content(sequence.blocks[before]),
            };
            // Blocks before this one are full, and therefore known.
            let Some(parent) = parent else { break };
            let tokens = &sequence.tokens[index * size..(index + 1) * size];
            let block = &mut sequence.blocks[index];
            *block = self.store.publish(parent, tokens, *block);
        }
        sequence.len = sequence.tokens.len();
        if let Some(block) = sequence.replaced.take() {
            self.store.release(block);
        }
        Ok(())
    }

    /// Forgets an unended pass: the sequence is as it was before.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn forget(&mut self, id: SequenceId) -> Result<()> {
        let len = find_mut(&mut self.sequences, id)?.len;
        self.cut(id, len)
    }

    /// Says that what a sequence goes on with, up to `len` tokens in all, is one prompt, in however many passes it comes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn announce(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let sequence = find_mut(&mut self.sequences, id)?;
        sequence.prompt = sequence.len..len;
        Ok(())
    }

    /// From where to where the prompt reaches that the sequence's next token is a part of; `None` where none was announced,
    /// the sequence has all of it, or it is a single token, which comes in one pass.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn prompt(&self, id: SequenceId) -> Result<Option<Range<usize>>> {
        let sequence = self.find(id)?;
        let prompt = Some(sequence.prompt.clone());
        Ok(prompt.filter(|prompt| prompt.len() > 1 && prompt.contains(&sequence.len)))
    }

    /// Forgets all but the first `len` tokens, an unended pass, and what was [announced](Self::announce).
    ///
    /// # Errors
    /// [`Error::Argument`] where the sequence has fewer, or is not there.
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let held = self.len(id)?;
        if len > held {
            let expected = format!("at most {held}, the tokens cached");
            return Err(Error::argument("truncate", "len", expected, len.to_string()));
        }
        self.cut(id, len)?;
        self.announce(id, len)
    }

    fn cut(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let sequence = find_mut(&mut self.sequences, id)?;
        let before = sequence.len.div_ceil(self.tokens_per_block);
        let kept = len.div_ceil(self.tokens_per_block);
        // The last first: what follows from a block is given up before the block is.
        while sequence.blocks.len() > before {
            self.store.release_last(&mut sequence.blocks);
        }
        if let Some(block) = sequence.replaced.take() {
            self.store.release_last(&mut sequence.blocks);
            sequence.blocks.push(block);
        }
        while sequence.blocks.len() > kept {
            self.store.release_last(&mut sequence.blocks);
        }
        sequence.tokens.truncate(len);
        sequence.len = len;
        Ok(())
    }

    /// A new sequence of the same tokens, which shares all blocks, and is amid the same prompt. An unended pass is forgotten.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        self.forget(id)?;
        let sequence = find_mut(&mut self.sequences, id)?;
        let fork = Sequence {
            tokens: sequence.tokens.clone(),
            len: sequence.len,
            blocks: sequence.blocks.clone(),
            replaced: None,
            prompt: sequence.prompt.clone(),
        };
        fork.blocks.iter().for_each(|block| self.store.hold(*block));
        Ok(self.add(fork))
    }

    /// Gives up a sequence. Its full blocks stay known until their room is needed.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.cut(id, 0)?;
        self.sequences.remove(&id);
        Ok(())
    }

    /// The sequence's blocks, an unended pass's among them: token `i` is in the slot
    /// `table[i / tokens_per_block] · tokens_per_block + i % tokens_per_block`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn table(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.find(id)?.blocks)
    }

    /// Tokens that passes have written to a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        Ok(self.find(id)?.len)
    }

    /// Tokens of a sequence, an unended pass's among them.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn tokens(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.find(id)?.tokens)
    }

    /// The slots that a sequence's unended pass writes to, in the order of its tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn slots(&self, id: SequenceId) -> Result<impl Iterator<Item = u32> + '_> {
        let (sequence, size) = (self.find(id)?, self.tokens_per_block);
        // Below 2^32: the pool has no more slots.
        let slot = move |i: usize| sequence.blocks[i / size] * size as u32 + (i % size) as u32;
        Ok((sequence.len..sequence.tokens.len()).map(slot))
    }

    /// How the blocks are used.
    pub fn statistics(&self) -> BlockStatistics {
        BlockStatistics {
            hits: self.hits,
            lookups: self.lookups,
            copies: self.copies,
            ..self.store.statistics()
        }
    }

    fn find(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or_else(|| missing(id))
    }
}

fn find_mut(sequences: &mut HashMap<SequenceId, Sequence>, id: SequenceId) -> Result<&mut Sequence> {
    sequences.get_mut(&id).ok_or_else(|| missing(id))
}

fn missing(id: SequenceId) -> Error {
    Error::argument(
        OP,
        "sequence",
        "one that was started and not freed",
        id.to_string(),
    )
}
