//! Kernels allocate nothing once they have run, and a decoded token little beside its ops' results.
//!
//! The allocator of this program counts what all threads ask for: calls and bytes of `alloc`, `alloc_zeroed` and
//! `realloc`. What others do in the meantime (the test harness) is kept out by looking at several calls: one without
//! an allocation proves that a call needs none.

mod common;

use candle_core::{Device, Tensor};
use candle_mmfp4::cpu::{
    Arithmetic, Attention, Executor, Expert, Floats, HeadRows, HeadView, Isa, NewHeads, NewLatents,
    PagedAttention, PagedSequence, Pairing, Routing, append_heads, append_latents, attend, attend_paged,
    fused_moe, linear, per_head, per_head_transposed, rms_norm, rope, route,
};
use candle_mmfp4::fp4::{Format, ScaleRule, Weight, quantize};
use candle_mmfp4::kv::{CacheFormat, RowLayout, Slots};
use candle_mmfp4::models::Site;
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model, Sequence};
use candle_mmfp4::nn::CacheSize;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes, Ordering::Relaxed);
}

// SAFETY: every call is the system allocator's own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The tests of this file count one after the other.
static ALONE: Mutex<()> = Mutex::new(());

/// The fewest allocations and the fewest bytes of several calls, after some that may allocate what is kept.
fn fewest(mut call: impl FnMut()) -> (usize, usize) {
    let mut counts = Vec::with_capacity(60);
    for _ in 0..60 {
        let before = (CALLS.load(Ordering::SeqCst), BYTES.load(Ordering::SeqCst));
        call();
        let (calls, bytes) = (CALLS.load(Ordering::SeqCst), BYTES.load(Ordering::SeqCst));
        counts.push((calls - before.0, bytes - before.1));
    }
    counts[20..].iter().copied().min().unwrap()
}

fn values(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7919) % 1013) as f32 / 506.5 - 1.0)
        .collect()
}

fn weight(n: usize, k: usize) -> Weight {
    let format = Format::mmfp4();
    quantize("w", &values(n * k), (n, k), format, ScaleRule::Maximum)
        .unwrap()
        .into()
}

#[test]
fn kernels_allocate_nothing_once_they_have_run() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (d, width, heads) = (256, 128, 4);
    let square = weight(d, d);
    let rows = HeadRows {
        heads,
        stride: d / heads,
        start: 0,
        len: 32,
    };
    let expert = || Expert {
        gate: weight(width, d),
        up: weight(width, d),
        down: weight(d, width),
    };
    let (experts, shared) = ([expert(), expert(), expert()], [expert()]);
    let norm = values(d);
    for isa in Isa::available() {
        for threads in [1, 2] {
            let executor = Executor::new(isa, threads).unwrap();
            // 200 tokens are work for all threads in every step of a kernel.
            for m in [1, 200] {
                let expect_none = |kernel: &str, call: &mut dyn FnMut()| {
                    let (calls, bytes) = fewest(call);
                    let what = format!("{kernel}, {isa:?}, {threads} threads, {m} tokens");
                    assert_eq!((calls, bytes), (0, 0), "{what}: allocations and bytes");
                };
                let x = values(m * d);
                let mut y = vec![0.0; m * d];
                for arithmetic in [Arithmetic::W4A8, Arithmetic::Exact] {
                    expect_none("linear", &mut || {
                        linear(&executor, &[&square], &x, arithmetic, &mut y)
                    });
                }
                let (by_head, mut per) = (values(m * heads * d), vec![0.0; m * heads * rows.len]);
                expect_none("per_head", &mut || {
                    per_head(&executor, &square, rows, &by_head, Arithmetic::W4A8, &mut per)
                });
                let mut wide = vec![0.0; m * heads * d];
                expect_none("per_head_transposed", &mut || {
                    per_head_transposed(&executor, &square, rows, &per, &mut wide)
                });
                let ids: Vec<u32> = (0..2 * m as u32).map(|i| i % 3).collect();
                let weights = vec![0.5; ids.len()];
                expect_none("fused_moe", &mut || {
                    let arithmetic = Arithmetic::W4A8;
                    fused_moe(
                        &executor, &experts, &shared, &x, &ids, &weights, 2, arithmetic, &mut y,
                    )
                });
                let routing = Routing {
                    top_k: 2,
                    n_group: 2,
                    topk_group: 1,
                    normalize: true,
                    scaling_factor: 1.8,
                };
                let (mut chosen, mut shares) = (vec![0; 2 * m], vec![0.0; 2 * m]);
                expect_none("route", &mut || {
                    route(&x[..8 * m], &[0.0; 8], &routing, &mut chosen, &mut shares)
                });
                expect_none("rms_norm", &mut || {
                    rms_norm(&executor, &x, d, &norm, 1e-5, &mut y)
                });
                let angles = values(m * 16);
                let half = HeadView {
                    data: &x,
                    row: d,
                    head: d / heads,
                    width: 32,
                };
                let mut turned = vec![0.0; m * heads * 32];
                expect_none("rope", &mut || {
                    rope(
                        &executor,
                        Pairing::Interleaved,
                        half,
                        heads,
                        (&angles, &angles),
                        &mut turned,
                    )
                });
                let slots = Slots::new((0..m as u32).collect()).unwrap();
                for format in CacheFormat::ALL {
                    let layout = RowLayout::latent(format, 224, 32).unwrap();
                    let mut pool = vec![0; layout.pool_bytes(13).unwrap()];
                    let new = NewLatents {
                        rows: Floats::F32(&x),
                        stride: d,
                        weight: &norm[..224],
                        eps: 1e-6,
                        pairing: Pairing::Interleaved,
                        cos: &angles,
                        sin: &angles,
                    };
                    expect_none("append_latents", &mut || {
                        append_latents(&executor, &layout, new, &slots, &mut pool)
                    });
                    let layout = RowLayout::heads(format, heads, 64, 64).unwrap();
                    let mut pool = vec![0; layout.pool_bytes(13).unwrap()];
                    let new = NewHeads {
                        rows: Floats::F32(&x),
                        row: d,
                        head: 64,
                    };
                    expect_none("append_heads", &mut || {
                        append_heads(&executor, &layout, (new, new), &slots, &mut pool)
                    });
                }
                for shared in [true, false] {
                    let keys = HeadView {
                        head: if shared { 0 } else { d / heads },
                        ..half
                    };
                    let attention = Attention {
                        heads,
                        queries: &[half],
                        keys: &[keys],
                        values: keys,
                        position: 0,
                        window: None,
                        scale: 0.1,
                    };
                    expect_none("attend", &mut || attend(&executor, attention, &mut turned));
                }
                let all = HeadView {
                    width: d / heads,
                    ..half
                };
                for format in [CacheFormat::BF16, CacheFormat::Fp8, CacheFormat::fp4()] {
                    let latents = RowLayout::latent(format, 32, 32).unwrap();
                    let of_heads = RowLayout::heads(format, heads, 64, 32).unwrap();
                    // A step is of one token; of many it is enough to see that kernels share their memory.
                    let windows = if m == 1 { &[None, Some(300)][..] } else { &[None] };
                    for (layout, window) in windows
                        .iter()
                        .flat_map(|window| [(&latents, *window), (&of_heads, *window)])
                    {
                        let table: Vec<u32> = (0..40).rev().collect();
                        let pool = vec![0; layout.pool_bytes(table.len()).unwrap()];
                        let attention = PagedAttention {
                            layout,
                            pool: &pool,
                            heads,
                            queries: &[all],
                            sequences: &[PagedSequence {
                                table: &table,
                                len: 600,
                                queries: m,
                            }],
                            window,
                            scale: 0.1,
                        };
                        let what = format!("attend_paged, {format}, {:?}, window {window:?}", layout.kind());
                        expect_none(&what, &mut || {
                            attend_paged(&executor, attention, &mut turned).unwrap()
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn a_decoded_token_allocates_its_ops_results() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (model, _) = Model::from_folder(common::mmfp4_demo(), &Default::default(), &Device::Cpu).unwrap();
    let mut cache = model.new_cache();
    model.forward(&[1, 2, 3], 0, &mut cache, Logits::Last).unwrap();

    // What an observer sees of a token: the result of each op that has a name.
    let (mut ops, mut results) = (0, 0);
    let mut observe = |_: Site, _: &Tensor, output: &Tensor| {
        ops += 1;
        results += output.elem_count() * output.dtype().size_in_bytes();
        Ok(())
    };
    let mut next = [Sequence {
        tokens: &[4],
        position: cache.len(),
        cache: Some(&mut cache),
    }];
    model
        .forward_batch(&mut next, Logits::Last, Some(&mut observe))
        .unwrap();

    let mut step = || {
        let position = cache.len();
        model.forward(&[5], position, &mut cache, Logits::Last).unwrap();
    };
    let (_, early) = fewest(&mut step);
    // Beside those results there are those without a name (parts of queries and keys, sums with what came before) of
    // about the same size, and for each tensor its shape, its strides and its counters, which Candle allocates.
    let bound = 2 * results + 768 * ops;
    assert!(
        early <= bound,
        "{early} bytes in a step, more than {bound}: {ops} ops with {results} bytes"
    );
    for _ in 0..600 {
        step();
    }
    // No scores, masks, expanded keys or copies of the cache.
    let (_, late) = fewest(&mut step);
    assert_eq!(early, late, "bytes in a step, after few tokens and after many");
}

#[test]
fn a_token_decoded_over_blocks_allocates_no_more_at_depth() {
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (model, _) = Model::from_folder(common::mmfp4_demo(), &Default::default(), &Device::Cpu).unwrap();
    for format in CacheFormat::ALL {
        let mut cache = model.new_paged_cache(format, CacheSize::Tokens(1024)).unwrap();
        let (id, _) = cache.start(&[]);
        let mut step = |token| {
            let tokens = [token];
            model
                .forward_paged(&mut cache, &[(id, &tokens)], Logits::Last, None)
                .unwrap();
        };
        (0..3).for_each(&mut step);
        let (_, early) = fewest(|| step(5));
        (0..600).for_each(&mut step);
        let (_, late) = fewest(|| step(5));
        // The tables of its blocks, 38 of them, and the tokens that a block is known by; no scores, no copy of what is cached.
        assert!(
            late <= early + 4096,
            "{format}: {early} bytes in a step, and {late} after 600 tokens"
        );
    }
}
