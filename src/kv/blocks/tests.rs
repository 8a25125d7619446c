use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// What a model would store for a token: it depends on all tokens before it.
fn rows(tokens: &[u32]) -> Vec<u64> {
    let mut state = 1u64;
    let next = |token: &u32| {
        state = (state ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        state
    };
    tokens.iter().map(next).collect()
}

/// A cache with its rows, beside the plain model of it: the tokens of each sequence.
struct Pool {
    blocks: Blocks,
    rows: Vec<u64>,
    plain: HashMap<SequenceId, Vec<u32>>,
}

impl Pool {
    fn new(blocks: usize, size: usize) -> Self {
        Self {
            blocks: Blocks::new(blocks, size).unwrap(),
            rows: vec![0; blocks * size],
            plain: HashMap::new(),
        }
    }

    fn ids(&self) -> Vec<SequenceId> {
        let mut ids: Vec<_> = self.plain.keys().copied().collect();
        ids.sort();
        ids
    }

    fn start(&mut self, tokens: &[u32]) -> SequenceId {
        let expected = self.blocks.cached(tokens);
        let (id, cached) = self.blocks.start(tokens);
        assert_eq!(cached, expected);
        self.plain.insert(id, tokens[..cached].to_vec());
        id
    }

    /// A pass as far as its rows are written; whether it got its blocks.
    fn write(&mut self, id: SequenceId, tokens: &[u32]) -> bool {
        let statistics = self.blocks.statistics();
        let size = self.blocks.tokens_per_block();
        let copy = match self.blocks.append(id, tokens) {
            Ok(copy) => copy,
            Err(Error::OutOfBlocks { needed, free, .. }) => {
                // It has forgotten an unended pass, and nothing else.
                assert!(needed > free && free >= statistics.free);
                assert_eq!(self.blocks.tokens(id).unwrap(), self.plain[&id]);
                return false;
            }
            Err(other) => panic!("{other}"),
        };
        if let Some(BlockCopy { from, to }) = copy {
            let (from, to) = (from as usize * size, to as usize * size);
            self.rows.copy_within(from..from + size, to);
        }
        let all = self.blocks.tokens(id).unwrap();
        let new = rows(all).split_off(self.plain[&id].len());
        assert_eq!(new.len(), tokens.len());
        for (slot, row) in self.blocks.slots(id).unwrap().zip(new) {
            self.rows[slot as usize] = row;
        }
        true
    }

    fn append(&mut self, id: SequenceId, tokens: &[u32]) -> bool {
        if !self.write(id, tokens) {
            return false;
        }
        self.blocks.commit(id).unwrap();
        self.plain.get_mut(&id).unwrap().extend_from_slice(tokens);
        true
    }

    fn fork(&mut self, id: SequenceId) -> SequenceId {
        let fork = self.blocks.fork(id).unwrap();
        self.plain.insert(fork, self.plain[&id].clone());
        fork
    }

    fn truncate(&mut self, id: SequenceId, len: usize) {
        self.blocks.truncate(id, len).unwrap();
        self.plain.get_mut(&id).unwrap().truncate(len);
    }

    fn free(&mut self, id: SequenceId) {
        self.blocks.free(id).unwrap();
        self.plain.remove(&id);
    }

    /// Every sequence reads what it wrote, and the blocks add up.
    fn check(&self) {
        let size = self.blocks.tokens_per_block();
        let mut held = std::collections::HashSet::new();
        for (id, tokens) in &self.plain {
            let table = self.blocks.table(*id).unwrap();
            assert_eq!(self.blocks.len(*id).unwrap(), tokens.len());
            for (i, row) in rows(tokens).into_iter().enumerate() {
                let slot = table[i / size] as usize * size + i % size;
                assert_eq!(self.rows[slot], row, "token {i} of {id}");
            }
            held.extend(table.iter().copied());
            let twice = table.iter().collect::<std::collections::HashSet<_>>();
            assert_eq!(twice.len(), table.len(), "a block twice in a table");
        }
        let statistics = self.blocks.statistics();
        assert_eq!(statistics.used, held.len());
        assert_eq!(statistics.used + statistics.free, statistics.total);
        assert!(statistics.cached <= statistics.free && statistics.shared <= statistics.used);
    }
}

/// Numbers that a test makes an operation of.
type Operation = (u8, u8, Vec<u32>);

/// Few tokens, so that sequences begin alike often.
fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let tokens = prop::collection::vec(0u32..2, 0..20);
    prop::collection::vec((0u8..16, any::<u8>(), tokens), 500)
}

fn run(operations: &[Operation], blocks: usize, size: usize) -> Pool {
    let mut pool = Pool::new(blocks, size);
    for (kind, choice, tokens) in operations {
        let ids = pool.ids();
        let Some(id) = ids.get(usize::from(*choice) % ids.len().max(1)).copied() else {
            let id = pool.start(tokens);
            pool.append(id, tokens);
            continue;
        };
        match kind {
            0 | 1 => {
                let id = pool.start(tokens);
                let rest = tokens[pool.plain[&id].len()..].to_vec();
                pool.append(id, &rest);
            }
            2..=7 => _ = pool.append(id, tokens),
            8 => {
                // A pass that fails after it has written.
                if pool.write(id, tokens) {
                    pool.blocks.forget(id).unwrap();
                }
            }
            // One that fails and is not even forgotten before something else happens.
            9 => _ = pool.write(id, tokens),
            10 | 11 => {
                let len = pool.plain[&id].len();
                pool.truncate(id, usize::from(*choice) % (len + 1));
            }
            12 => {
                pool.blocks.forget(id).unwrap();
                pool.fork(id);
            }
            _ => pool.free(id),
        }
        if *kind != 9 {
            // An unended pass holds blocks that the plain model knows nothing of.
            ids.iter().for_each(|id| _ = pool.blocks.forget(*id));
            pool.check();
        }
    }
    pool
}

proptest! {
    // 200 times 500: 100,000 operations.
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn kv_blocks_neither_leak_nor_alias(
        operations in operations(),
        blocks in 1usize..40,
        size in 1usize..6,
    ) {
        let mut pool = run(&operations, blocks, size);
        for id in pool.ids() {
            pool.free(id);
        }
        let statistics = pool.blocks.statistics();
        prop_assert_eq!((statistics.used, statistics.free, statistics.shared), (0, blocks, 0));
        // All of the pool can be had again: nothing cached stands in the way.
        let id = pool.start(&[]);
        prop_assert!(pool.append(id, &vec![7; blocks * size]));
        pool.check();
        pool.free(id);
        prop_assert!(!pool.blocks.sequences.contains_key(&id));
    }
}

/// The operations above do what they are for: blocks are shared, found again, copied and given up.
#[test]
fn kv_random_operations_reach_every_case() {
    let mut random = crate::random::Random::new(3);
    let operations: Vec<Operation> = (0..20_000)
        .map(|_| {
            let tokens = (0..random.below(20)).map(|_| random.below(2) as u32).collect();
            (random.below(16) as u8, random.below(256) as u8, tokens)
        })
        .collect();
    let pool = run(&operations, 32, 4);
    let statistics = pool.blocks.statistics();
    assert!(
        statistics.hits > 1000 && statistics.lookups > statistics.hits,
        "{statistics:?}"
    );
    assert!(
        statistics.evictions > 100 && statistics.copies > 100,
        "{statistics:?}"
    );
}

#[test]
fn kv_a_prefix_is_found_block_by_block() {
    let mut pool = Pool::new(16, 4);
    let first = pool.start(&[]);
    pool.append(first, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(pool.blocks.cached(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]), 8);
    assert_eq!(pool.blocks.cached(&[1, 2, 3]), 0);
    // The same tokens after others are not the same rows.
    assert_eq!(pool.blocks.cached(&[5, 6, 7, 8]), 0);
    assert_eq!(pool.blocks.cached(&[1, 2, 3, 4, 5, 6, 7, 9]), 4);
    // Still there when nobody holds them, and given up from the end.
    pool.free(first);
    assert_eq!(pool.blocks.statistics().cached, 2);
    let other = pool.start(&[]);
    pool.append(other, &[0; 15 * 4]);
    assert_eq!(pool.blocks.cached(&[1, 2, 3, 4, 5, 6, 7, 8]), 4);
    let again = pool.start(&[1, 2, 3, 4, 5]);
    assert_eq!(pool.blocks.len(again).unwrap(), 4);
    pool.check();
}

#[test]
fn kv_the_same_tokens_computed_twice_are_kept_once() {
    let mut pool = Pool::new(16, 4);
    let ids = [(); 3].map(|()| pool.start(&[]));
    for id in ids {
        pool.append(id, &[1, 2, 3]);
    }
    assert_eq!(pool.blocks.statistics().used, 3);
    for id in ids {
        pool.append(id, &[4, 5]);
    }
    let statistics = pool.blocks.statistics();
    assert_eq!((statistics.used, statistics.shared), (4, 1));
    pool.check();
}

#[test]
fn kv_who_goes_on_in_a_shared_block_gets_a_copy() {
    let mut pool = Pool::new(8, 4);
    let first = pool.start(&[]);
    pool.append(first, &[1, 2]);
    let fork = pool.fork(first);
    assert_eq!(
        pool.blocks.table(first).unwrap(),
        pool.blocks.table(fork).unwrap()
    );
    pool.append(fork, &[3]);
    pool.append(first, &[4]);
    pool.check();
    let statistics = pool.blocks.statistics();
    assert_eq!((statistics.copies, statistics.used, statistics.shared), (1, 2, 0));
    // A failed pass of a fork gives the shared block back.
    let fork = pool.fork(first);
    let shared = pool.blocks.table(first).unwrap().to_vec();
    assert!(pool.write(fork, &[9, 9, 9]));
    assert_ne!(pool.blocks.table(fork).unwrap()[0], shared[0]);
    pool.blocks.forget(fork).unwrap();
    assert_eq!(pool.blocks.table(fork).unwrap(), shared);
    assert_eq!(pool.blocks.statistics().used, 2);
    pool.check();
}

#[test]
fn kv_a_full_pool_can_still_be_rewritten_from_the_middle_of_a_block() {
    let mut pool = Pool::new(2, 4);
    let id = pool.start(&[]);
    pool.append(id, &[1, 2, 3, 4, 5, 6, 7, 8]);
    pool.truncate(id, 6);
    // The second block is known; a copy of it would need a third.
    assert!(pool.append(id, &[9, 9]));
    pool.check();
    assert_eq!(pool.blocks.statistics().copies, 0);
    assert!(!pool.append(id, &[1]));
    // Where there is room, what was known stays so.
    let mut pool = Pool::new(3, 4);
    let id = pool.start(&[]);
    pool.append(id, &[1, 2, 3, 4, 5, 6, 7, 8]);
    pool.truncate(id, 6);
    assert!(pool.append(id, &[9, 9]));
    assert_eq!(pool.blocks.statistics().copies, 1);
    assert_eq!(pool.blocks.cached(&[1, 2, 3, 4, 5, 6, 7, 8]), 8);
}

#[test]
fn kv_blocks_refuse_what_cannot_be() {
    assert!(Blocks::new(0, 16).is_err() && Blocks::new(4, 0).is_err());
    assert!(Blocks::new(1 << 28, 16).is_err() && Blocks::new(usize::MAX, 1).is_err());
    let mut pool = Pool::new(2, 4);
    let id = pool.start(&[]);
    let error = pool.blocks.append(id, &[0; 13]).unwrap_err().to_string();
    for part in ["4 blocks of 4 tokens", "2 of the cache's 2", "larger"] {
        assert!(error.contains(part), "{error}");
    }
    pool.append(id, &[1, 2, 3]);
    assert!(pool.blocks.truncate(id, 4).is_err());
    pool.free(id);
    let error = pool.blocks.append(id, &[1]).unwrap_err().to_string();
    assert!(error.contains("`sequence`") && pool.blocks.free(id).is_err());
    assert!(pool.blocks.table(id).is_err() && pool.blocks.fork(id).is_err());
}
