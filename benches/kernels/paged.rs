//! Attention of one token over a paged cache, in each format, blocks in no order.

use crate::case::{Bound, Case, Contender, Ready};
use crate::inputs::{COLD, noise};
use candle_mmfp4::cpu::{self, Executor, HeadView, PagedAttention, PagedSequence};
use candle_mmfp4::fp4::Bytes;
use candle_mmfp4::kv::{CacheFormat, RowKind, RowLayout, TOKENS_PER_BLOCK, codec};
use std::sync::Arc;

const FORMATS: [&str; 5] = ["f16", "bf16", "fp8", "fp4-16", "fp4-32"];

/// GLM-4.7-Flash's absorbed heads over `depth` latents: bound by products.
pub fn latents(executor: &Arc<Executor>, depth: usize) -> Case {
    let (heads, latent, rope) = (20, 512, 64);
    Case {
        name: format!("attention-paged-latents-{depth}"),
        title: format!("Attention of one token over {depth} paged latents, {heads} heads"),
        bound: Bound::Floats,
        peer: Some("bf16"),
        contenders: contenders(executor, RowKind::Latent { latent, rope }, heads, depth, |work| {
            (work.operations, work.bytes)
        }),
    }
}

/// Grouped-query attention of 32 heads over 8 of 128 elements: bound by reading, or by decoding.
pub fn grouped(executor: &Arc<Executor>, depth: usize) -> Case {
    let (heads, kv_heads, dim) = (32, 8, 128);
    let kind = RowKind::Heads {
        kv_heads,
        key_dim: dim,
        value_dim: dim,
    };
    Case {
        name: format!("attention-paged-grouped-{depth}"),
        title: format!(
            "Attention of one token over {depth} paged tokens, {heads} heads over {kv_heads} of {dim}"
        ),
        bound: Bound::Bytes,
        peer: Some("f16"),
        contenders: contenders(executor, kind, heads, depth, |work| (work.bytes, work.operations)),
    }
}

/// What a call reads, and the operations of its products.
struct Work {
    bytes: usize,
    operations: usize,
}

/// `bound` tells the work that bounds the case from the other.
fn contenders(
    executor: &Arc<Executor>,
    kind: RowKind,
    heads: usize,
    depth: usize,
    bound: impl Fn(Work) -> (usize, usize),
) -> Vec<Contender> {
    let contender = |name: &'static str| {
        let format: CacheFormat = name.parse().expect("a format");
        let layout = RowLayout::new(format, kind, TOKENS_PER_BLOCK).expect("a layout");
        let widths = cpu::key_width(&layout) + cpu::value_width(&layout);
        let (work, other) = bound(Work {
            bytes: depth * layout.row_bytes(),
            operations: 2 * heads * widths * depth,
        });
        let executor = Arc::clone(executor);
        Contender::new(name, work, move || ready(executor, layout, heads, depth)).beside(other)
    };
    FORMATS.into_iter().map(contender).collect()
}

fn ready(executor: Arc<Executor>, layout: RowLayout, heads: usize, depth: usize) -> Ready {
    let blocks = depth.div_ceil(TOKENS_PER_BLOCK);
    let size = layout.pool_bytes(blocks).expect("sizes that fit");
    // Blocks of random numbers, again and again.
    let mut strip = vec![0; 4 * layout.block_bytes()];
    let numbers = noise(4 * TOKENS_PER_BLOCK * layout.width());
    for (slot, row) in (0..).zip(numbers.chunks_exact(layout.width())) {
        codec::write(&layout, row, &mut strip, slot).expect("a slot of the strip");
    }
    // As many pools as are cold when their turn comes again.
    let pools = COLD / size + 1;
    let memory = Bytes::build(pools * size, |memory| {
        for part in memory.chunks_mut(strip.len()) {
            part.copy_from_slice(&strip[..part.len()]);
        }
        Ok(())
    });
    let memory = memory.expect("memory");
    let step = (blocks / 2..).find(|step| gcd(*step, blocks) == 1).unwrap_or(1);
    let table: Vec<u32> = (0..blocks).map(|i| (i * step % blocks) as u32).collect();
    let (width, value) = (cpu::key_width(&layout), cpu::value_width(&layout));
    let (queries, mut y) = (noise(heads * width), vec![0.0; heads * value]);
    let (regions, mut next) = (vec![memory.clone()], crate::case::in_turn(pools));
    Ready {
        call: Box::new(move || {
            let queries = HeadView {
                data: &queries,
                row: heads * width,
                head: width,
                width,
            };
            let attention = PagedAttention {
                layout: &layout,
                pool: &memory[next() * size..][..size],
                heads,
                queries: &[queries],
                sequences: &[PagedSequence {
                    table: &table,
                    len: depth,
                    queries: 1,
                }],
                window: None,
                scale: 1.0 / 16.0,
            };
            cpu::attend_paged(&executor, attention, &mut y).expect("all of it is there");
        }),
        regions,
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
