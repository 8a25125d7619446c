//! Attention over a paged cache, and its tokens as numbers.

use super::{Bench, bound_of, rounded, to_f32};
use crate::Result;
use crate::cpu::{self, HeadView, PagedSequence, key_width, reference};
use crate::doctor::runner::{DTYPES, Runner};
use crate::kv::{CacheFormat, RowKind, RowLayout, ScaleGroup, codec, hadamard};
use crate::ops::{PagedAttention, PagedBatch, gather_paged};
use candle_core::{DType, Device, Tensor};

/// Tokens of one sequence or two, of which each has the last one new: within what the kernels take at once, and beyond.
const LENGTHS: [&[usize]; 2] = [&[43], &[5, 300]];

/// What BF16 products of the CPU, where its processor has them, add to the rounding of outputs.
const OF_BF16: f64 = 1e-5;

const ROTATED: CacheFormat = CacheFormat::Fp4 {
    group: ScaleGroup::ThirtyTwo,
    rotate: true,
};

/// A cache of some sequences, and where their tokens are.
struct Cache {
    layout: RowLayout,
    bytes: Vec<u8>,
    pool: Tensor,
    tables: Vec<Vec<u32>>,
    lengths: &'static [usize],
}

impl Cache {
    fn new(bench: &mut Bench<'_>, layout: RowLayout, lengths: &'static [usize]) -> Result<Self> {
        let tokens = layout.block_tokens();
        let blocks: usize = lengths.iter().map(|len| len.div_ceil(tokens)).sum();
        let mut bytes = vec![0; layout.pool_bytes(blocks)?];
        // From the pool's last block on.
        let mut free = (0..blocks as u32).rev();
        let mut tables = Vec::new();
        for len in lengths {
            let table: Vec<u32> = free.by_ref().take(len.div_ceil(tokens)).collect();
            for position in 0..*len {
                let row = bench.noise(layout.width());
                let slot = table[position / tokens] * tokens as u32 + (position % tokens) as u32;
                codec::write(&layout, &row, &mut bytes, slot)?;
            }
            tables.push(table);
        }
        let pool = Tensor::from_slice(&bytes, bytes.len(), &Device::Cpu)?.to_device(&bench.device)?;
        Ok(Self {
            layout,
            bytes,
            pool,
            tables,
            lengths,
        })
    }

    fn sequences(&self) -> Vec<PagedSequence<'_>> {
        let all = self.tables.iter().zip(self.lengths);
        let sequences = all.map(|(table, len)| PagedSequence {
            table,
            len: *len,
            queries: 1,
        });
        sequences.collect()
    }

    fn batch(&self, device: &Device) -> Result<PagedBatch> {
        PagedBatch::new(&self.sequences(), self.layout.block_tokens(), device)
    }
}

/// Every kind of row and share of heads that kernels tell apart, each in some formats.
fn layouts() -> Result<Vec<(RowLayout, usize)>> {
    let mut all = Vec::new();
    for format in [CacheFormat::F16, CacheFormat::Fp8, CacheFormat::fp4()] {
        all.push((RowLayout::latent(format, 512, 64)?, 3));
    }
    for format in [CacheFormat::BF16, ROTATED] {
        all.push((RowLayout::latent(format, 128, 32)?, 4));
    }
    let formats = [
        CacheFormat::BF16,
        CacheFormat::fp4(),
        ROTATED,
        CacheFormat::Fp8,
        CacheFormat::F16,
    ];
    for ((width, each), format) in [(64, 1), (128, 3), (96, 7), (256, 1), (160, 4)]
        .into_iter()
        .zip(formats)
    {
        all.push((RowLayout::heads(format, 2, width, width)?, 2 * each));
    }
    Ok(all)
}

fn name(layout: &RowLayout) -> String {
    match layout.kind() {
        RowKind::Latent { latent, rope } => format!("latents of {latent} + {rope} in {}", layout.format()),
        RowKind::Heads { key_dim, .. } => format!("heads of {key_dim} in {}", layout.format()),
    }
}

pub(super) fn attention(bench: &mut Bench<'_>) -> Result<()> {
    for (layout, heads) in layouts()? {
        for lengths in LENGTHS {
            let cache = Cache::new(bench, layout.clone(), lengths)?;
            for dtype in DTYPES {
                attend(bench, &cache, heads, dtype)?;
            }
        }
    }
    Ok(())
}

fn attend(bench: &mut Bench<'_>, cache: &Cache, heads: usize, dtype: DType) -> Result<()> {
    let (layout, n, width) = (&cache.layout, cache.lengths.len(), key_width(&cache.layout));
    let scale = 2.0 / (width as f32).sqrt();
    let op = PagedAttention::new(layout.clone(), heads, scale, None)?;
    let queries = bench.tensor(&[n, heads, width], dtype)?;
    let y = op.forward(&[&queries], &cache.pool, &cache.batch(&bench.device)?)?;
    let data = to_f32(&queries)?;
    let view = HeadView {
        data: &data,
        row: heads * width,
        head: width,
        width,
    };
    let expected = reference::paged_attention(cpu::PagedAttention {
        layout,
        pool: &cache.bytes,
        heads,
        queries: &[view],
        sequences: &cache.sequences(),
        window: None,
        scale,
    });
    let case = format!(
        "{}, {heads} heads, {:?} tokens, {dtype:?}",
        name(layout),
        cache.lengths
    );
    let bound = match bench.runner {
        Runner::Cpu(_) => bound_of(dtype) + OF_BF16,
        #[cfg(any(msl_host, target_os = "macos"))]
        _ => bound_of(dtype),
    };
    bench.compare_within(bound, case, &y, expected)
}

pub(super) fn gather(bench: &mut Bench<'_>) -> Result<()> {
    for (layout, _) in layouts()? {
        let cache = Cache::new(bench, layout.clone(), LENGTHS[0])?;
        for dtype in DTYPES {
            let (positions, tokens) = (7..40, layout.block_tokens());
            let batch = cache.batch(&bench.device)?;
            let rows = gather_paged(&layout, &cache.pool, &batch, 0, positions.clone(), dtype)?;
            let mut expected = Vec::with_capacity(rows.elem_count());
            for position in positions {
                let slot = cache.tables[0][position / tokens] * tokens as u32 + (position % tokens) as u32;
                let mut row = vec![0.0; layout.width()];
                codec::read(&layout, &cache.bytes, slot, &mut row)?;
                unrotate(&layout, &mut row)?;
                expected.extend(row);
            }
            let expected = rounded(expected, dtype)?;
            bench.compare(format!("{}, {dtype:?}", name(&layout)), &rows, expected)?;
        }
    }
    Ok(())
}

/// Takes the rotation of a token's numbers back, where they are stored rotated.
fn unrotate(layout: &RowLayout, row: &mut [f32]) -> Result<()> {
    let mut rest = row;
    for (index, part) in layout.parts().iter().enumerate() {
        let (vector, tail) = rest.split_at_mut(part.width);
        let is_rotary = index == 1 && matches!(layout.kind(), RowKind::Latent { .. });
        if let Some(block) = layout.rotation(part.width).filter(|_| !is_rotary) {
            hadamard::unrotate(vector, block)?;
        }
        rest = tail;
    }
    Ok(())
}
