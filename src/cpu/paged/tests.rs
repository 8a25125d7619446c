//! Paged attention beside its reference.

use super::*;
use crate::cpu::testing::*;
use crate::cpu::{Isa, reference};
use crate::kv::{CacheFormat, codec};

/// GLM's kind of rows with other widths, and two of heads.
const LATENT: RowKind = RowKind::Latent { latent: 64, rope: 32 };
const HEADS: RowKind = RowKind::Heads {
    kv_heads: 2,
    key_dim: 96,
    value_dim: 64,
};

/// A pool with sequences whose blocks lie in any order among others', which hold NaN.
#[derive(Clone)]
struct Case {
    layout: RowLayout,
    pool: Vec<u8>,
    tables: Vec<Vec<u32>>,
    /// Tokens and queries of each sequence.
    sequences: Vec<(usize, usize)>,
    heads: usize,
    /// `[queries, heads, key width + 1]`.
    queries: Vec<f32>,
    window: Option<usize>,
    scale: f32,
}

impl Case {
    fn new(
        format: CacheFormat,
        kind: RowKind,
        block: usize,
        heads: usize,
        sequences: &[(usize, usize)],
    ) -> Self {
        let layout = RowLayout::new(format, kind, block).unwrap();
        let total: usize = sequences.iter().map(|(len, _)| len.div_ceil(block)).sum();
        let blocks = total + 3;
        // What is in no sequence is NaN in every format.
        let mut pool = vec![0xff; layout.pool_bytes(blocks).unwrap()];
        // A step without a common divisor visits all blocks.
        let step = (blocks / 2..)
            .find(|step| gcd(*step, blocks) == 1)
            .unwrap()
            .max(1);
        let mut order = (0..blocks).map(|i| (i * step % blocks) as u32);
        let mut tables = Vec::new();
        let numbers = noise(65536 + layout.width(), 7);
        for (index, (len, _)) in sequences.iter().enumerate() {
            let table: Vec<u32> = order.by_ref().take(len.div_ceil(block)).collect();
            for position in 0..*len {
                let slot = table[position / block] * block as u32 + (position % block) as u32;
                let start = (position * 97 + index * 31) % 65536;
                let row = &numbers[start..][..layout.width()];
                codec::write(&layout, row, &mut pool, slot).unwrap();
            }
            tables.push(table);
        }
        let count: usize = sequences.iter().map(|(_, queries)| queries).sum();
        let width = key_width(&layout);
        Self {
            pool,
            tables,
            sequences: sequences.to_vec(),
            heads,
            queries: noise(count * heads * (width + 1), 3),
            window: None,
            scale: 1.0 / (width as f32).sqrt(),
            layout,
        }
    }

    fn with<R>(&self, f: impl FnOnce(PagedAttention<'_>) -> R) -> R {
        let width = key_width(&self.layout);
        let (first, second) = match self.layout.kind() {
            RowKind::Latent { latent, rope } => (latent, rope),
            RowKind::Heads { .. } => (width / 2, width - width / 2),
        };
        let part = |start, width: usize, all: usize| HeadView {
            data: &self.queries[start..],
            row: self.heads * all,
            head: all,
            width,
        };
        let queries = [part(0, first, width + 1), part(first, second, width + 1)];
        let sequences: Vec<_> = (self.sequences.iter().zip(&self.tables))
            .map(|((len, queries), table)| PagedSequence {
                table,
                len: *len,
                queries: *queries,
            })
            .collect();
        f(PagedAttention {
            layout: &self.layout,
            pool: &self.pool,
            heads: self.heads,
            queries: &queries[..if second == 0 { 1 } else { 2 }],
            sequences: &sequences,
            window: self.window,
            scale: self.scale,
        })
    }

    fn run(&self, executor: &Executor) -> Vec<f32> {
        self.with(|attention| {
            let mut y = vec![f32::NAN; attention.count() * self.heads * value_width(&self.layout)];
            attend_paged(executor, attention, &mut y).unwrap();
            y
        })
    }

    fn check(&self) {
        let expected = self.with(reference::paged_attention);
        for executor in executors() {
            let bound = if executor.isa() == Isa::Avx512Bf16 {
                1e-5
            } else {
                1e-9
            };
            let what = format!(
                "{} {:?}, {} heads, {:?}, window {:?}, {:?}",
                self.layout.format(),
                self.layout.kind(),
                self.heads,
                self.sequences,
                self.window,
                executor.isa()
            );
            assert_within(&self.run(executor), &expected, bound, &what);
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn formats() -> [CacheFormat; 7] {
    CacheFormat::ALL
}

#[test]
fn paged_depths_agree_with_the_reference() {
    for format in formats() {
        for depth in [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300] {
            Case::new(format, LATENT, 16, 5, &[(depth, 1)]).check();
            Case::new(format, HEADS, 16, 6, &[(depth, 1)]).check();
        }
    }
}

#[test]
fn paged_deep_caches_agree_with_the_reference() {
    for depth in [8191, 8192, 8193, 32769] {
        for format in [
            CacheFormat::BF16,
            CacheFormat::F16,
            CacheFormat::Fp8,
            CacheFormat::fp4(),
        ] {
            Case::new(format, LATENT, 16, 2, &[(depth, 1)]).check();
        }
        Case::new(CacheFormat::fp4(), HEADS, 32, 2, &[(depth, 1)]).check();
    }
}

#[test]
fn paged_widths_of_the_model_and_odd_ones() {
    let kinds = [
        (
            RowKind::Latent {
                latent: 512,
                rope: 64,
            },
            20,
        ),
        (RowKind::Latent { latent: 32, rope: 6 }, 3),
        (RowKind::Latent { latent: 96, rope: 0 }, 2),
        (
            RowKind::Latent {
                latent: 544,
                rope: 16,
            },
            13,
        ),
        (
            RowKind::Heads {
                kv_heads: 2,
                key_dim: 128,
                value_dim: 128,
            },
            8,
        ),
        (
            RowKind::Heads {
                kv_heads: 3,
                key_dim: 64,
                value_dim: 96,
            },
            3,
        ),
        (
            RowKind::Heads {
                kv_heads: 2,
                key_dim: 64,
                value_dim: 64,
            },
            8,
        ),
        (
            RowKind::Heads {
                kv_heads: 4,
                key_dim: 96,
                value_dim: 96,
            },
            4,
        ),
        (
            RowKind::Heads {
                kv_heads: 1,
                key_dim: 256,
                value_dim: 256,
            },
            7,
        ),
    ];
    for (kind, heads) in kinds {
        for format in formats() {
            Case::new(format, kind, 16, heads, &[(200, 1)]).check();
            Case::new(format, kind, 48, heads, &[(140, 9)]).check();
        }
    }
    for format in [CacheFormat::F16, CacheFormat::BF16, CacheFormat::Fp8] {
        for kind in [
            RowKind::Latent { latent: 131, rope: 3 },
            RowKind::Latent { latent: 1, rope: 1 },
            RowKind::Latent { latent: 33, rope: 32 },
            RowKind::Heads {
                kv_heads: 2,
                key_dim: 33,
                value_dim: 17,
            },
        ] {
            Case::new(format, kind, 16, 4, &[(150, 2)]).check();
        }
    }
}

#[test]
fn paged_batches_of_any_lengths() {
    for format in [CacheFormat::BF16, CacheFormat::fp4()] {
        for kind in [LATENT, HEADS] {
            let sequences = [
                (40, 1),
                (0, 0),
                (129, 1),
                (300, 3),
                (1, 1),
                (70, 70),
                (17, 0),
                (128, 128),
            ];
            let mut case = Case::new(format, kind, 16, 6, &sequences);
            case.check();
            for window in [1, 2, 16, 100, 129, 1000] {
                case.window = Some(window);
                case.check();
            }
        }
    }
}

/// More groups than are taken apart, or more heads than a group has rows.
#[test]
fn paged_prompts_and_many_heads() {
    Case::new(CacheFormat::BF16, LATENT, 16, 20, &[(400, 230)]).check();
    Case::new(CacheFormat::fp4(), HEADS, 16, 4, &[(1100, 1100)]).check();
    Case::new(CacheFormat::Fp8, LATENT, 16, 130, &[(200, 3)]).check();
}

/// Tokens in three chunks, and (with twelve heads) more groups than are taken apart.
const TOKENS: usize = 520;

/// However a prompt is cut and whoever else is in the call: the same bits.
#[test]
fn paged_outputs_depend_on_the_sequence_alone() {
    for format in [CacheFormat::BF16, CacheFormat::fp4()] {
        for kind in [LATENT, HEADS] {
            for window in [None, Some(61)] {
                for executor in executors() {
                    let mut whole = Case::new(format, kind, 16, 12, &[(TOKENS, TOKENS)]);
                    whole.window = window;
                    let expected = whole.run(executor);
                    let (row, query) = (expected.len() / TOKENS, whole.queries.len() / TOKENS);
                    for (from, step) in [(TOKENS - 3, 1), (500, 7), (0, 128), (0, 200)] {
                        for start in (from..TOKENS).step_by(step) {
                            let end = (start + step).min(TOKENS);
                            let part = Case {
                                sequences: vec![(end, end - start)],
                                queries: whole.queries[start * query..end * query].to_vec(),
                                ..whole.clone()
                            };
                            let y = part.run(executor);
                            let mut pairs = y.iter().zip(&expected[start * row..end * row]);
                            assert!(
                                pairs.all(|(a, b)| a.to_bits() == b.to_bits()),
                                "{format} {kind:?} {window:?} {:?}: {start}..{end}",
                                executor.isa()
                            );
                        }
                    }
                }
            }
        }
    }
}

/// What a thread has kept from other calls is nobody's number.
#[test]
fn paged_scratch_is_not_read() {
    let wide = RowKind::Latent { latent: 128, rope: 0 };
    let mut before = Case::new(CacheFormat::F16, wide, 16, 3, &[(300, 1)]);
    before.pool.fill(0xff);
    for format in [CacheFormat::F16, CacheFormat::BF16, CacheFormat::Fp8] {
        for kind in [RowKind::Latent { latent: 33, rope: 32 }, HEADS] {
            let case = Case::new(format, kind, 16, 4, &[(280, 3)]);
            let expected = case.with(reference::paged_attention);
            for isa in Isa::available() {
                let executor = Executor::new(isa, 1).unwrap();
                assert!(before.run(&executor).iter().all(|v| v.is_nan()));
                assert_within(
                    &case.run(&executor),
                    &expected,
                    1e-5,
                    &format!("{format} {kind:?} {isa:?}"),
                );
            }
        }
    }
}

#[test]
fn paged_threads_change_no_bit() {
    for (sequences, heads) in [
        (vec![(700, 1)], 20),
        (vec![(90, 1)], 20),
        (vec![(400, 3), (20, 1), (300, 77)], 4),
        (vec![(500, 400)], 20),
    ] {
        for kind in [LATENT, HEADS] {
            let case = Case::new(CacheFormat::fp4(), kind, 16, heads, &sequences);
            assert_same_bits_for_any_threads(|executor| case.run(executor));
        }
    }
}

/// Only who sees it: earlier queries of the same call, and later ones whose window has left it behind, do not.
#[test]
fn paged_nan_and_infinity_stay_visible() {
    for format in formats() {
        for kind in [LATENT, HEADS] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut case = Case::new(format, kind, 16, 4, &[(180, 170)]);
                case.window = Some(40);
                let slot = case.tables[0][100 / 16] * 16 + 100 % 16;
                let mut row = noise(case.layout.width(), 1);
                row.fill(bad);
                codec::write(&case.layout, &row, &mut case.pool, slot).unwrap();
                for executor in executors() {
                    let y = case.run(executor);
                    let len = y.len() / 170;
                    for (query, y) in y.chunks_exact(len).enumerate() {
                        let sees = (100..140).contains(&(query + 10));
                        let what = format!("{format} {kind:?} {bad} {query} {:?}", executor.isa());
                        match sees {
                            true => assert!(y.iter().all(|v| !v.is_finite()), "{what}"),
                            false => assert!(y.iter().all(|v| v.is_finite()), "{what}"),
                        }
                    }
                }
                let mut case = Case::new(format, kind, 16, 4, &[(180, 2)]);
                case.queries[0] = bad;
                for executor in executors() {
                    let y = case.run(executor);
                    let value = value_width(&case.layout);
                    assert!(y[..value].iter().all(|v| v.is_nan()));
                    assert!(y[value..].iter().all(|v| v.is_finite()));
                }
            }
        }
    }
}

#[test]
fn gathered_tokens_are_the_codecs_bit_for_bit() {
    for format in formats() {
        for kind in [LATENT, HEADS, RowKind::Latent { latent: 288, rope: 6 }] {
            let case = Case::new(format, kind, 16, 2, &[(100, 1)]);
            let (layout, width) = (&case.layout, case.layout.width());
            for positions in [0..100, 17..17, 13..14, 31..65] {
                let mut expected = vec![0.0; positions.len() * width];
                for (position, row) in positions.clone().zip(expected.chunks_exact_mut(width)) {
                    let slot = case.tables[0][position / 16] * 16 + (position % 16) as u32;
                    codec::read(layout, &case.pool, slot, row).unwrap();
                    let mut rest = row;
                    for (index, part) in layout.parts().iter().enumerate() {
                        let (vector, tail) = rest.split_at_mut(part.width);
                        let rotary = index == 1 && matches!(kind, RowKind::Latent { .. });
                        if let Some(block) = layout.rotation(part.width).filter(|_| !rotary) {
                            hadamard::unrotate(vector, block).unwrap();
                        }
                        rest = tail;
                    }
                }
                for executor in executors() {
                    let mut found = vec![f32::NAN; expected.len()];
                    gather(
                        executor,
                        layout,
                        &case.pool,
                        &case.tables[0],
                        positions.clone(),
                        &mut found,
                    )
                    .unwrap();
                    let same = found
                        .iter()
                        .zip(&expected)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{format} {kind:?} {positions:?} {:?}", executor.isa());
                }
            }
        }
    }
}

/// All codes with scales of all sizes, as any writer may have them. (Zero may lose its sign: it does on its way through
/// integers on NEON.)
#[test]
fn all_bytes_decode_as_the_codecs() {
    for format in [
        CacheFormat::Fp8,
        CacheFormat::fp4(),
        CacheFormat::F16,
        CacheFormat::BF16,
    ] {
        let layout = RowLayout::new(format, RowKind::Latent { latent: 256, rope: 0 }, 16).unwrap();
        let (part, bytes) = (layout.parts()[0], layout.block_bytes());
        for seed in 0..300u32 {
            let mut random = crate::random::Random::new(u64::from(seed));
            let mut pool = vec![0; bytes];
            random.fill(&mut pool);
            if format == CacheFormat::Fp8 {
                for (code, byte) in pool[part.codes..].iter_mut().zip(0..=255u8) {
                    *code = byte;
                }
                for scale in pool[part.scales..].as_chunks_mut().0.iter_mut().take(2) {
                    *scale = ((seed % 255) << 23 | (seed / 255) << 17).to_le_bytes();
                }
            }
            let mut expected = vec![0.0; 256];
            codec::read(&layout, &pool, 0, &mut expected).unwrap();
            for executor in executors() {
                let mut found = vec![0.0; 256];
                gather(executor, &layout, &pool, &[0], 0..1, &mut found).unwrap();
                for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                    let same = a == b || a.is_nan() && b.is_nan();
                    assert!(same, "{format} {seed} {i} {:?}: {a} for {b}", executor.isa());
                }
            }
        }
    }
}

/// Of a token alone the output is its value: what the kernels decode, once rounded where they round.
#[test]
fn attention_reads_all_bytes_as_the_codecs() {
    for format in formats() {
        let kind = RowKind::Heads {
            kv_heads: 1,
            key_dim: 32,
            value_dim: 256,
        };
        let layout = RowLayout::new(format, kind, 16).unwrap();
        let part = layout.parts()[1];
        for seed in 0..300u32 {
            let mut random = crate::random::Random::new(u64::from(seed));
            let mut pool = vec![0; layout.block_bytes()];
            random.fill(&mut pool[part.codes..]);
            if format == CacheFormat::Fp8 {
                for (code, byte) in pool[part.codes..].iter_mut().take(256).zip(0..=255u8) {
                    *code = byte;
                }
                // Powers of two, others, and (without a NaN in its group) the first of both.
                for scale in pool[part.scales..].as_chunks_mut().0.iter_mut().take(2) {
                    *scale = ((seed % 255) << 23 | (seed / 255) << 17).to_le_bytes();
                }
                for nan in [0x7f, 0xff] {
                    pool[part.codes + nan] = if seed % 2 == 0 { nan as u8 } else { 0x85 };
                }
            }
            let mut expected = vec![0.0; 32 + 256];
            codec::read(&layout, &pool, 0, &mut expected).unwrap();
            let mut expected = expected.split_off(32);
            rotate(&layout, &mut expected, hadamard::unrotate_whole);
            for executor in executors() {
                let mut found = vec![0.0; 256];
                let attention = PagedAttention {
                    layout: &layout,
                    pool: &pool,
                    heads: 1,
                    queries: &[HeadView {
                        data: &[0.0; 32],
                        row: 32,
                        head: 32,
                        width: 32,
                    }],
                    sequences: &[PagedSequence {
                        table: &[0],
                        len: 1,
                        queries: 1,
                    }],
                    window: None,
                    scale: 1.0,
                };
                attend_paged(executor, attention, &mut found).unwrap();
                let rounds = executor.isa() == Isa::Avx512Bf16;
                for (i, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                    let rounded = half::bf16::from_f32(b).to_f32();
                    let tiny = rounds && a == 0.0 && b.abs() < 2.0 * f32::MIN_POSITIVE;
                    let same = a == b || a.is_nan() && b.is_nan() || rounds && a == rounded || tiny;
                    assert!(same, "{format} {seed} {i} {:?}: {a:e} for {b:e}", executor.isa());
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let case = Case::new(CacheFormat::BF16, HEADS, 16, 4, &[(40, 2)]);
    let executor = &executors()[0];
    case.with(|attention| {
        let mut y = vec![0.0; 2 * 4 * 64];
        let mut wrong = |argument: &str, attention: PagedAttention<'_>| {
            let error = attend_paged(executor, attention, &mut y).unwrap_err().to_string();
            assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
        };
        let sequence = attention.sequences[0];
        for heads in [0, 3] {
            wrong("heads", PagedAttention { heads, ..attention });
        }
        wrong(
            "window",
            PagedAttention {
                window: Some(0),
                ..attention
            },
        );
        wrong(
            "queries",
            PagedAttention {
                queries: &[],
                ..attention
            },
        );
        wrong(
            "queries",
            PagedAttention {
                queries: &attention.queries[..1],
                ..attention
            },
        );
        fn with(sequence: PagedSequence<'_>) -> [PagedSequence<'_>; 1] {
            [sequence]
        }
        let many = with(PagedSequence {
            queries: 41,
            ..sequence
        });
        wrong(
            "queries",
            PagedAttention {
                sequences: &many,
                ..attention
            },
        );
        let many = with(PagedSequence {
            queries: 3,
            ..sequence
        });
        wrong(
            "queries",
            PagedAttention {
                sequences: &many,
                ..attention
            },
        );
        let twice = [PagedSequence {
            queries: usize::MAX,
            len: usize::MAX,
            ..sequence
        }; 2];
        wrong(
            "queries",
            PagedAttention {
                sequences: &twice,
                ..attention
            },
        );
        let short = with(PagedSequence {
            table: &sequence.table[..2],
            ..sequence
        });
        wrong(
            "tables",
            PagedAttention {
                sequences: &short,
                ..attention
            },
        );
        for block in [6, u32::MAX] {
            let mut table = sequence.table.to_vec();
            table[1] = block;
            let beyond = with(PagedSequence {
                table: &table,
                ..sequence
            });
            wrong(
                "tables",
                PagedAttention {
                    sequences: &beyond,
                    ..attention
                },
            );
            // Whom nobody sees may be anywhere.
            let unseen = [block, table[0], table[2]];
            let unseen = with(PagedSequence {
                table: &unseen,
                ..sequence
            });
            let windowed = PagedAttention {
                sequences: &unseen,
                window: Some(4),
                ..attention
            };
            assert!(attend_paged(executor, windowed, &mut vec![0.0; 2 * 4 * 64]).is_ok());
        }
        wrong(
            "tables",
            PagedAttention {
                pool: &attention.pool[..5],
                ..attention
            },
        );
        assert!(attend_paged(executor, attention, &mut [0.0; 3]).is_err());
    });
    let gathered = |table: &[u32], positions, len| {
        gather(
            executor,
            &case.layout,
            &case.pool,
            table,
            positions,
            &mut vec![0.0; len],
        )
    };
    let width = case.layout.width();
    assert!(gathered(&[0, 5], 0..32, 32 * width).is_ok());
    assert!(gathered(&[0, 6], 0..32, 32 * width).is_err());
    assert!(gathered(&[0, 5], 0..33, 33 * width).is_err());
    assert!(gathered(&[0, 5], 0..32, 31 * width).is_err());
}
