//! New tokens into a paged cache: normalised, turned, rounded and scattered, each on its own.
//!
//! A token's bytes follow from its numbers alone: not from the other tokens of the call, and not from threads. So the
//! cache is the same however a prompt is cut.

use super::norm::norm_row;
use super::rope::rotate;
use super::tile::SharedSlice;
use super::{Executor, Pairing};
use crate::kv::{Part, RowKind, RowLayout, Slots, codec, hadamard};
use half::{bf16, f16};
use std::cell::RefCell;

/// From so many elements on, appending is work for all threads.
const TOGETHER: usize = 1 << 13;
/// Tokens of a task.
const TOKENS: usize = 8;

thread_local! {
    /// A token's numbers, twice.
    static ROW: RefCell<Vec<f32>> = RefCell::default();
}

/// Numbers as a tensor has them.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// In single precision.
    F32(&'a [f32]),
    /// In half precision.
    F16(&'a [f16]),
    /// In bfloat16.
    BF16(&'a [bf16]),
}

impl Floats<'_> {
    /// How many.
    #[expect(clippy::len_without_is_empty, reason = "a slice that is read by index")]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    /// Those from `start` on.
    fn read(&self, start: usize, to: &mut [f32]) {
        let range = start..start + to.len();
        match self {
            Self::F32(values) => to.copy_from_slice(&values[range]),
            Self::F16(values) => to
                .iter_mut()
                .zip(&values[range])
                .for_each(|(to, x)| *to = x.to_f32()),
            Self::BF16(values) => to
                .iter_mut()
                .zip(&values[range])
                .for_each(|(to, x)| *to = x.to_f32()),
        }
    }
}

/// MLA's new tokens.
#[derive(Debug, Clone, Copy)]
pub struct NewLatents<'a> {
    /// Rows of latents and rotary keys.
    pub rows: Floats<'a>,
    /// Elements from one row to the next.
    pub stride: usize,
    /// The weight of the latents' norm, as long as a latent.
    pub weight: &'a [f32],
    /// That norm's epsilon.
    pub eps: f32,
    /// Which elements of a rotary key are pairs.
    pub pairing: Pairing,
    /// Cosines of the tokens' angles, a pair's each.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// New tokens' keys, or values, of all heads, ready to be stored.
#[derive(Debug, Clone, Copy)]
pub struct NewHeads<'a> {
    /// The numbers.
    pub rows: Floats<'a>,
    /// Elements from one token to the next.
    pub row: usize,
    /// Elements from one head to the next.
    pub head: usize,
}

/// Normalises latents, turns rotary keys, and stores both in these slots of a pool.
///
/// # Panics
/// If the layout is not of latents as long as `weight`, or rows, angles or the pool are shorter than the slots need.
pub fn append_latents(
    executor: &Executor,
    layout: &RowLayout,
    new: NewLatents<'_>,
    slots: &Slots,
    pool: &mut [u8],
) {
    let RowKind::Latent { latent, rope } = layout.kind() else {
        panic!("append_latents: a layout of heads");
    };
    assert!(
        new.weight.len() == latent && rope.is_multiple_of(2),
        "append_latents: widths"
    );
    let pairs = rope / 2;
    assert!(
        new.cos.len() >= slots.len() * pairs && new.sin.len() >= slots.len() * pairs,
        "append_latents: angles"
    );
    let rotated = layout.rotation(latent).is_some();
    let width = latent + rope;
    store(executor, layout, slots, pool, |token, target, memory| {
        let (raw, done) = memory.split_at_mut(width);
        new.rows.read(token * new.stride, raw);
        norm_row(&raw[..latent], new.weight, new.eps, &mut done[..latent]);
        if rotated {
            hadamard::rotate_whole(&mut done[..latent]);
        }
        let angles = token * pairs..(token + 1) * pairs;
        let (cos, sin) = (&new.cos[angles.clone()], &new.sin[angles]);
        rotate(new.pairing, &raw[latent..], cos, sin, &mut done[latent..]);
        let (latent, rope) = done.split_at(latent);
        for (part, values) in layout.parts().iter().zip([latent, rope]) {
            target.write(part, values);
        }
    });
}

/// Stores keys and values of heads in these slots of a pool.
///
/// # Panics
/// If the layout is not of heads, or rows or the pool are shorter than the slots need.
pub fn append_heads(
    executor: &Executor,
    layout: &RowLayout,
    (keys, values): (NewHeads<'_>, NewHeads<'_>),
    slots: &Slots,
    pool: &mut [u8],
) {
    let RowKind::Heads { kv_heads, .. } = layout.kind() else {
        panic!("append_heads: a layout of latents");
    };
    store(executor, layout, slots, pool, |token, target, memory| {
        for (index, part) in layout.parts().iter().enumerate() {
            let from = if index < kv_heads { keys } else { values };
            let numbers = &mut memory[..part.width];
            from.rows
                .read(token * from.row + index % kv_heads * from.head, numbers);
            if layout.rotation(part.width).is_some() {
                hadamard::rotate_whole(numbers);
            }
            target.write(part, numbers);
        }
    });
}

/// A token's bytes in a pool.
struct Target<'a> {
    layout: &'a RowLayout,
    pool: &'a SharedSlice<'a, u8>,
    slot: u32,
}

impl Target<'_> {
    fn write(&self, part: &Part, values: &[f32]) {
        let (codes, scales) = self.layout.place(part, self.slot);
        // SAFETY: no byte of a pool belongs to two slots or to two vectors of one (a layout's promise), slots are
        // distinct (that of `Slots`), and a slot is one task's. Within the pool: `part` checks.
        let (codes, scales) = unsafe {
            (
                self.pool.part(codes..codes + part.code_bytes()),
                self.pool.part(scales..scales + part.scale_bytes()),
            )
        };
        codec::encode_vector(part.encoding, values, codes, scales);
    }
}

/// Runs `each` for every token, with its place in the pool and memory for its numbers, twice.
fn store(
    executor: &Executor,
    layout: &RowLayout,
    slots: &Slots,
    pool: &mut [u8],
    each: impl Fn(usize, Target<'_>, &mut [f32]) + Sync,
) {
    let width = layout.width();
    let blocks = slots.end().div_ceil(layout.block_tokens());
    assert!(blocks * layout.block_bytes() <= pool.len(), "append: pool");
    let pool = SharedSlice::new(pool);
    let some = |tokens: std::ops::Range<usize>| {
        ROW.with_borrow_mut(|memory| {
            if memory.len() < 2 * width {
                memory.resize(2 * width, 0.0);
            }
            for token in tokens {
                let slot = slots.as_slice()[token];
                let target = Target {
                    layout,
                    pool: &pool,
                    slot,
                };
                each(token, target, &mut memory[..2 * width]);
            }
        });
    };
    let tokens = slots.len();
    match tokens * width < TOGETHER {
        true => some(0..tokens),
        false => executor.run(tokens.div_ceil(TOKENS), |task| {
            some(task * TOKENS..((task + 1) * TOKENS).min(tokens));
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{HeadView, reference, testing::*};
    use crate::kv::CacheFormat;

    const EPS: f32 = 1e-6;

    /// Slots in no order, over several blocks.
    fn slots(tokens: usize) -> Slots {
        Slots::new((0..tokens as u32).map(|i| i * 37 % 96).collect()).unwrap()
    }

    #[test]
    fn kv_latents_are_stored_as_the_reference_says() {
        let (latent, rope, tokens) = (96, 6, 33);
        let x = noise(tokens * 110, 1);
        let halves: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
        let bf16s: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        let (cos, sin, weight) = (noise(tokens * 3, 2), noise(tokens * 3, 3), noise(latent, 4));
        for format in CacheFormat::ALL {
            let layout = RowLayout::latent(format, latent, rope).unwrap();
            for pairing in [Pairing::Interleaved, Pairing::Halves] {
                for rows in [Floats::F32(&x), Floats::F16(&halves), Floats::BF16(&bf16s)] {
                    let mut all = vec![0.0; rows.len()];
                    rows.read(0, &mut all);
                    let (mut latents, mut keys) = (Vec::new(), Vec::new());
                    for row in all.chunks(110) {
                        latents.extend_from_slice(&row[..latent]);
                        keys.extend_from_slice(&row[latent..latent + rope]);
                    }
                    let latents = reference::rms_norm(&latents, &weight, EPS);
                    let view = HeadView {
                        data: &keys,
                        row: rope,
                        head: 0,
                        width: rope,
                    };
                    let keys = reference::rope(pairing, view, 1, (&cos, &sin), tokens);
                    let slots = slots(tokens);
                    let mut expected = Vec::new();
                    let mut stored = vec![0; 6 * layout.block_bytes()];
                    for (i, slot) in slots.as_slice().iter().enumerate() {
                        let mut row = latents[i * latent..][..latent].to_vec();
                        if let Some(block) = layout.rotation(latent) {
                            hadamard::rotate(&mut row, block).unwrap();
                        }
                        row.extend_from_slice(&keys[i * rope..][..rope]);
                        codec::write(&layout, &row, &mut stored, *slot).unwrap();
                        let mut back = vec![0.0; latent + rope];
                        codec::read(&layout, &stored, *slot, &mut back).unwrap();
                        expected.extend(back);
                    }
                    for executor in executors() {
                        let new = NewLatents {
                            rows,
                            stride: 110,
                            weight: &weight,
                            eps: EPS,
                            pairing,
                            cos: &cos,
                            sin: &sin,
                        };
                        let mut pool = vec![0; 6 * layout.block_bytes()];
                        append_latents(executor, &layout, new, &slots, &mut pool);
                        let mut found = vec![0.0; expected.len()];
                        for (row, slot) in found.chunks_mut(latent + rope).zip(slots.as_slice()) {
                            codec::read(&layout, &pool, *slot, row).unwrap();
                        }
                        // The order of a sum may tip a number to the other side of a tie, which a coarse format
                        // shows.
                        let bound = if format == CacheFormat::F16 { 1e-9 } else { 1e-4 };
                        assert_within(&found, &expected, bound, &format!("{format} {pairing:?}"));
                    }
                }
            }
        }
    }

    #[test]
    fn kv_heads_are_stored_as_they_are() {
        let (heads, tokens) = (3, 17);
        let (keys, values) = (noise(tokens * 400, 1), noise(tokens * 200, 2));
        for format in CacheFormat::ALL {
            let layout = RowLayout::heads(format, heads, 96, 64).unwrap();
            let slots = slots(tokens);
            let mut expected = vec![0; 6 * layout.block_bytes()];
            for (i, slot) in slots.as_slice().iter().enumerate() {
                let mut row = Vec::new();
                for (data, stride, head, width) in [(&keys, 400, 100, 96), (&values, 200, 64, 64)] {
                    for h in 0..heads {
                        let mut vector = data[i * stride + h * head..][..width].to_vec();
                        if let Some(block) = layout.rotation(width) {
                            hadamard::rotate(&mut vector, block).unwrap();
                        }
                        row.extend(vector);
                    }
                }
                codec::write(&layout, &row, &mut expected, *slot).unwrap();
            }
            for executor in executors() {
                let mut pool = vec![0; 6 * layout.block_bytes()];
                let new = |rows, row, head| NewHeads { rows, row, head };
                let both = (
                    new(Floats::F32(&keys), 400, 100),
                    new(Floats::F32(&values), 200, 64),
                );
                append_heads(executor, &layout, both, &slots, &mut pool);
                assert!(pool == expected, "{format}");
            }
        }
    }

    /// Bytes are the same for any cut of the tokens and any number of threads.
    #[test]
    fn kv_bytes_do_not_depend_on_the_cut() {
        let (latent, rope, tokens) = (512, 64, 70);
        let width = latent + rope;
        let x = noise(tokens * width, 5);
        let (cos, sin, weight) = (noise(tokens * 32, 2), noise(tokens * 32, 3), noise(latent, 4));
        for format in CacheFormat::ALL {
            let layout = RowLayout::latent(format, latent, rope).unwrap();
            let run = |cut: usize, executor: &Executor| {
                let mut pool = vec![0; 5 * layout.block_bytes()];
                for start in (0..tokens).step_by(cut) {
                    let end = (start + cut).min(tokens);
                    let new = NewLatents {
                        rows: Floats::F32(&x[start * width..end * width]),
                        stride: width,
                        weight: &weight,
                        eps: EPS,
                        pairing: Pairing::Interleaved,
                        cos: &cos[start * 32..end * 32],
                        sin: &sin[start * 32..end * 32],
                    };
                    let slots = Slots::new((start as u32..end as u32).collect()).unwrap();
                    append_latents(executor, &layout, new, &slots, &mut pool);
                }
                pool
            };
            for executor in executors() {
                let whole = run(tokens, executor);
                assert!(whole.iter().any(|byte| *byte != 0));
                for cut in [1, 3, 16, 33] {
                    assert!(run(cut, executor) == whole, "{format}, {cut} at a time");
                }
                let other = Executor::new(executor.isa(), 5).unwrap();
                assert!(run(tokens, &other) == whole, "{format}, five threads");
            }
        }
    }

    #[test]
    fn kv_nan_stays_in_its_token() {
        let layout = RowLayout::latent(CacheFormat::fp4(), 64, 2).unwrap();
        let mut x = noise(3 * 66, 1);
        x[66 + 5] = f32::NAN;
        let new = NewLatents {
            rows: Floats::F32(&x),
            stride: 66,
            weight: &[1.0; 64],
            eps: EPS,
            pairing: Pairing::Interleaved,
            cos: &[1.0; 3],
            sin: &[0.0; 3],
        };
        let mut pool = vec![0; layout.block_bytes()];
        append_latents(
            &executors()[0],
            &layout,
            new,
            &Slots::new(vec![0, 1, 2]).unwrap(),
            &mut pool,
        );
        for slot in 0..3 {
            let mut row = vec![0.0; 66];
            codec::read(&layout, &pool, slot, &mut row).unwrap();
            assert_eq!(row[..64].iter().all(|x| x.is_nan()), slot == 1);
            assert!(row[64..].iter().all(|x| x.is_finite()));
        }
    }
}
