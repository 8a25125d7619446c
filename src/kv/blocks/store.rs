//! Blocks by holders and by contents.

use super::BlockStatistics;
use std::collections::{BTreeMap, HashMap};

/// The contents before the first block: nothing.
pub(super) const ROOT: u64 = 0;

/// What a block holds: its own tokens, after certain contents.
///
/// Contents are numbered, each anew and once, so that a number stands for all tokens from the first on; blocks are
/// found by the hash of this and compared with it, token by token: a collision of hashes cannot make two of them the
/// same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Contents {
    parent: u64,
    tokens: Box<[u32]>,
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that hold it, and passes that still hold what they have replaced.
    holders: u32,
    /// What it holds, and the number of that, where it is full and known.
    known: Option<(Contents, u64)>,
    /// When it was given up last.
    stamp: u64,
}

/// The blocks of a pool; it knows nothing of sequences.
#[derive(Debug)]
pub(super) struct Store {
    blocks: Vec<Block>,
    /// Blocks that hold nothing.
    empty: Vec<u32>,
    /// Blocks that nobody holds and that are known, by the time they were given up.
    reusable: BTreeMap<u64, u32>,
    by_contents: HashMap<Contents, u32>,
    clock: u64,
    contents: u64,
    evictions: u64,
}

impl Store {
    /// Blocks that hold nothing.
    pub fn new(blocks: u32) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            // The first is taken first.
            empty: (0..blocks).rev().collect(),
            reusable: BTreeMap::new(),
            by_contents: HashMap::new(),
            clock: 0,
            contents: ROOT,
            evictions: 0,
        }
    }

    fn block(&mut self, block: u32) -> &mut Block {
        &mut self.blocks[block as usize]
    }

    /// Blocks that can be taken.
    pub fn available(&self) -> usize {
        self.empty.len() + self.reusable.len()
    }

    /// How blocks are used; what sequences did is not known here.
    pub fn statistics(&self) -> BlockStatistics {
        let total = self.blocks.len();
        BlockStatistics {
            total,
            used: total - self.available(),
            free: self.available(),
            cached: self.reusable.len(),
            shared: self.blocks.iter().filter(|block| block.holders > 1).count(),
            evictions: self.evictions,
            ..BlockStatistics::default()
        }
    }

    /// The block that holds these contents.
    pub fn lookup(&self, parent: u64, tokens: &[u32]) -> Option<u32> {
        let contents = Contents {
            parent,
            tokens: tokens.into(),
        };
        self.by_contents.get(&contents).copied()
    }

    /// The number of a block's contents, where they are known.
    pub fn content(&self, block: u32) -> Option<u64> {
        self.blocks[block as usize]
            .known
            .as_ref()
            .map(|(_, number)| *number)
    }

    /// Whether it has a single holder.
    pub fn held_once(&self, block: u32) -> bool {
        self.blocks[block as usize].holders == 1
    }

    /// Whether the one who holds it may write to it.
    pub fn is_own(&self, block: u32) -> bool {
        self.held_once(block) && self.content(block).is_none()
    }

    /// An empty block, or that of the cached ones that was given up longest ago; its first holder is the caller.
    pub fn take(&mut self) -> Option<u32> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.reusable.pop_first()?;
                self.forget_contents(block);
                self.evictions += 1;
                block
            }
        };
        self.block(block).holders = 1;
        Some(block)
    }

    /// Adds a holder.
    pub fn hold(&mut self, block: u32) {
        let entry = self.block(block);
        entry.holders += 1;
        if entry.holders == 1 {
            let stamp = entry.stamp;
            self.reusable.remove(&stamp);
        }
    }

    /// Takes a holder away; what nobody holds can be taken by others.
    pub fn release(&mut self, block: u32) {
        self.clock += 1;
        let clock = self.clock;
        let entry = self.block(block);
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        entry.stamp = clock;
        match entry.known {
            Some(_) => _ = self.reusable.insert(clock, block),
            None => self.empty.push(block),
        }
    }

    /// Releases the last of these blocks and takes it off.
    pub fn release_last(&mut self, blocks: &mut Vec<u32>) {
        if let Some(block) = blocks.pop() {
            self.release(block);
        }
    }

    /// Makes a block one of unknown contents.
    pub fn forget_contents(&mut self, block: u32) {
        if let Some((contents, _)) = self.block(block).known.take() {
            self.by_contents.remove(&contents);
        }
    }

    /// Makes a full block known; gives the block that holds these contents: this one, or one that did already, which
    /// is held in its place.
    pub fn publish(&mut self, parent: u64, tokens: &[u32], block: u32) -> u32 {
        if let Some(known) = self.lookup(parent, tokens) {
            if known != block {
                self.hold(known);
                self.release(block);
            }
            return known;
        }
        self.contents += 1;
        let contents = Contents {
            parent,
            tokens: tokens.into(),
        };
        let number = self.contents;
        self.by_contents.insert(contents.clone(), block);
        self.block(block).known = Some((contents, number));
        block
    }
}
