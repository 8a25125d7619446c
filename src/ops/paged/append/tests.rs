//! New tokens on the CPU.

use super::*;
use crate::cpu::{PagedSequence, Pairing};
use crate::kv::{CacheFormat, codec};
use crate::ops::RmsNorm;
use candle_core::{Device, IndexOp};

fn norm() -> RmsNorm {
    RmsNorm::new((0..32).map(|i| 1.0 + i as f32 / 32.0).collect(), 1e-6).unwrap()
}

fn append(format: CacheFormat) -> AppendLatents {
    let layout = RowLayout::latent(format, 32, 4).unwrap();
    AppendLatents::new(norm(), Pairing::Interleaved, layout).unwrap()
}

fn noise(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

fn pool(layout: &RowLayout, blocks: usize) -> Tensor {
    Tensor::zeros(layout.pool_bytes(blocks).unwrap(), DType::U8, &Device::Cpu).unwrap()
}

/// Tokens that are written to these slots.
fn batch(range: std::ops::Range<u32>) -> PagedBatch {
    let table: Vec<u32> = (0..range.end.div_ceil(16)).collect();
    let sequence = PagedSequence {
        table: &table,
        len: range.end as usize,
        queries: range.len(),
    };
    PagedBatch::new(&[sequence], 16, &Device::Cpu).unwrap()
}

/// What the cache without formats keeps is what this keeps, in the formats that are its dtypes.
#[test]
fn kv_append_stores_what_latent_rows_gives() {
    for (format, dtype) in [(CacheFormat::BF16, DType::BF16), (CacheFormat::F16, DType::F16)] {
        let op = append(format);
        let rows = crate::ops::LatentRows::new(norm(), Pairing::Interleaved);
        let kv = noise((5, 40)).to_dtype(dtype).unwrap().narrow(1, 3, 36).unwrap();
        let (cos, sin) = (noise((5, 2)), noise((5, 2)));
        let expected = rows.forward(&kv, &cos, &sin).unwrap();
        let pool = pool(op.layout(), 1);
        op.forward(&pool, &kv, &cos, &sin, &batch(4..9)).unwrap();
        let bytes = pool.to_vec1::<u8>().unwrap();
        for (i, expected) in expected
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()
            .iter()
            .enumerate()
        {
            let mut row = vec![0.0; 36];
            codec::read(op.layout(), &bytes, 4 + i as u32, &mut row).unwrap();
            assert_eq!(row, *expected, "{format}");
        }
    }
}

#[test]
fn kv_append_takes_rows_as_they_lie() {
    let op = append(CacheFormat::Fp8);
    let (wide, cos, sin) = (noise((36, 6)), noise((2, 6)), noise((6, 2)));
    let (kv, cos) = (wide.t().unwrap(), cos.t().unwrap());
    let run = |kv: &Tensor, cos: &Tensor| {
        let pool = pool(op.layout(), 2);
        op.forward(&pool, kv, cos, &sin, &batch(12..18)).unwrap();
        pool.to_vec1::<u8>().unwrap()
    };
    let expected = run(&kv.contiguous().unwrap(), &cos.contiguous().unwrap());
    assert!(run(&kv, &cos) == expected);

    let heads = AppendHeads::new(RowLayout::heads(CacheFormat::fp4(), 2, 32, 16).unwrap()).unwrap();
    let (keys, values) = (noise((6, 32, 2)), noise((2, 6, 20)));
    let keys = keys.transpose(1, 2).unwrap();
    let values = values.transpose(0, 1).unwrap().narrow(2, 4, 16).unwrap();
    let run = |keys: &Tensor, values: &Tensor| {
        let pool = pool(heads.layout(), 2);
        heads.forward(&pool, keys, values, &batch(12..18)).unwrap();
        pool.to_vec1::<u8>().unwrap()
    };
    let expected = run(&keys.contiguous().unwrap(), &values.contiguous().unwrap());
    assert!(run(&keys, &values) == expected && expected.iter().any(|byte| *byte != 0));
}

#[test]
fn kv_append_names_what_does_not_fit() {
    let op = append(CacheFormat::fp4());
    let (good, kv, angles) = (pool(op.layout(), 2), noise((3, 36)), noise((3, 2)));
    fn last(table: &[u32]) -> PagedSequence<'_> {
        PagedSequence {
            table,
            len: 3,
            queries: 1,
        }
    }
    let of = |tables: &[&[u32]]| {
        let sequences: Vec<_> = tables.iter().map(|table| last(table)).collect();
        PagedBatch::new(&sequences, 16, &Device::Cpu)
    };
    let wrong = |argument: &str, pool: &Tensor, kv: &Tensor, cos: &Tensor, batch: &PagedBatch| {
        let before = pool.flatten_all().unwrap().to_dtype(DType::U8).unwrap();
        let before = before.to_vec1::<u8>().unwrap();
        let error = op.forward(pool, kv, cos, &angles, batch).unwrap_err().to_string();
        assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
        let after = pool.flatten_all().unwrap().to_dtype(DType::U8).unwrap();
        assert!(after.to_vec1::<u8>().unwrap() == before);
    };
    op.forward(&good, &kv, &angles, &angles, &batch(29..32)).unwrap();
    wrong("slots", &good, &kv, &angles, &batch(30..33));
    wrong("slots", &good, &kv, &angles, &of(&[&[u32::MAX / 16]]).unwrap());
    let wide = PagedBatch::new(&[last(&[0])], 32, &Device::Cpu).unwrap();
    wrong("batch", &good, &kv, &angles, &wide);
    wrong("kv", &good, &kv, &angles, &batch(0..2));
    wrong("kv", &good, &noise((3, 35)), &angles, &batch(0..3));
    wrong(
        "kv",
        &good,
        &kv.to_dtype(DType::F64).unwrap(),
        &angles,
        &batch(0..3),
    );
    wrong("cos", &good, &kv, &noise((3, 1)), &batch(0..3));
    let cut = good.narrow(0, 0, good.elem_count() - 1).unwrap();
    wrong("pool", &cut, &kv, &angles, &batch(0..3));
    wrong(
        "pool",
        &good.to_dtype(DType::U32).unwrap(),
        &kv,
        &angles,
        &batch(0..3),
    );
    wrong("pool", &good.unsqueeze(0).unwrap(), &kv, &angles, &batch(0..3));
    let error = |tables: &[&[u32]]| of(tables).unwrap_err().to_string();
    assert!(error(&[&[1], &[2], &[1]]).contains("slot 18 twice"));
    assert!(error(&[&[u32::MAX]]).contains("below 2³²") && error(&[&[]]).contains("blocks for the 3 tokens"));
    op.forward(
        &good,
        &kv.i(0..0).unwrap(),
        &angles.i(0..0).unwrap(),
        &angles.i(0..0).unwrap(),
        &batch(0..0),
    )
    .unwrap();

    let norm = RmsNorm::new(vec![1.0; 16], 1e-6).unwrap();
    let layout = op.layout().clone();
    assert!(AppendLatents::new(norm, Pairing::Halves, layout.clone()).is_err());
    assert!(AppendHeads::new(layout).is_err());
    let heads = AppendHeads::new(RowLayout::heads(CacheFormat::F16, 2, 4, 4).unwrap()).unwrap();
    let (pool, keys) = (pool(heads.layout(), 1), noise((3, 2, 4)));
    let wrong = |keys: &Tensor, values: &Tensor, batch: PagedBatch| {
        heads
            .forward(&pool, keys, values, &batch)
            .unwrap_err()
            .to_string()
    };
    assert!(wrong(&noise((3, 1, 4)), &keys, batch(0..3)).contains("`keys`"));
    assert!(wrong(&keys, &noise((3, 2, 5)), batch(0..3)).contains("`values`"));
    assert!(wrong(&keys, &keys, batch(14..17)).contains("`slots`"));
}
