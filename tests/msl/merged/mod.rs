//! Products with what attention's parts come to: metal/merged.metal.

pub mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod plan_faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::{bound, nmse, noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, HeadView, PagedAttention as Call, PagedSequence, reference};
use candle_mmfp4::fp4::FloatKind;
use candle_mmfp4::kv::{CacheFormat, RowLayout, codec};
use candle_mmfp4::metal::merged::{Operand, Product, takes};
use candle_mmfp4::ops::{PagedAttention, PagedBatch};
use cases::{Case, Stored, rows};

#[test]
fn merged_products_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    let cases = [cases::fp4(), cases::in_floating_point()].concat();
    for case in &cases {
        case.check(&backend);
    }
    println!("{} cases", cases.len());
}

/// GLM-4.7-Flash's heads at a depth of 8,192 and a token more: the last split has one.
#[test]
fn the_widest_rows_and_many_splits() {
    let Some(backend) = Backend::start() else { return };
    for (dtype, stored) in [
        (DType::BF16, Case::default().stored),
        (DType::F16, Stored::Dense(FloatKind::BF16)),
    ] {
        for (m, splits) in [(1, 33), (8, 33), (2, 129)] {
            let case = Case {
                dtype,
                stored,
                m,
                rows: rows(2, 448, 192, 256),
                k: 512,
                splits,
                ..Case::default()
            };
            case.check(&backend);
        }
    }
}

#[test]
fn nan_and_infinity_stay_visible_in_their_row() {
    let Some(backend) = Backend::start() else { return };
    for stored in [Case::default().stored, Stored::Dense(FloatKind::F16)] {
        for m in [1, 3, 8] {
            for (bad, in_stats) in [
                (f32::NAN, false),
                (f32::INFINITY, false),
                (f32::NAN, true),
                (f32::INFINITY, true),
            ] {
                let case = Case {
                    m,
                    splits: 33,
                    stored,
                    ..Case::default()
                };
                let (op, mut inputs) = (case.op(), case.inputs());
                // Of the last token's split 32; its largest score where it is one of those.
                let bad_input = usize::from(in_stats);
                let width = [case.k, 2][bad_input];
                let mut numbers = values(&inputs[bad_input]);
                let place = numbers.len() - width;
                numbers[place] = bad;
                let shape = inputs[bad_input].shape().clone();
                inputs[bad_input] = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
                let y = backend.run(|device| {
                    let [parts, stats] = inputs.map(|input| input.to_device(device));
                    Ok(op.forward_merged(&parts?, &stats?, DType::F32)?)
                });
                let y = values(&y.unwrap());
                let (before, last) = y.split_at((m - 1) * case.rows.len);
                let what = format!("m {m} {bad} {in_stats}");
                assert!(before.iter().all(|v| v.is_finite()), "{what}");
                assert!(last.iter().all(|v| !v.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let product = |case: &Case, changed: &dyn Fn(&mut Product<'_>)| {
        let op = case.op();
        let mut product = Product {
            weight: Operand::from(op.weight(), 0).unwrap(),
            rows: case.rows,
            parts: 2,
            stats: 3,
            y: 4,
            dtype: case.dtype,
            m: case.m,
            splits: case.splits,
        };
        changed(&mut product);
        product.launch().map_err(|error| error.to_string())
    };
    let plain = Case::default();
    product(&plain, &|_| ()).unwrap();
    type Change<'a> = &'a dyn Fn(&mut Product<'_>);
    let refused: [(&str, Change<'_>); 5] = [
        ("`parts`", &|product| product.m = 9),
        ("`parts`", &|product| product.m = 0),
        ("`splits`", &|product| product.splits = 0),
        ("`splits`", &|product| product.splits = 1 << 32),
        ("`x`", &|product| product.dtype = DType::U32),
    ];
    for (argument, change) in refused {
        let error = product(&plain, change).unwrap_err();
        assert!(error.contains(argument), "{error}");
    }
    let wide = Case { k: 544, ..plain };
    assert!(product(&wide, &|_| ()).unwrap_err().contains("1 to 512"));
    let odd = Case { shift: 2, ..plain };
    assert!(product(&odd, &|_| ()).unwrap_err().contains("4 bytes"));
    // What is launched is what is said to be taken.
    let weight = plain.op().weight().clone();
    assert!(takes(&weight, 1) && takes(&weight, 8));
    assert!(!takes(&weight, 0) && !takes(&weight, 9) && !takes(wide.op().weight(), 1));
}

/// Tokens of sequences, in blocks of 16.
const LENGTHS: [usize; 4] = [300, 1, 256, 530];
const LATENT: usize = 64;
const ROPE: usize = 16;
const HEADS: usize = 3;
const SCALE: f32 = 0.3;

/// A cache of these sequences, in blocks that do not follow each other.
struct Cache {
    layout: RowLayout,
    pool: Vec<u8>,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    fn new(format: CacheFormat) -> Self {
        let layout = RowLayout::latent(format, LATENT, ROPE).unwrap();
        let blocks: usize = LENGTHS.iter().map(|len| len.div_ceil(16)).sum();
        let mut pool = vec![0; layout.pool_bytes(blocks).unwrap()];
        let (mut tables, mut next) = (Vec::new(), blocks as u32);
        for len in LENGTHS {
            let count = len.div_ceil(16) as u32;
            next -= count;
            let table: Vec<_> = (next..next + count).rev().collect();
            for position in 0..len {
                let slot = table[position / 16] * 16 + (position % 16) as u32;
                codec::write(&layout, &noise(LATENT + ROPE, slot.into()), &mut pool, slot).unwrap();
            }
            tables.push(table);
        }
        Self { layout, pool, tables }
    }

    /// Its sequences from one on, each with so many queries, or as many as it has tokens.
    fn sequences(&self, from: usize, queries: usize) -> Vec<PagedSequence<'_>> {
        let all = self.tables.iter().zip(LENGTHS).skip(from);
        all.map(|(table, len)| PagedSequence {
            table,
            len,
            queries: queries.min(len),
        })
        .collect()
    }
}

/// MLA's decoding: attention over sequences of one split, of whole ones and of more, and its values.
#[test]
fn attention_leaves_its_parts_to_the_product_behind_it() {
    let Some(backend) = Backend::start() else { return };
    let case = Case {
        rows: rows(HEADS, 40, 8, 31),
        k: LATENT,
        ..Case::default()
    };
    let values_of = case.op();
    // Of four sequences a token, of the last one, of the last two three: few; and of all of them more than few.
    for (format, from, queries, dtype) in [
        ("bf16", 0, 1, DType::F32),
        ("fp8", 3, 1, DType::BF16),
        ("fp4-16-rotated", 2, 3, DType::F16),
        ("f16", 0, 5, DType::F32),
    ] {
        let cache = Cache::new(format.parse().unwrap());
        let op = PagedAttention::new(cache.layout.clone(), HEADS, SCALE, None).unwrap();
        let sequences = cache.sequences(from, queries);
        let n: usize = sequences.iter().map(|sequence| sequence.queries).sum();
        let queries = Tensor::from_vec(
            noise(n * HEADS * (LATENT + ROPE), 5),
            (n, HEADS, LATENT + ROPE),
            &Device::Cpu,
        );
        let queries = queries.and_then(|queries| queries.to_dtype(dtype)).unwrap();
        let y = backend.run(|device| {
            let batch = PagedBatch::new(&sequences, 16, device)?;
            let pool = Tensor::new(cache.pool.as_slice(), device)?;
            let [latent, rope] = [(0, LATENT), (LATENT, ROPE)]
                .map(|(start, len)| queries.narrow(2, start, len)?.to_device(device));
            Ok(op.forward_expanded(&[&latent?, &rope?], &pool, &batch, &values_of)?)
        });
        let rows = values(&queries);
        let view = HeadView {
            data: &rows,
            row: HEADS * (LATENT + ROPE),
            head: LATENT + ROPE,
            width: LATENT + ROPE,
        };
        let attended = reference::paged_attention(Call {
            layout: &cache.layout,
            pool: &cache.pool,
            heads: HEADS,
            queries: &[view],
            sequences: &sequences,
            window: None,
            scale: SCALE,
        });
        let weight = values_of.weight();
        let expected = reference::per_head(weight, case.rows, &attended, n, Arithmetic::Exact);
        let error = nmse(&values(&y.unwrap()), &expected);
        // Beyond eight tokens attention is rounded before it is multiplied.
        let bound = bound(dtype) * if n > 8 { 2.0 } else { 1.0 };
        assert!(error <= bound, "{format}, {n} tokens, {dtype:?}: {error:e}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn few_tokens_take_two_launches() {
    use candle_mmfp4::metal::host::Host;
    let case = Case {
        rows: rows(HEADS, 40, 8, 31),
        k: LATENT,
        ..Case::default()
    };
    let (cache, values_of) = (Cache::new(CacheFormat::Fp8), case.op());
    let op = PagedAttention::new(cache.layout.clone(), HEADS, SCALE, None).unwrap();
    let launched = |from, queries| {
        let host = std::sync::Arc::new(Host::recorder(false));
        let sequences = cache.sequences(from, queries);
        host.install(|| {
            let batch = PagedBatch::new(&sequences, 16, &Device::Cpu)?;
            let pool = Tensor::new(cache.pool.as_slice(), &Device::Cpu)?;
            let queries = [LATENT, ROPE]
                .map(|width| Tensor::zeros((batch.tokens(), HEADS, width), DType::BF16, &Device::Cpu));
            let [latent, rope] = queries;
            op.forward_expanded(&[&latent?, &rope?], &pool, &batch, &values_of)
        })
        .unwrap();
        assert!(host.without_kernel().is_empty());
        let launches = host.recorded().into_iter().flat_map(|run| run.plan.launches);
        launches.map(|launch| launch.kernel).collect::<Vec<_>>()
    };
    let fused = ["paged_latents_bf16_w128", "merged_fp4_bf16_m1"];
    assert_eq!(launched(3, 1), fused);
    assert_eq!(launched(0, 1), [fused[0], "merged_fp4_bf16_m4"]);
    // Beyond eight tokens each is a launch, and so is what puts parts together.
    assert_eq!(
        launched(0, 5),
        [fused[0], "merge_parts_bf16", "linear_tiles_bf16"]
    );
}
