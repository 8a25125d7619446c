//! Paged caches and queries, and what the plain reference makes of them.

use crate::linear::cases::{DTYPES, activations};
use crate::{grid, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{self, HeadView, PagedSequence, reference};
use candle_mmfp4::kv::{CacheFormat, RowKind, RowLayout, codec};
use candle_mmfp4::ops::{PagedAttention, PagedBatch};

/// How parts of queries lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueriesLie {
    /// Each part by itself.
    Together,
    /// Side by side in one tensor, behind five elements of others.
    Narrowed,
    /// Heads before tokens.
    HeadsFirst,
    /// All in one part.
    Joined,
    /// The elements of a head apart.
    Transposed,
}

pub const LIES: [QueriesLie; 5] = [
    QueriesLie::Together,
    QueriesLie::Narrowed,
    QueriesLie::HeadsFirst,
    QueriesLie::Joined,
    QueriesLie::Transposed,
];

/// A batch of sequences, each of so many tokens, the last of which are new, and what is kept of them.
#[derive(Debug, Clone)]
pub struct Case {
    pub dtype: DType,
    pub kind: RowKind,
    pub format: CacheFormat,
    pub heads: usize,
    pub sequences: Vec<(usize, usize)>,
    pub window: Option<usize>,
    pub block_tokens: usize,
    pub lies: QueriesLie,
}

pub const fn latent(latent: usize, rope: usize) -> RowKind {
    RowKind::Latent { latent, rope }
}

pub const fn heads(kv_heads: usize, key_dim: usize, value_dim: usize) -> RowKind {
    RowKind::Heads {
        kv_heads,
        key_dim,
        value_dim,
    }
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            kind: latent(64, 16),
            format: CacheFormat::BF16,
            heads: 3,
            sequences: vec![(20, 2)],
            window: None,
            block_tokens: 16,
            lies: QueriesLie::Together,
        }
    }
}

/// A case's cache: its layout and pool, and the blocks of each sequence.
pub struct Cache {
    pub layout: RowLayout,
    pub pool: Vec<u8>,
    pub tables: Vec<Vec<u32>>,
}

impl Cache {
    pub fn tensor(&self) -> Tensor {
        Tensor::from_slice(&self.pool, self.pool.len(), &Device::Cpu).unwrap()
    }
}

impl Case {
    /// A cache whose blocks lie in no order, of which some are nobody's. Whatever no query may see is NaN: blocks and slots
    /// that hold nothing, and positions before each query's window.
    pub fn cache(&self) -> Cache {
        let layout = RowLayout::new(self.format, self.kind, self.block_tokens).unwrap();
        let needed: Vec<usize> = (self.sequences.iter())
            .map(|(len, _)| len.div_ceil(self.block_tokens))
            .collect();
        let blocks = needed.iter().sum::<usize>() + 3;
        // A step that shares no factor with any count of blocks.
        let mut free = (0..blocks).map(|i| ((i * 7919 + 5) % blocks) as u32);
        let tables: Vec<Vec<u32>> = needed
            .iter()
            .map(|count| free.by_ref().take(*count).collect())
            .collect();
        let mut pool = vec![0xff; layout.pool_bytes(blocks).unwrap()];
        for (index, ((len, queries), table)) in self.sequences.iter().zip(&tables).enumerate() {
            let first = (len - queries + 1).saturating_sub(self.window.unwrap_or(usize::MAX));
            for position in first..*len {
                let row = noise(layout.width(), (index * 100_003 + position + 1) as u64);
                let slot = table[position / self.block_tokens] as usize * self.block_tokens
                    + position % self.block_tokens;
                codec::write(&layout, &row, &mut pool, slot as u32).unwrap();
            }
        }
        Cache { layout, pool, tables }
    }

    pub fn sequences<'a>(&self, tables: &'a [Vec<u32>]) -> Vec<PagedSequence<'a>> {
        let sequence = |(table, (len, queries)): (&'a Vec<u32>, &(usize, usize))| PagedSequence {
            table,
            len: *len,
            queries: *queries,
        };
        tables.iter().zip(&self.sequences).map(sequence).collect()
    }

    pub fn batch(&self, cache: &Cache, device: &Device) -> PagedBatch {
        PagedBatch::new(&self.sequences(&cache.tables), self.block_tokens, device).unwrap()
    }

    pub fn op(&self, cache: &Cache) -> PagedAttention {
        PagedAttention::new(cache.layout.clone(), self.heads, self.scale(), self.window).unwrap()
    }

    /// What spreads weights over some of the tokens.
    fn scale(&self) -> f32 {
        3.0 / (self.key() as f32).sqrt()
    }

    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|(_, queries)| queries).sum()
    }

    fn key(&self) -> usize {
        match self.kind {
            RowKind::Latent { latent, rope } => latent + rope,
            RowKind::Heads { key_dim, .. } => key_dim,
        }
    }

    pub fn value(&self) -> usize {
        match self.kind {
            RowKind::Latent { latent, .. } => latent,
            RowKind::Heads { value_dim, .. } => value_dim,
        }
    }

    /// The queries, in their parts.
    pub fn queries(&self) -> Vec<Tensor> {
        let (n, heads, key) = (self.tokens(), self.heads, self.key());
        let widths = match self.kind {
            RowKind::Latent { latent, rope } if rope > 0 => vec![latent, rope],
            _ => vec![key],
        };
        let of =
            |width: usize, seed| activations((n * heads, width), self.dtype, seed).reshape((n, heads, width));
        let apart = |take: &dyn Fn(usize, u64) -> candle_core::Result<Tensor>| {
            let parts = (60..).zip(&widths).map(|(seed, width)| take(*width, seed));
            parts.collect::<candle_core::Result<Vec<_>>>().unwrap()
        };
        match self.lies {
            QueriesLie::Together => apart(&of),
            QueriesLie::Joined => vec![of(key, 60).unwrap()],
            QueriesLie::Narrowed => {
                let all = of(key + 5, 60).unwrap();
                let mut start = 5;
                let parts = widths.iter().map(|width| {
                    start += width;
                    all.narrow(2, start - width, *width).unwrap()
                });
                parts.collect()
            }
            QueriesLie::HeadsFirst => {
                apart(&|width, seed| of(width, seed)?.reshape((heads, n, width))?.transpose(0, 1))
            }
            QueriesLie::Transposed => {
                apart(&|width, seed| of(width, seed)?.reshape((n, width, heads))?.transpose(1, 2))
            }
        }
    }

    /// What attention should give.
    pub fn expected(&self, cache: &Cache, queries: &[Tensor]) -> Vec<f32> {
        let data: Vec<_> = queries
            .iter()
            .map(|part| values(&part.contiguous().unwrap()))
            .collect();
        let views: Vec<_> = (data.iter().zip(queries))
            .map(|(data, part)| {
                let width = part.dims()[2];
                HeadView {
                    data,
                    row: self.heads * width,
                    head: width,
                    width,
                }
            })
            .collect();
        reference::paged_attention(cpu::PagedAttention {
            layout: &cache.layout,
            pool: &cache.pool,
            heads: self.heads,
            queries: &views,
            sequences: &self.sequences(&cache.tables),
            window: self.window,
            scale: self.scale(),
        })
    }
}

/// Depths around blocks and tiles of tokens, one that takes several splits, and where queries are several.
fn sequences() -> Vec<Vec<(usize, usize)>> {
    let mut all: Vec<_> = [1, 15, 16, 17, 31, 32, 33, 255, 256, 257]
        .map(|len| vec![(len, 1)])
        .into();
    all.extend([
        // Mixed lengths, sequences without tokens or queries among them.
        vec![(0, 0), (40, 3), (7, 0), (1, 1), (300, 1)],
        vec![(33, 33)],
        vec![(513, 2), (12, 12)],
    ]);
    all
}

/// The grid.
pub fn grid() -> Vec<Case> {
    const KINDS: [RowKind; 13] = [
        latent(512, 64),
        latent(128, 32),
        latent(160, 16),
        latent(64, 0),
        latent(224, 6),
        heads(1, 64, 64),
        heads(2, 96, 96),
        heads(2, 128, 128),
        heads(1, 256, 256),
        heads(2, 192, 128),
        // Of no use to FP4 or to loads by fours.
        latent(30, 5),
        heads(2, 18, 7),
        heads(1, 130, 3),
    ];
    /// Heads of queries a kv head, or of latents.
    const HEADS: [usize; 8] = [1, 2, 4, 5, 8, 9, 20, 25];
    const WINDOWS: [Option<usize>; 4] = [None, Some(1), Some(18), Some(270)];
    const BLOCKS: [usize; 2] = [16, 48];
    let sequences = sequences();
    let axes = [
        DTYPES.len(),
        KINDS.len(),
        CacheFormat::ALL.len(),
        HEADS.len(),
        sequences.len(),
        WINDOWS.len(),
        BLOCKS.len(),
        LIES.len(),
    ];
    let places = grid::pairwise(axes);
    let case = |at: [usize; 8]| {
        let kind = KINDS[at[1]];
        // Vectors that FP4 does not take are FP8.
        let format = CacheFormat::ALL[at[2]];
        let format = RowLayout::new(format, kind, 16).map_or(CacheFormat::Fp8, |_| format);
        let kv_heads = match kind {
            RowKind::Latent { .. } => 1,
            RowKind::Heads { kv_heads, .. } => kv_heads,
        };
        Case {
            dtype: DTYPES[at[0]],
            kind,
            format,
            heads: kv_heads * HEADS[at[3]],
            sequences: sequences[at[4]].clone(),
            window: WINDOWS[at[5]],
            block_tokens: BLOCKS[at[6]],
            lies: LIES[at[7]],
        }
    };
    places.into_iter().map(case).collect()
}
