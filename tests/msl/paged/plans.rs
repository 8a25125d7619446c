//! Plans of attention over a paged cache, by themselves.

use super::cases::{heads, latent};
use candle_core::DType;
use candle_mmfp4::kv::{CacheFormat, RowKind, RowLayout};
use candle_mmfp4::metal::norm_rope::Heads;
use candle_mmfp4::metal::paged_attention::{At, Attention, Gather, check, every_kernel, splits_seen};
use candle_mmfp4::metal::plan::{Binding, Launch};

fn layout(kind: RowKind) -> RowLayout {
    RowLayout::new(CacheFormat::BF16, kind, 16).unwrap()
}

fn attention(layout: &RowLayout, count: usize, tokens: usize, longest: usize) -> Attention<'_> {
    let at = |operand| At { operand, offset: 0 };
    let of = |operand, width| Heads {
        operand,
        offset: 0,
        count,
        token: count * width,
        head: width,
    };
    let is_latent = matches!(layout.kind(), RowKind::Latent { .. });
    Attention {
        layout,
        dtype: DType::F16,
        scale: 1.0,
        window: None,
        tokens,
        longest,
        splits: splits_seen(layout, &(0..longest)),
        seen: longest,
        pairs: tokens * longest,
        queries: of(0, 512),
        rotary: is_latent.then(|| of(1, 64)),
        pool: at(2),
        index: at(3),
    }
}

#[test]
fn all_heads_of_a_token_share_a_threadgroup_up_to_24() {
    let layout = layout(latent(512, 64));
    let launch = |heads| attention(&layout, heads, 3, 1000).parts(4, 5).unwrap();
    for (heads, groups, threads) in [
        (1, 1, 32),
        (20, 1, 320),
        (24, 1, 384),
        (25, 2, 7 * 32),
        (128, 6, 11 * 32),
    ] {
        let Launch {
            threadgroups,
            threads: found,
            ..
        } = launch(heads);
        assert_eq!(
            (threadgroups, found),
            ([16, 3, groups], [threads, 1, 1]),
            "{heads} heads"
        );
    }
    // GLM-4.7-Flash's token: every byte of the cache once.
    let work = launch(20).work;
    let queries = 3 * 20 * 576 * 2;
    assert_eq!(work.read, 1000 * 1152 + queries + (6 + 63) * 4);
    assert_eq!(work.written, 3 * 20 * 16 * (512 + 2) * 4);
    assert_eq!(work.operations, 3 * 1000 * 20 * 2 * (576 + 512));
}

#[test]
fn query_heads_of_a_kv_head_share_a_threadgroup_up_to_eight() {
    let launch = |kv_heads, width, count| {
        let layout = layout(heads(kv_heads, width, width));
        let launch = attention(&layout, count, 1, 100).parts(4, 5).unwrap();
        (launch.kernel, launch.threadgroups[2])
    };
    assert_eq!(launch(8, 128, 8), ("paged_heads_f16_w128_r1".into(), 8));
    assert_eq!(launch(8, 128, 32), ("paged_heads_f16_w128_r4".into(), 8));
    assert_eq!(launch(8, 64, 64), ("paged_heads_f16_w128_r8".into(), 8));
    assert_eq!(launch(2, 96, 34), ("paged_heads_f16_w128_r8".into(), 6));
    assert_eq!(launch(1, 256, 8), ("paged_heads_f16_w256_r4".into(), 2));
}

#[test]
fn splits_are_those_that_a_query_sees() {
    // How many splits begin, end or lie among the positions, cut as the kernels cut them.
    let counted = |block: usize, visible: std::ops::Range<usize>| {
        let most = (22 + visible.end / 4096) * block;
        let tokens = 64usize
            .next_multiple_of(block)
            .max(((visible.end - 1) / most + 1) * block);
        visible
            .map(|at| at / tokens)
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    for block in [16, 48, 128] {
        let layout = RowLayout::new(CacheFormat::BF16, latent(512, 64), block).unwrap();
        for end in [1, 63, 64, 65, 128, 1408, 1409, 4095, 4096, 8192, 32_769] {
            for window in [1, 2, 63, 64, 65, 66, 1000, 1 << 20] {
                let visible = end - window.min(end)..end;
                let found = splits_seen(&layout, &visible);
                assert_eq!(
                    found,
                    counted(block, visible.clone()),
                    "{visible:?} in blocks of {block}"
                );
            }
        }
        assert!(splits_seen(&layout, &(0..8192)) <= 24);
    }
}

#[test]
fn many_queries_have_parts_of_some_at_a_time() {
    let layout = layout(latent(512, 64));
    let few = attention(&layout, 20, 8, 64);
    let (launches, scratch) = few.launches(4, 5).unwrap();
    assert_eq!((launches.len(), scratch.len()), (1, 0));
    let many = attention(&layout, 20, 500, 4096);
    let (launches, scratch) = many.launches(4, 5).unwrap();
    assert!(scratch[0] <= 64 << 20, "{scratch:?}");
    // Each token's part, and its output, once.
    let (mut tokens, mut outputs) = (0, 0);
    for pair in launches.chunks(2) {
        let [attend, merge] = pair else {
            panic!("pairs of launches")
        };
        let Some((_, Binding::Write { operand: 4, offset })) = merge.bindings.get(2) else {
            panic!("{merge:?}")
        };
        assert_eq!(*offset, outputs * 512 * 2);
        assert_eq!(attend.threadgroups[1] * 20, merge.threadgroups[0]);
        tokens += attend.threadgroups[1];
        outputs += merge.threadgroups[0];
    }
    assert_eq!((tokens, outputs), (500, 500 * 20));
}

#[test]
fn what_no_kernel_takes_is_refused() {
    for kind in [
        latent(513, 64),
        latent(512, 65),
        heads(1, 257, 8),
        heads(1, 8, 257),
    ] {
        let layout = layout(kind);
        assert!(check(&layout).is_err());
        let error = attention(&layout, 1, 1, 1).parts(4, 5).unwrap_err().to_string();
        assert!(error.contains("`layout`") && error.contains("512"), "{error}");
    }
    let layout = layout(latent(512, 64));
    let plain = attention(&layout, 20, 1, 1);
    let refused = |attention: Attention<'_>, part: &str| {
        let error = attention.parts(4, 5).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let odd = At {
        operand: 2,
        offset: 8,
    };
    refused(Attention { pool: odd, ..plain }, "16 bytes");
    refused(
        Attention {
            longest: 1 << 32,
            ..plain
        },
        "2^32",
    );
    refused(
        Attention {
            dtype: DType::U32,
            ..plain
        },
        "F32, F16 or BF16",
    );
    let gather = Gather {
        layout: &layout,
        dtype: DType::F32,
        positions: 0..1,
        table: 0,
        pool: odd,
        index: odd,
        y: 2,
    };
    let error = gather.launch().unwrap_err().to_string();
    assert!(error.contains("16 bytes"), "{error}");
    assert!(every_kernel(DType::U32).is_err());
}
