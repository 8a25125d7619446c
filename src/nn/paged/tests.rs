//! A cache's life, over rows of two numbers.

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
