//! Random operations over a cache with its bytes, beside the plain model of it: the tokens of each sequence.

use super::*;
use crate::kv::{CacheFormat, codec, hadamard};
use crate::ops::AppendHeads;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

const LAYERS: usize = 2;
/// Numbers of a token: a key and a value.
const WIDTH: usize = 64;

/// What a model would store for the tokens in a layer: each row depends on all tokens before it.
fn rows(tokens: &[u32], layer: usize) -> Vec<[f32; WIDTH]> {
    let mut state = 1 + layer as u64;
    let next = |token: &u32| {
        std::array::from_fn(|_| {
            state = (state ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            (state >> 52) as f32 - 2048.0
        })
    };
    tokens.iter().map(next).collect()
}

/// Some of a text: sequences of one text begin alike.
fn text(which: u32, range: std::ops::Range<usize>) -> Vec<u32> {
    range.map(|i| which * 7 + i as u32 % 5).collect()
}

struct Run {
    cache: PagedKvCache,
    op: AppendHeads,
    plain: HashMap<SequenceId, Vec<u32>>,
}

impl Run {
    fn new(format: CacheFormat, blocks: usize) -> Self {
        let op = AppendHeads::new(RowLayout::heads(format, 1, WIDTH / 2, WIDTH / 2).unwrap()).unwrap();
        let size = CacheSize::Tokens(blocks * op.layout().block_tokens());
        let cache = PagedKvCache::new(LAYERS, op.layout().clone(), size, 150, &Device::Cpu).unwrap();
        Self {
            cache,
            op,
            plain: HashMap::new(),
        }
    }

    fn ids(&self) -> Vec<SequenceId> {
        let mut ids: Vec<_> = self.plain.keys().copied().collect();
        ids.sort();
        ids
    }

    fn start(&mut self, tokens: &[u32]) -> SequenceId {
        let (id, cached) = self.cache.start(tokens);
        self.plain.insert(id, tokens[..cached].to_vec());
        id
    }

    /// A pass as far as it has written so many layers; whether it got its blocks.
    fn write(&mut self, sequences: &[(SequenceId, Vec<u32>)], layers: usize) -> bool {
        let cached = self.cache.statistics();
        let slices: Vec<_> = sequences
            .iter()
            .map(|(id, tokens)| (*id, tokens.as_slice()))
            .collect();
        match self.cache.begin(&slices) {
            Ok(()) => {}
            Err(Error::OutOfBlocks { .. } | Error::ContextLength { .. }) => {
                let after = self.cache.statistics();
                assert_eq!((after.evictions, after.copies), (cached.evictions, cached.copies));
                return false;
            }
            Err(other) => panic!("{other}"),
        }
        for layer in 0..layers {
            let mut both = [Vec::new(), Vec::new()];
            for sequence in self.cache.pass() {
                let before = &self.plain[&sequence.id];
                assert_eq!(before.len(), sequence.position);
                let all = [before, sequence.tokens].concat();
                for row in &rows(&all, layer)[before.len()..] {
                    both[0].extend_from_slice(&row[..WIDTH / 2]);
                    both[1].extend_from_slice(&row[WIDTH / 2..]);
                }
            }
            let shape = (both[0].len() / (WIDTH / 2), 1, WIDTH / 2);
            let [keys, values] = both.map(|numbers| Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap());
            let pool = self.cache.pool(layer).unwrap();
            self.op.forward(pool, &keys, &values, self.cache.batch()).unwrap();
        }
        true
    }

    fn add(&mut self, sequences: &[(SequenceId, Vec<u32>)]) {
        if self.write(sequences, LAYERS) {
            self.cache.commit();
            for (id, tokens) in sequences {
                self.plain.get_mut(id).unwrap().extend_from_slice(tokens);
            }
        }
    }

    /// Every sequence's bytes are those of its tokens, in all layers, and the blocks add up.
    fn check(&self) {
        let layout = self.cache.layout();
        let size = layout.block_tokens();
        let mut expected = vec![0; layout.block_bytes()];
        let mut held = HashSet::new();
        for layer in 0..LAYERS {
            let pool = self.cache.pool(layer).unwrap().to_vec1::<u8>().unwrap();
            for (id, tokens) in &self.plain {
                assert_eq!(self.cache.len(*id).unwrap(), tokens.len());
                let table = self.cache.blocks.table(*id).unwrap();
                held.extend(table.iter().copied());
                for (i, mut row) in rows(tokens, layer).into_iter().enumerate() {
                    if layout.rotation(WIDTH / 2).is_some() {
                        row.chunks_exact_mut(WIDTH / 2).for_each(hadamard::rotate_whole);
                    }
                    let slot = table[i / size] * size as u32 + (i % size) as u32;
                    codec::write(layout, &row, &mut expected, 0).unwrap();
                    for part in layout.parts() {
                        let (codes, scales) = layout.place(part, slot);
                        let (codes_of_0, scales_of_0) = layout.place(part, 0);
                        let same = |at: usize, at_0: usize, len: usize| {
                            pool[at..at + len] == expected[at_0..at_0 + len]
                        };
                        assert!(
                            same(codes, codes_of_0, part.code_bytes())
                                && same(scales, scales_of_0, part.scale_bytes()),
                            "layer {layer}, token {i} of {id}"
                        );
                    }
                }
            }
        }
        let statistics = self.cache.statistics();
        assert_eq!(statistics.used, held.len());
        assert_eq!(statistics.used + statistics.free, statistics.total);
    }

    /// The tokens that follow a sequence's in a text.
    fn next(&self, id: SequenceId, which: u32, count: usize) -> Vec<u32> {
        let len = self.plain[&id].len();
        text(which, len..len + count.max(1))
    }

    fn operate(&mut self, (kind, choice, which, count): Operation) {
        let ids = self.ids();
        let pick = |offset: usize| ids[(usize::from(choice) + offset) % ids.len()];
        if ids.is_empty() || kind < 2 {
            let tokens = text(which, 0..count + 1);
            let id = self.start(&tokens);
            let rest = tokens[self.plain[&id].len()..].to_vec();
            return self.add(&[(id, rest)]);
        }
        let id = pick(0);
        match kind {
            2..=5 => self.add(&[(id, self.next(id, which, count))]),
            // Several in one pass.
            6 | 7 => {
                let all: Vec<_> = (0..ids.len().min(3))
                    .map(|i| (pick(i), self.next(pick(i), which, count / 2 + i)))
                    .collect();
                self.add(&all);
            }
            // A pass that fails after a layer.
            8 => {
                self.write(&[(id, self.next(id, which, count))], 1);
                self.cache.forget();
            }
            // One that fails, and something else begins.
            9 => {
                self.write(&[(id, self.next(id, which, count))], LAYERS);
                self.add(&[(pick(1), self.next(pick(1), which, 1))]);
            }
            10 | 11 => {
                let len = count * 3 % (self.plain[&id].len() + 1);
                self.cache.truncate(id, len).unwrap();
                self.plain.get_mut(&id).unwrap().truncate(len);
            }
            12 => {
                let fork = self.cache.fork(id).unwrap();
                self.plain.insert(fork, self.plain[&id].clone());
            }
            _ => {
                self.cache.free(id).unwrap();
                self.plain.remove(&id);
            }
        }
    }
}

/// Numbers that a test makes an operation of: what, to which sequence, of which text, how many tokens.
type Operation = (u8, u8, u32, usize);

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec((0u8..16, any::<u8>(), 0u32..3, 0usize..40), 500)
}

proptest! {
    // 200 times 500: 100,000 operations.
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn kv_bytes_are_those_of_the_tokens_whatever_happens(
        operations in operations(),
        format in prop::sample::select(CacheFormat::ALL.to_vec()),
        blocks in 2usize..24,
    ) {
        let mut run = Run::new(format, blocks);
        for operation in operations {
            run.operate(operation);
            run.check();
        }
        for id in run.ids() {
            run.cache.free(id).unwrap();
        }
        let statistics = run.cache.statistics();
        prop_assert_eq!((statistics.used, statistics.free), (0, blocks));
    }
}

/// The operations above do what they are for: blocks are shared, found again, copied and given up.
#[test]
fn kv_random_operations_over_bytes_reach_every_case() {
    let mut random = crate::random::Random::new(5);
    let mut run = Run::new(CacheFormat::fp4(), 16);
    for _ in 0..5000 {
        let mut below = |limit| random.below(limit);
        run.operate((below(16) as u8, below(256) as u8, below(3) as u32, below(40)));
    }
    run.check();
    let statistics = run.cache.statistics();
    assert!(
        statistics.hits > 1000 && statistics.evictions > 100 && statistics.copies > 100,
        "{statistics:?}"
    );
}
