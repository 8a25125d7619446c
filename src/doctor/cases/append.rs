//! New tokens into a paged cache.

use super::rows::{EPS, PAIRINGS, angles, turned};
use super::{Bench, bound_of, to_f32};
use crate::Result;
use crate::cpu::{PagedSequence, reference};
use crate::doctor::runner::DTYPES;
use crate::kv::{CacheFormat, RowLayout, codec, hadamard};
use crate::ops::{AppendHeads, AppendLatents, PagedBatch, RmsNorm};
use candle_core::{DType, Device, Tensor};

const HEADS: usize = 3;
/// What becomes of a number on the border between two codes, where a device's last bit is another.
const OF_CODES: f64 = 1e-4;

/// A pool of four blocks, and tokens in them.
struct Stored {
    pool: Tensor,
    batch: PagedBatch,
}

impl Stored {
    /// For `tokens` tokens of two sequences, whose blocks lie in no order.
    fn new(layout: &RowLayout, tokens: usize, device: &Device) -> Result<Self> {
        let first = tokens.div_ceil(2);
        let sequences = [
            (&[2, 0][..], 13 + first, first),
            (&[1, 3][..], tokens, tokens - first),
        ];
        let sequences = sequences.map(|(table, len, queries)| PagedSequence { table, len, queries });
        Ok(Self {
            pool: Tensor::zeros(layout.pool_bytes(4)?, DType::U8, device)?,
            batch: PagedBatch::new(&sequences, layout.block_tokens(), device)?,
        })
    }

    /// Compares what the pool has of the tokens with what the codec makes of their numbers, which it is to be given rotated
    /// where the layout has them so.
    fn compare(
        &self,
        bench: &mut Bench<'_>,
        case: String,
        layout: &RowLayout,
        rows: &[f32],
        bound: f64,
    ) -> Result<()> {
        let mut bytes = vec![0; layout.pool_bytes(4)?];
        let found = self.pool.to_device(&Device::Cpu)?.to_vec1::<u8>()?;
        let (mut expected, mut numbers) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
        let slots = self.batch.slots().as_slice();
        for (i, row) in rows.chunks_exact(layout.width()).enumerate() {
            codec::write(layout, row, &mut bytes, slots[i])?;
            let range = i * layout.width()..(i + 1) * layout.width();
            codec::read(layout, &bytes, slots[i], &mut expected[range.clone()])?;
            codec::read(layout, &found, slots[i], &mut numbers[range])?;
        }
        let len = numbers.len();
        let numbers = Tensor::from_vec(numbers, len, &Device::Cpu)?;
        bench.compare_within(bound, case, &numbers, expected)
    }
}

/// A vector as the layout has it.
fn rotated(layout: &RowLayout, vector: &[f32]) -> Result<Vec<f32>> {
    let mut vector = vector.to_vec();
    if let Some(block) = layout.rotation(vector.len()) {
        hadamard::rotate(&mut vector, block)?;
    }
    Ok(vector)
}

pub(super) fn append(bench: &mut Bench<'_>) -> Result<()> {
    for (i, format) in CacheFormat::ALL.into_iter().enumerate() {
        for dtype in DTYPES {
            for tokens in [1, 19] {
                latents(bench, format, dtype, tokens, i % 2)?;
                heads(bench, format, dtype, tokens)?;
            }
        }
    }
    Ok(())
}

fn latents(
    bench: &mut Bench<'_>,
    format: CacheFormat,
    dtype: DType,
    tokens: usize,
    pairing: usize,
) -> Result<()> {
    let (latent, rope, pairing) = (96, 6, PAIRINGS[pairing]);
    let case = |of: &str| format!("{of} of {tokens} tokens, {dtype:?}, {format}, {pairing:?}");
    let layout = RowLayout::latent(format, latent, rope)?;
    let weight = bench.noise(latent);
    let op = AppendLatents::new(RmsNorm::new(weight.clone(), EPS)?, pairing, layout.clone())?;
    let kv = bench.tensor(&[tokens, latent + rope], dtype)?;
    let queries = bench.tensor(&[tokens, HEADS, rope], dtype)?;
    let (cos, sin) = angles(bench, tokens, rope / 2)?;
    let normed = to_f32(&kv.narrow(1, 0, latent)?.contiguous()?)?;
    let normed = reference::rms_norm(&normed, &weight, EPS as f32);
    let keys = kv.narrow(1, latent, rope)?.unsqueeze(1)?.contiguous()?;
    let keys = turned(pairing, &keys, (&cos, &sin))?;
    let mut rows = Vec::new();
    for (latent, key) in normed.chunks_exact(latent).zip(keys.chunks_exact(rope)) {
        rows.extend(rotated(&layout, latent)?);
        rows.extend_from_slice(key);
    }
    let alone = Stored::new(&layout, tokens, &bench.device)?;
    op.forward(&alone.pool, &kv, &cos, &sin, &alone.batch)?;
    alone.compare(bench, case("latents alone"), &layout, &rows, OF_CODES)?;
    let with = Stored::new(&layout, tokens, &bench.device)?;
    let found = op.forward_with_queries(&with.pool, &kv, &queries, &cos, &sin, &with.batch)?;
    with.compare(bench, case("latents"), &layout, &rows, OF_CODES)?;
    bench.compare(case("queries"), &found, turned(pairing, &queries, (&cos, &sin))?)
}

/// Bit for bit: nothing is computed before numbers are rounded.
fn heads(bench: &mut Bench<'_>, format: CacheFormat, dtype: DType, tokens: usize) -> Result<()> {
    let widths = [96, 64];
    let layout = RowLayout::heads(format, HEADS, widths[0], widths[1])?;
    let keys = bench.tensor(&[tokens, HEADS, widths[0]], dtype)?;
    let values = bench.tensor(&[tokens, HEADS, widths[1]], dtype)?;
    let stored = Stored::new(&layout, tokens, &bench.device)?;
    AppendHeads::new(layout.clone())?.forward(&stored.pool, &keys, &values, &stored.batch)?;
    let (keys, values) = (to_f32(&keys)?, to_f32(&values)?);
    let both = keys
        .chunks_exact(HEADS * widths[0])
        .zip(values.chunks_exact(HEADS * widths[1]));
    let mut rows = Vec::new();
    for (keys, values) in both {
        for vector in keys.chunks_exact(widths[0]).chain(values.chunks_exact(widths[1])) {
            rows.extend(rotated(&layout, vector)?);
        }
    }
    let case = format!("heads of {tokens} tokens, {dtype:?}, {format}");
    stored.compare(bench, case, &layout, &rows, bound_of(DType::F32))
}
