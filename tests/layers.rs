//! The ops and layers as a user of Candle meets them, against the plain reference.
//!
//! What others got wrong when GLM-4.7-Flash was new, each with the test that would notice it here:
//!
//! |  # | pitfall | noticed by |
//! |---:|---|---|
//! |  1 | softmax instead of sigmoid in the router | `routing_is_sigmoid_with_bias_for_the_choice_only`, golden.rs |
//! |  2 | experts' weights scaled by 0, or only sometimes | the same, with and without normalisation |
//! |  3 | correction bias changes the weights | the same |
//! |  4 | router in half precision | `a_router_of_half_precision_inputs_scores_in_f32` |
//! |  5 | keys and values of all heads cached | conversation.rs, `the_cache_holds_one_latent_a_token` |
//! |  6 | values cached beside the latent | the same |
//! |  7 | head counts and widths that kernels lack | `per_head_products_in_both_orientations` (3 and 5 heads) |
//! |  9 | only the first end token counts | conversation.rs, `every_end_token_ends` |
//! | 10 | rotary pairs | golden.rs (plain and half-rope models), nn/rope.rs |
//! | 11 | a norm missing or misplaced | golden.rs, hidden states layer by layer; checkpoints.rs, missing norms |
//! | 12 | one tensor factor for gate and up | `experts_keep_their_own_tensor_factors` |
//! | 13 | output head or router quantised | checkpoints.rs, `what_is_sensitive_stays_in_floating_point` |
//! | 14 | absorbed attention for long prefill | models/glm4_moe_lite/attention.rs, golden.rs (both ways agree) |
//! | 15 | thinking switched off wrongly, also in history | chat_template.rs, generation/output.rs, conversation.rs |
//! | 16 | tool calls in a stream | generation/output.rs |
//! | 17 | the layer for several tokens at once | checkpoints.rs, `the_next_token_layer_is_ignored_and_counted` |
//! | 18 | results depend on the batch's shape | conversation.rs, `a_batch_gives_what_each_gives_alone`, golden.rs |
//! | 19 | kv_b requantised to be split | `per_head_products_in_both_orientations`: used as it lies, in every group |
//! | 20 | two or three tokens an expert | `experts_agree_with_the_reference`, cpu/moe.rs |
//!
//! 8 (a quantised cache) does not apply yet: this cache is not quantised, nothing is rotated by Hadamard.

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_mmfp4::cpu::{Arithmetic, Expert, HeadRows, Routing, reference};
use candle_mmfp4::fp4::{
    Bytes, DenseTensor, Factor, FloatKind, Format, Fp4Tensor, GROUPS, Parts, ScaleKind, ScaleRule, Weight,
    quantize,
};
use candle_mmfp4::nn::mask::{Mask, left_padded};
use candle_mmfp4::nn::{Embedding, FusedMoe, MmfP4Linear, Router, TokenCache, linear, linear_no_bias};
use candle_mmfp4::ops::{self, Orientation, PerHead, Route};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_nmse, noise, values};
use half::{bf16, f16};
use std::collections::HashMap;

const CPU: Device = Device::Cpu;
const KINDS: [ScaleKind; 4] = [ScaleKind::F16, ScaleKind::BF16, ScaleKind::E8M0, ScaleKind::E4M3];
/// Dtypes with the error that rounding the output to them allows.
const DTYPES: [(DType, f64); 3] = [(DType::F32, 1e-9), (DType::F16, 3e-7), (DType::BF16, 1e-5)];

fn packed(n: usize, k: usize, format: Format, seed: u64) -> Fp4Tensor {
    quantize("w", &noise(n * k, seed), (n, k), format, ScaleRule::Maximum).unwrap()
}

fn tensor(shape: impl Into<candle_core::Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    Tensor::from_vec(noise(shape.elem_count(), seed), shape, &CPU).unwrap()
}

/// Tensors of `[…, tail]` of every rank, contiguous, strided, offset, and with strides of 0.
fn layouts(tail: &[usize], dtype: DType) -> Vec<(&'static str, Tensor)> {
    // Views come after the conversion, which would lay their elements out anew.
    let tensor = |shape: Vec<usize>, seed| tensor(shape, seed).to_dtype(dtype).unwrap();
    let shape = |leading: &[usize]| [leading, tail].concat();
    let last = tail[tail.len() - 1];
    let mut wide = shape(&[5]);
    *wide.last_mut().unwrap() += 48;
    let mut narrow = shape(&[5]);
    *narrow.last_mut().unwrap() = 1;
    let mut flipped = shape(&[5]);
    flipped.rotate_right(1); // [last, 5, …]
    let backwards = tensor(flipped, 5);
    let order: Vec<usize> = (1..backwards.rank()).chain([0]).collect();
    vec![
        ("no leading dimension", tensor(shape(&[]), 1)),
        ("one", tensor(shape(&[5]), 2)),
        ("two", tensor(shape(&[2, 3]), 3)),
        ("three", tensor(shape(&[2, 1, 3]), 4)),
        ("transposed", backwards.permute(order).unwrap()),
        ("narrowed rows", tensor(shape(&[9]), 6).narrow(0, 3, 4).unwrap()),
        (
            "narrowed columns",
            tensor(wide.clone(), 7).narrow(wide.len() - 1, 16, last).unwrap(),
        ),
        (
            "swapped batch",
            tensor(shape(&[3, 4]), 8).transpose(0, 1).unwrap(),
        ),
        (
            "one row for all",
            tensor(shape(&[1]), 9).broadcast_as(shape(&[6])).unwrap(),
        ),
        (
            "one column for all",
            tensor(narrow, 10).broadcast_as(shape(&[5])).unwrap(),
        ),
        ("no rows", tensor(shape(&[0]), 11)),
    ]
}

/// The error's text, which has to hold every one of `parts`.
fn assert_error<T>(result: Result<T, impl std::fmt::Display>, parts: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} should hold {part:?}");
    }
}

#[test]
fn linear_takes_any_shape_layout_and_dtype() {
    let (n, k) = (65, 256);
    let weight = Weight::from(packed(n, k, Format::mmfp4(), 1));
    let bias = noise(n, 2);
    let with_bias = MmfP4Linear::new(weight.clone(), Some(&Tensor::new(&bias[..], &CPU).unwrap())).unwrap();
    let without = MmfP4Linear::new(weight.clone(), None).unwrap();
    for (dtype, bound) in DTYPES {
        for (what, x) in layouts(&[k], dtype) {
            let m = x.elem_count() / k;
            let mut expected = reference::linear(&weight, &values(&x), m, Arithmetic::W4A8);
            let mut dims = x.dims().to_vec();
            *dims.last_mut().unwrap() = n;
            for (layer, biased) in [(&without, false), (&with_bias, true)] {
                if biased {
                    for (index, value) in expected.iter_mut().enumerate() {
                        *value += bias[index % n];
                    }
                }
                let y = layer.forward(&x).unwrap();
                let what = format!("{dtype:?}, {what}, bias: {biased}");
                assert_eq!((y.dims(), y.dtype()), (&dims[..], dtype), "{what}");
                assert_nmse(&values(&y), &expected, bound, &what);
            }
        }
    }
}

#[test]
fn every_group_and_scale_at_every_alignment() {
    for group in GROUPS {
        for (index, kind) in KINDS.into_iter().enumerate() {
            for n in [1, 7, 65] {
                let k = 384;
                let plain = packed(n, k, Format { group, kind }, (n + group) as u64);
                let shifted = |bytes: &Bytes| {
                    let memory = [&[0xee; 16][..4 * index], bytes].concat();
                    let all = Bytes::copy_from(&memory).unwrap();
                    all.slice(4 * index..memory.len()).unwrap()
                };
                for factor in [plain.factor(), Factor::Mul(0.75), Factor::Div(3.0)] {
                    let parts = Parts {
                        shape: (n, k),
                        group,
                        codes: shifted(plain.codes()),
                        scales: shifted(plain.scales()),
                        kind,
                        factor,
                    };
                    let weight = Weight::from(Fp4Tensor::new("w", parts).unwrap());
                    let layer = MmfP4Linear::new(weight.clone(), None).unwrap();
                    let x = tensor((3, k), 9);
                    let expected = reference::linear(&weight, &values(&x), 3, Arithmetic::W4A8);
                    let what = format!("{group} {kind:?} {factor:?}, N = {n}");
                    assert_nmse(&values(&layer.forward(&x).unwrap()), &expected, 1e-9, &what);
                }
            }
        }
    }
}

#[test]
fn half_outputs_come_from_f32_sums() {
    // 4096 products of 8 · 6: far beyond f16's range if summed there, before what follows brings it back.
    let k = 8192;
    let row: Vec<f32> = (0..k).map(|i| if i < k / 2 { 6.0 } else { -6.0 }).collect();
    let weight = quantize("w", &row, (1, k), Format::mmfp4(), ScaleRule::Maximum).unwrap();
    let mut x = vec![f16::from_f32(8.0); k];
    x[0] = f16::from_f32(8.5);
    let x = Tensor::from_vec(x, (1, k), &CPU).unwrap();
    // The step of rounded activations is no power of two: 8.5 would not stay what it is.
    let layer = MmfP4Linear::new(weight, None)
        .unwrap()
        .with_arithmetic(Arithmetic::Exact);
    let y = layer.forward(&x).unwrap();
    assert_eq!(values(&y), [3.0]);
}

#[test]
fn nan_and_infinity_stay_visible() {
    let layer = MmfP4Linear::new(packed(9, 128, Format::mmfp4(), 3), None).unwrap();
    for (dtype, _) in DTYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rows = noise(3 * 128, 4);
            rows[128 + 77] = bad;
            let x = Tensor::from_vec(rows, (3, 128), &CPU)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            let y = values(&layer.forward(&x).unwrap());
            assert!(y[9..18].iter().all(|v| !v.is_finite()), "{dtype:?} {bad}: {y:?}");
            assert!(
                y[..9].iter().chain(&y[18..]).all(|v| v.is_finite()),
                "{dtype:?} {bad}: {y:?}"
            );
        }
    }
}

#[test]
fn linear_names_the_argument_at_fault() {
    let weight = packed(8, 128, Format::mmfp4(), 5);
    let layer = MmfP4Linear::new(weight.clone(), None).unwrap();
    assert_error(
        layer.forward(&tensor((2, 127), 0)),
        &["mmfp4-linear", "`x`", "128", "[2, 127]"],
    );
    assert_error(
        layer.forward(&Tensor::new(1f32, &CPU).unwrap()),
        &["mmfp4-linear", "`x`", "[]"],
    );
    for dtype in [DType::U32, DType::U8, DType::I64, DType::F64] {
        let x = tensor((2, 128), 0).to_dtype(dtype).unwrap();
        assert_error(
            layer.forward(&x),
            &["mmfp4-linear", "`x`", "F32, F16 or BF16", &format!("{dtype:?}")],
        );
    }
    let biases = [
        tensor(7, 0),
        tensor((8, 1), 0),
        Tensor::zeros(8, DType::U32, &CPU).unwrap(),
    ];
    for bias in biases {
        assert_error(
            MmfP4Linear::new(weight.clone(), Some(&bias)),
            &["mmfp4-linear", "`bias`"],
        );
    }
    assert_error(
        ops::Linear::new(weight.into(), Some(vec![0.0; 9])),
        &["mmfp4-linear", "`bias`", "8", "9"],
    );
}

const PREFIX: &str = "model.layers.0.mlp.up_proj";

/// A layer's tensors as checkpoints name them: words, scales and a bias.
fn stored(weight: &Fp4Tensor, words: DType, scales: DType) -> HashMap<String, Tensor> {
    let (n, k) = weight.shape();
    let codes = weight
        .codes()
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let codes = match words {
        DType::I32 => Tensor::from_iter(codes.map(|word| word as i32), &CPU),
        _ => Tensor::from_iter(codes, &CPU),
    };
    let scale = |i| weight.scale_kind().decode(weight.scales(), i);
    let groups = k / weight.group();
    let stored = Tensor::from_iter((0..n * groups).map(scale), &CPU).unwrap();
    let tensors = [
        ("weight", codes.unwrap().reshape((n, k / 8)).unwrap()),
        (
            "scales",
            stored.to_dtype(scales).unwrap().reshape((n, groups)).unwrap(),
        ),
        ("bias", tensor(n, 77)),
    ];
    tensors
        .map(|(part, tensor)| (format!("{PREFIX}.{part}"), tensor))
        .into()
}

/// The tensors behind each backend of `VarBuilder` that a user has: a file, a `VarMap`, a table.
fn backends(tensors: &HashMap<String, Tensor>) -> Vec<(&'static str, VarBuilder<'static>)> {
    let file = tempfile::NamedTempFile::new().unwrap();
    candle_core::safetensors::save(tensors, file.path()).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    let map = VarMap::new();
    for (name, tensor) in tensors {
        let var = Var::from_tensor(tensor).unwrap();
        map.data().lock().unwrap().insert(name.clone(), var);
    }
    let all = vec![
        (
            "safetensors",
            VarBuilder::from_buffered_safetensors(bytes, DType::F32, &CPU).unwrap(),
        ),
        ("VarMap", VarBuilder::from_varmap(&map, DType::F32, &CPU)),
        (
            "tensors",
            VarBuilder::from_tensors(tensors.clone(), DType::F32, &CPU),
        ),
    ];
    all.into_iter()
        .map(|(what, vb)| (what, vb.pp("model.layers.0.mlp.up_proj")))
        .collect()
}

#[test]
fn packed_layers_come_from_var_builders() {
    let x = tensor((2, 3, 256), 6);
    for group in GROUPS {
        for (words, scales) in [(DType::U32, ScaleKind::F16), (DType::I32, ScaleKind::BF16)] {
            let weight = packed(24, 256, Format { group, kind: scales }, 7);
            let dtype = if scales == ScaleKind::F16 {
                DType::F16
            } else {
                DType::BF16
            };
            let tensors = stored(&weight, words, dtype);
            let expected = MmfP4Linear::new(weight, tensors.get(&format!("{PREFIX}.bias"))).unwrap();
            for (what, vb) in backends(&tensors) {
                let layer = linear(256, 24, vb.clone()).unwrap();
                let (y, expected) = (layer.forward(&x).unwrap(), expected.forward(&x).unwrap());
                assert_eq!(values(&y), values(&expected), "{what}, {words:?}, group {group}");
                assert!(linear_no_bias(256, 24, vb).unwrap().bias().is_none());
            }
        }
    }
}

#[test]
fn dense_layers_are_quantised_from_var_builders_and_linears() {
    let (dense, bias) = (tensor((24, 256), 8), tensor(24, 9));
    let tensors = HashMap::from([
        (format!("{PREFIX}.weight"), dense.clone()),
        (format!("{PREFIX}.bias"), bias.clone()),
    ]);
    let expected = quantize(
        "w",
        &values(&dense),
        (24, 256),
        Format::mmfp4(),
        ScaleRule::default(),
    )
    .unwrap();
    let expected = MmfP4Linear::new(expected, Some(&bias)).unwrap();
    let x = tensor((5, 256), 10);
    let expected = values(&expected.forward(&x).unwrap());
    for (what, vb) in backends(&tensors) {
        let layer = linear(256, 24, vb).unwrap();
        assert!(matches!(layer.weight(), Weight::Fp4(_)));
        assert_eq!(values(&layer.forward(&x).unwrap()), expected, "{what}");
    }
    let from_linear = candle_nn::Linear::new(dense.clone(), Some(bias));
    let from_linear = MmfP4Linear::from_linear(&from_linear, Format::mmfp4()).unwrap();
    assert_eq!(values(&from_linear.forward(&x).unwrap()), expected);

    let odd = candle_nn::Linear::new(tensor((4, 100), 1), None);
    assert_error(
        MmfP4Linear::from_linear(&odd, Format::mmfp4()),
        &["`weight`", "[4, 100]", "128"],
    );
    let nan = candle_nn::Linear::new((dense * f64::NAN).unwrap(), None);
    assert_error(
        MmfP4Linear::from_linear(&nan, Format::mmfp4()),
        &["`weight`", "element 0", "NaN"],
    );
}

#[test]
fn var_builders_that_lack_something_name_it_in_full() {
    let tensors = stored(&packed(24, 256, Format::mmfp4(), 7), DType::U32, DType::F16);
    let name = |part: &str| format!("{PREFIX}.{part}");
    for part in ["weight", "scales", "bias"] {
        let mut without = tensors.clone();
        without.remove(&name(part));
        for (_, vb) in backends(&without) {
            assert_error(linear(256, 24, vb), &[&format!("`{}`", name(part)), "missing"]);
        }
    }
    for (part, shape) in [
        ("weight", (24, 31)),
        ("scales", (24, 3)),
        ("scales", (23, 2)),
        ("bias", (24, 1)),
    ] {
        let mut other = tensors.clone();
        let wrong = Tensor::ones(shape, tensors[&name(part)].dtype(), &CPU).unwrap();
        other.insert(name(part), wrong);
        for (what, vb) in backends(&other) {
            println!("{what}, {part}");
            assert_error(linear(256, 24, vb), &[&format!("`{}`", name(part)), "24"]);
        }
    }
    let mut nan = tensors.clone();
    let scales = Tensor::new(f32::NAN, &CPU)
        .unwrap()
        .broadcast_as((24, 2))
        .unwrap();
    nan.insert(name("scales"), scales.to_dtype(DType::F16).unwrap());
    for (_, vb) in backends(&nan) {
        assert_error(linear(256, 24, vb), &[PREFIX, "scale [0, 0] is NaN"]);
    }
}

#[test]
fn per_head_products_in_both_orientations() {
    for (group, kind) in [
        (128, ScaleKind::F16),
        (32, ScaleKind::E8M0),
        (16, ScaleKind::E4M3),
        (64, ScaleKind::BF16),
    ] {
        for heads in [1, 3, 5] {
            let (stride, k) = (28, 128);
            let weight = Weight::from(packed(heads * stride, k, Format { group, kind }, 11));
            for (start, len) in [(0, 12), (12, 16), (0, 28), (27, 1)] {
                let rows = HeadRows {
                    heads,
                    stride,
                    start,
                    len,
                };
                for (dtype, bound) in DTYPES {
                    for (orientation, from, to) in
                        [(Orientation::Ordinary, k, len), (Orientation::Transposed, len, k)]
                    {
                        let op = PerHead::new(weight.clone(), rows, orientation).unwrap();
                        for (layout, x) in layouts(&[heads, from], dtype) {
                            let m = x.elem_count() / (heads * from);
                            let expected = match orientation {
                                Orientation::Ordinary => {
                                    reference::per_head(&weight, rows, &values(&x), m, Arithmetic::W4A8)
                                }
                                Orientation::Transposed => {
                                    reference::per_head_transposed(&weight, rows, &values(&x), m)
                                }
                            };
                            let y = op.forward(&x).unwrap();
                            let mut dims = x.dims().to_vec();
                            *dims.last_mut().unwrap() = to;
                            let what = format!("{kind:?}, {rows:?}, {orientation:?}, {dtype:?}, {layout}");
                            assert_eq!((y.dims(), y.dtype()), (&dims[..], dtype), "{what}");
                            assert_nmse(&values(&y), &expected, bound, &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn per_head_names_the_argument_at_fault() {
    let weight = Weight::from(packed(56, 128, Format::mmfp4(), 12));
    let rows = HeadRows {
        heads: 2,
        stride: 28,
        start: 12,
        len: 16,
    };
    let wrong = [
        HeadRows { heads: 3, ..rows },
        HeadRows { len: 17, ..rows },
        HeadRows { heads: 0, ..rows },
        HeadRows { len: 0, ..rows },
        HeadRows {
            start: usize::MAX,
            ..rows
        },
        HeadRows {
            stride: usize::MAX,
            ..rows
        },
    ];
    for rows in wrong {
        let result = PerHead::new(weight.clone(), rows, Orientation::Ordinary);
        assert_error(result, &["mmfp4-per-head", "`rows`", "[56, 128]"]);
    }
    for (orientation, from) in [(Orientation::Ordinary, 128), (Orientation::Transposed, 16)] {
        let op = PerHead::new(weight.clone(), rows, orientation).unwrap();
        for shape in [vec![2, from + 1], vec![3, from], vec![from], vec![]] {
            let found = format!("{shape:?}");
            let result = op.forward(&Tensor::zeros(shape, DType::F32, &CPU).unwrap());
            assert_error(
                result,
                &["mmfp4-per-head", "`x`", &format!("[2, {from}]"), &found],
            );
        }
        let integers = Tensor::zeros((2, from), DType::U32, &CPU).unwrap();
        assert_error(op.forward(&integers), &["mmfp4-per-head", "`x`", "U32"]);
    }
}

fn expert(width: usize, d: usize, format: Format, seed: u64) -> Expert {
    Expert {
        gate: packed(width, d, format, seed).into(),
        up: packed(width, d, format, seed + 1).into(),
        down: packed(d, width, format, seed + 2).into(),
    }
}

fn experts(count: usize, width: usize, d: usize, format: Format) -> Vec<Expert> {
    (0..count)
        .map(|e| expert(width, d, format, 100 + 3 * e as u64))
        .collect()
}

/// `[tokens, top_k]` different experts a token, in a pattern that loads them unevenly.
fn ids(tokens: usize, top_k: usize, experts: usize) -> Tensor {
    let id = |i: usize| ((i / top_k * i / top_k + i % top_k) % experts) as u32;
    let ids: Vec<u32> = (0..tokens * top_k).map(id).collect();
    Tensor::from_vec(ids, (tokens, top_k), &CPU).unwrap()
}

fn moe_reference(moe: &FusedMoe, x: &Tensor, ids: &Tensor, weights: &Tensor) -> Vec<f32> {
    let top_k = ids.dims()[ids.rank() - 1];
    let ids: Vec<u32> = ids.flatten_all().unwrap().to_vec1().unwrap();
    reference::fused_moe(
        moe.experts(),
        moe.shared(),
        &values(x),
        &ids,
        &values(weights),
        top_k,
        moe.arithmetic(),
    )
}

#[test]
fn experts_agree_with_the_reference() {
    let (width, d) = (96, 128);
    for (format, shared) in [
        (
            Format {
                group: 32,
                kind: ScaleKind::F16,
            },
            vec![],
        ),
        (Format::mxfp4(), vec![expert(64, d, Format::mxfp4(), 50)]),
        (
            Format::nvfp4(),
            vec![
                expert(32, d, Format::nvfp4(), 60),
                expert(160, d, Format::nvfp4(), 70),
            ],
        ),
    ] {
        let moe = FusedMoe::new(experts(5, width, d, format), shared).unwrap();
        // With five experts and two slots these give 1, 2, 3 and more tokens an expert, and none.
        for tokens in [1, 2, 3, 5, 8, 17] {
            for top_k in [1, 2, 4] {
                let (ids, weights) = (ids(tokens, top_k, 5), tensor((tokens, top_k), 14));
                for (dtype, bound) in DTYPES {
                    for weights_dtype in [DType::F32, DType::F16, DType::BF16] {
                        let x = tensor((tokens, d), 13).to_dtype(dtype).unwrap();
                        let weights = weights.to_dtype(weights_dtype).unwrap();
                        let y = moe.forward(&x, &ids, &weights).unwrap();
                        let what = format!(
                            "{format:?}, {tokens} tokens, top {top_k}, {dtype:?} x {weights_dtype:?}"
                        );
                        assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype), "{what}");
                        assert_nmse(
                            &values(&y),
                            &moe_reference(&moe, &x, &ids, &weights),
                            bound,
                            &what,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn experts_take_strided_inputs_of_any_rank() {
    let moe = FusedMoe::new(experts(5, 32, 64, Format::mxfp4()), vec![]).unwrap();
    let all_ids = Tensor::new(
        &[[0u32, 3, 4, 1, 2, 0], [1, 1, 2, 3, 4, 4], [2, 0, 0, 1, 3, 2]],
        &CPU,
    )
    .unwrap();
    let views = [
        (
            "transposed",
            all_ids.t().unwrap(),
            tensor((3, 6), 20).t().unwrap(),
            tensor((64, 6), 21).t().unwrap(),
        ),
        (
            "narrowed",
            all_ids.narrow(1, 2, 3).unwrap(),
            tensor((5, 5), 22)
                .narrow(0, 1, 3)
                .unwrap()
                .narrow(1, 2, 3)
                .unwrap(),
            tensor((3, 99), 23).narrow(1, 30, 64).unwrap(),
        ),
        (
            "broadcast",
            all_ids.narrow(0, 1, 1).unwrap().broadcast_as((4, 6)).unwrap(),
            tensor((4, 1), 24).broadcast_as((4, 6)).unwrap(),
            tensor((1, 64), 25).broadcast_as((4, 64)).unwrap(),
        ),
        (
            "three dimensions",
            all_ids.reshape((3, 2, 3)).unwrap().transpose(0, 1).unwrap(),
            tensor((2, 3, 3), 26),
            tensor((3, 2, 64), 27).transpose(0, 1).unwrap(),
        ),
        (
            "one dimension",
            all_ids.get(2).unwrap(),
            tensor(6, 28),
            tensor(64, 29),
        ),
        (
            "no tokens",
            Tensor::zeros((0, 2), DType::U32, &CPU).unwrap(),
            tensor((0, 2), 0),
            tensor((0, 64), 0),
        ),
    ];
    for (what, ids, weights, x) in views {
        let y = moe.forward(&x, &ids, &weights).unwrap();
        assert_eq!(y.dims(), x.dims(), "{what}");
        assert_nmse(&values(&y), &moe_reference(&moe, &x, &ids, &weights), 1e-9, what);
    }
}

#[test]
fn experts_keep_their_own_tensor_factors() {
    let with_factor = |weight: Weight, factor| match weight {
        Weight::Fp4(w) => {
            let parts = Parts {
                shape: w.shape(),
                group: w.group(),
                codes: w.codes().clone(),
                scales: w.scales().clone(),
                kind: w.scale_kind(),
                factor,
            };
            Weight::from(Fp4Tensor::new("w", parts).unwrap())
        }
        dense => dense,
    };
    let factors = [Factor::Mul(0.5), Factor::Div(3.0), Factor::Mul(0.125)];
    let scaled = |e: Expert, i: usize| Expert {
        gate: with_factor(e.gate, factors[i % 3]),
        up: with_factor(e.up, factors[(i + 1) % 3]),
        down: with_factor(e.down, factors[(i + 2) % 3]),
    };
    let all: Vec<_> = experts(4, 32, 64, Format::nvfp4())
        .into_iter()
        .enumerate()
        .map(|(i, e)| scaled(e, i))
        .collect();
    // The reference reads the weights as they were, before the op gathered them.
    let (x, ids, weights) = (tensor((6, 64), 30), ids(6, 2, 4), tensor((6, 2), 31));
    let flat: Vec<u32> = ids.flatten_all().unwrap().to_vec1().unwrap();
    let expected = reference::fused_moe(
        &all,
        &[],
        &values(&x),
        &flat,
        &values(&weights),
        2,
        Arithmetic::W4A8,
    );
    let moe = FusedMoe::new(all, vec![]).unwrap();
    assert_nmse(
        &values(&moe.forward(&x, &ids, &weights).unwrap()),
        &expected,
        1e-9,
        "factors",
    );
}

#[test]
fn experts_in_one_map_are_not_copied_and_others_once() {
    let scattered = experts(3, 32, 64, Format::mxfp4());
    let (x, ids, weights) = (tensor((4, 64), 32), ids(4, 2, 3), tensor((4, 2), 33));
    let flat: Vec<u32> = ids.flatten_all().unwrap().to_vec1().unwrap();
    let expected = reference::fused_moe(
        &scattered,
        &[],
        &values(&x),
        &flat,
        &values(&weights),
        2,
        Arithmetic::W4A8,
    );

    let copied = FusedMoe::new(scattered.clone(), vec![]).unwrap();
    let size: usize = scattered
        .iter()
        .flat_map(|e| [&e.gate, &e.up, &e.down])
        .map(Weight::size_in_bytes)
        .sum();
    assert!(
        copied.copied_bytes() >= size,
        "{} of {size}",
        copied.copied_bytes()
    );
    assert_nmse(
        &values(&copied.forward(&x, &ids, &weights).unwrap()),
        &expected,
        1e-9,
        "copied",
    );

    // What was gathered once lies together.
    let together = FusedMoe::new(copied.experts().to_vec(), vec![]).unwrap();
    assert_eq!(together.copied_bytes(), 0);
    let bits = |moe: &FusedMoe| values(&moe.forward(&x, &ids, &weights).unwrap());
    assert_eq!(bits(&together), bits(&copied));

    // One shared expert elsewhere brings all of them into a new map.
    let shared = vec![expert(64, 64, Format::mxfp4(), 90)];
    assert!(
        FusedMoe::new(copied.experts().to_vec(), shared)
            .unwrap()
            .copied_bytes()
            > size
    );
}

#[test]
fn experts_in_mixed_formats_and_from_dense_stacks() {
    let dense = |n: usize, k: usize, seed| {
        let bytes: Vec<u8> = noise(n * k, seed)
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect();
        let bytes = Bytes::copy_from(&bytes).unwrap();
        Weight::from(DenseTensor::new("w", (n, k), FloatKind::BF16, bytes).unwrap())
    };
    let mixed = vec![
        expert(
            128,
            64,
            Format {
                group: 64,
                kind: ScaleKind::F16,
            },
            40,
        ),
        Expert {
            gate: dense(128, 64, 41),
            ..expert(128, 64, Format::nvfp4(), 42)
        },
        Expert {
            gate: dense(128, 64, 44),
            up: dense(128, 64, 45),
            down: dense(64, 128, 46),
        },
    ];
    let (x, ids, weights) = (tensor((7, 64), 47), ids(7, 2, 3), tensor((7, 2), 48));
    let flat: Vec<u32> = ids.flatten_all().unwrap().to_vec1().unwrap();
    let expected = reference::fused_moe(
        &mixed,
        &[],
        &values(&x),
        &flat,
        &values(&weights),
        2,
        Arithmetic::W4A8,
    );
    let moe = FusedMoe::new(mixed, vec![]).unwrap();
    assert_nmse(
        &values(&moe.forward(&x, &ids, &weights).unwrap()),
        &expected,
        1e-9,
        "mixed",
    );

    let (gate, up, down) = (
        tensor((3, 64, 128), 1),
        tensor((3, 64, 128), 2),
        tensor((3, 128, 64), 3),
    );
    let moe = FusedMoe::from_dense(&gate, &up, &down, Format::mxfp4()).unwrap();
    let second = quantize(
        "w",
        &values(&up.get(1).unwrap()),
        (64, 128),
        Format::mxfp4(),
        ScaleRule::default(),
    );
    let Weight::Fp4(found) = &moe.experts()[1].up else {
        panic!("not FP4")
    };
    assert_eq!(found.dequantize(), second.unwrap().dequantize());
    let few = down.narrow(0, 0, 2).unwrap();
    assert_error(
        FusedMoe::from_dense(&gate, &up, &few, Format::mxfp4()),
        &["`down`", "3 experts", "2"],
    );
    let odd = FusedMoe::from_dense(&gate, &up, &down, Format::mmfp4());
    assert_error(odd, &["down[0]", "[128, 64]", "128"]);
}

#[test]
fn experts_name_the_argument_at_fault() {
    let moe = FusedMoe::new(experts(3, 32, 64, Format::mxfp4()), vec![]).unwrap();
    let (x, good_ids, weights) = (tensor((4, 64), 1), ids(4, 2, 3), tensor((4, 2), 2));
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    let cases: Vec<(Tensor, Tensor, Tensor, &[&str])> = vec![
        (
            tensor((4, 63), 1),
            good_ids.clone(),
            weights.clone(),
            &["`x`", "64", "[4, 63]"],
        ),
        (
            zeros(&[4, 64], DType::U32),
            good_ids.clone(),
            weights.clone(),
            &["`x`", "U32"],
        ),
        (x.clone(), ids(3, 2, 3), weights.clone(), &["`ids`", "[3, 2]"]),
        (
            x.clone(),
            zeros(&[4, 0], DType::U32),
            weights.clone(),
            &["`ids`", "[4, 0]"],
        ),
        (
            x.clone(),
            zeros(&[], DType::U32),
            weights.clone(),
            &["`ids`", "[]"],
        ),
        (
            x.clone(),
            zeros(&[4, 2], DType::I64),
            weights.clone(),
            &["`ids`", "U32", "I64"],
        ),
        (
            x.clone(),
            zeros(&[4, 2], DType::F32),
            weights.clone(),
            &["`ids`", "U32", "F32"],
        ),
        (
            x.clone(),
            (good_ids.clone() + 1.0).unwrap(),
            weights.clone(),
            &["`ids`", "below 3", "3"],
        ),
        (
            x.clone(),
            good_ids.clone(),
            tensor((4, 3), 2),
            &["`weights`", "[4, 2]", "[4, 3]"],
        ),
        (
            x.clone(),
            good_ids.clone(),
            zeros(&[4, 2], DType::U8),
            &["`weights`", "U8"],
        ),
    ];
    for (x, ids, weights, parts) in cases {
        let result = moe.forward(&x, &ids, &weights);
        assert_error(result, &[&["mmfp4-moe"], parts].concat());
    }

    assert_error(
        FusedMoe::new(vec![], vec![]),
        &["mmfp4-moe", "`experts`", "at least one"],
    );
    let mut uneven = experts(3, 32, 64, Format::mxfp4());
    uneven[1].down = packed(64, 64, Format::mxfp4(), 1).into();
    assert_error(
        FusedMoe::new(uneven, vec![]),
        &["`experts`", "(64, 32)", "down of expert 1"],
    );
    let narrow = vec![expert(32, 32, Format::mxfp4(), 1)];
    assert_error(
        FusedMoe::new(experts(3, 32, 64, Format::mxfp4()), narrow),
        &["`shared`", "gate of expert 0"],
    );
}

const ROUTING: Routing = Routing {
    top_k: 3,
    n_group: 1,
    topk_group: 1,
    normalize: true,
    scaling_factor: 1.8,
};

#[test]
fn routing_is_sigmoid_with_bias_for_the_choice_only() {
    let (tokens, experts) = (9, 16);
    let (logits, bias) = (
        (tensor((experts, tokens), 50) * 4.0).unwrap().t().unwrap(),
        noise(experts, 51),
    );
    for (normalize, scaling_factor) in [(true, 1.8), (false, 1.8), (true, 1.0), (false, 1.0)] {
        let routing = Routing {
            normalize,
            scaling_factor,
            ..ROUTING
        };
        let (ids, weights) = Route::new(routing, bias.clone())
            .unwrap()
            .forward(&logits)
            .unwrap();
        assert_eq!((ids.dtype(), weights.dtype()), (DType::U32, DType::F32));
        let (ids, weights) = (ids.to_vec2::<u32>().unwrap(), weights.to_vec2::<f32>().unwrap());
        let mut moved = 0;
        for (t, row) in values(&logits).chunks_exact(experts).enumerate() {
            let score = |e: usize| 1.0 / (1.0 + (-f64::from(row[e])).exp());
            let rank = |by: &dyn Fn(usize) -> f64| {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| by(*b).total_cmp(&by(*a)));
                order[..3].to_vec()
            };
            let chosen = rank(&|e| score(e) + f64::from(bias[e]));
            moved += usize::from(chosen != rank(&score));
            let sum: f64 = if normalize {
                chosen.iter().map(|e| score(*e)).sum()
            } else {
                1.0
            };
            for (slot, e) in chosen.into_iter().enumerate() {
                assert_eq!(ids[t][slot], e as u32, "token {t}");
                let expected = score(e) / sum * f64::from(scaling_factor);
                assert!(
                    (f64::from(weights[t][slot]) - expected).abs() < 1e-6,
                    "token {t}, slot {slot}"
                );
            }
        }
        assert!(moved > 0, "the bias should have changed some choice");
    }
}

#[test]
fn routing_names_the_argument_at_fault() {
    let cases = [
        (Routing { top_k: 0, ..ROUTING }, 8, "`top_k`"),
        (Routing { top_k: 9, ..ROUTING }, 8, "`top_k`"),
        (
            Routing {
                n_group: 4,
                ..ROUTING
            },
            8,
            "`top_k`",
        ),
        (
            Routing {
                n_group: 3,
                ..ROUTING
            },
            8,
            "`n_group`",
        ),
        (
            Routing {
                n_group: 0,
                ..ROUTING
            },
            8,
            "`n_group`",
        ),
        (
            Routing {
                topk_group: 2,
                ..ROUTING
            },
            8,
            "`topk_group`",
        ),
        (
            Routing {
                topk_group: 0,
                ..ROUTING
            },
            8,
            "`topk_group`",
        ),
        (ROUTING, 0, "`n_group`"),
    ];
    for (routing, experts, argument) in cases {
        assert_error(
            Route::new(routing, vec![0.0; experts]),
            &["mmfp4-route", argument],
        );
    }
    let route = Route::new(ROUTING, vec![0.0; 8]).unwrap();
    for shape in [vec![2, 7], vec![8], vec![1, 2, 8]] {
        let found = format!("{shape:?}");
        let result = route.forward(&Tensor::zeros(shape, DType::F32, &CPU).unwrap());
        assert_error(result, &["mmfp4-route", "`logits`", &found]);
    }
    let integers = Tensor::zeros((2, 8), DType::U32, &CPU).unwrap();
    assert_error(route.forward(&integers), &["mmfp4-route", "`logits`", "U32"]);
}

#[test]
fn a_router_of_half_precision_inputs_scores_in_f32() {
    let bytes: Vec<u8> = noise(16 * 128, 60).iter().flat_map(|v| v.to_le_bytes()).collect();
    let gate = DenseTensor::new(
        "gate",
        (16, 128),
        FloatKind::F32,
        Bytes::copy_from(&bytes).unwrap(),
    )
    .unwrap();
    let weight = Weight::from(gate);
    let route = Route::new(ROUTING, noise(16, 61)).unwrap();
    let router = Router::new(ops::Linear::new(weight.clone(), None).unwrap(), route.clone());
    for dtype in [DType::F16, DType::BF16] {
        let x = tensor((5, 128), 62).to_dtype(dtype).unwrap();
        let routed = router.forward(&x).unwrap();
        assert_eq!(
            (routed.logits.dtype(), routed.weights.dtype()),
            (DType::F32, DType::F32)
        );
        assert_nmse(
            &values(&routed.logits),
            &reference::linear(&weight, &values(&x), 5, Arithmetic::W4A8),
            1e-9,
            "logits",
        );
        let (ids, weights) = route.forward(&routed.logits).unwrap();
        assert_eq!(
            routed.ids.to_vec2::<u32>().unwrap(),
            ids.to_vec2::<u32>().unwrap()
        );
        assert_eq!(values(&routed.weights), values(&weights));
        let rounded = values(&routed.logits.to_dtype(dtype).unwrap());
        assert_ne!(
            rounded,
            values(&routed.logits),
            "f32 scores hold more than {dtype:?}"
        );
    }
    assert_error(router.forward(&tensor((5, 127), 0)), &["`x`", "128", "[5, 127]"]);
}

#[test]
fn embeddings_decode_the_rows_asked_for() {
    let table = packed(10, 64, Format::mxfp4(), 70);
    let rows = table.dequantize();
    let embedding = Embedding::new(table.into());
    let looked_up = embedding.forward(&[3, 9, 3, 0], &CPU).unwrap();
    assert_eq!(looked_up.dims(), [4, 64]);
    let expected: Vec<f32> = [3, 9, 3, 0]
        .iter()
        .flat_map(|id| rows[id * 64..][..64].to_vec())
        .collect();
    assert_eq!(values(&looked_up), expected);
    assert_error(
        embedding.forward(&[1, 10, 11], &CPU),
        &["token id 10", "index 1", "10"],
    );
}

#[test]
fn masks_of_integers_are_refused() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        assert_error(
            Mask::causal().tensor(0..3, 0..3, dtype, &CPU),
            &["dtype", "float"],
        );
        let rows = left_padded(&[2, 3]);
        assert_error(
            Mask::causal().batch(&rows, &rows, dtype, &CPU),
            &["dtype", "float"],
        );
    }
}

#[test]
fn a_cache_refuses_layers_that_it_does_not_have() {
    let mut cache = TokenCache::new(2, 4, 16, DType::F32, &CPU);
    cache.begin(0, 1).unwrap();
    let rows = Tensor::ones((1, 4), DType::F32, &CPU).unwrap();
    cache.append(1, &rows).unwrap();
    assert_error(cache.append(2, &rows), &["`layer`", "below 2", "found 2"]);
}

/// Without the checks these overflow, which a debug build notices.
#[test]
fn sizes_beyond_memory_are_refused() {
    let parts = Parts {
        shape: (usize::MAX, 32),
        group: 16,
        codes: Bytes::copy_from(&[]).unwrap(),
        scales: Bytes::copy_from(&[]).unwrap(),
        kind: ScaleKind::E8M0,
        factor: Factor::None,
    };
    assert_error(Fp4Tensor::new("w", parts), &["`w`", "larger than memory"]);
    let mut cache = TokenCache::new(1, 4, usize::MAX, DType::F32, &CPU);
    cache.begin(0, usize::MAX).unwrap();
}

#[test]
fn the_largest_floats_stay_finite_under_every_rule() {
    for rule in [ScaleRule::Maximum, ScaleRule::SquaredError] {
        for (group, kind) in [
            (16, ScaleKind::E4M3),
            (32, ScaleKind::BF16),
            (32, ScaleKind::E8M0),
        ] {
            for value in [f32::MAX, f32::MAX * 0.99, -f32::MAX] {
                let packed = quantize("w", &[value; 32], (1, 32), Format { group, kind }, rule).unwrap();
                for back in packed.dequantize() {
                    assert!(
                        (back / value - 1.0).abs() < 0.34,
                        "{rule:?} {kind:?}: {back} for {value}"
                    );
                }
            }
        }
    }
}

#[test]
fn scales_that_no_half_holds_are_refused() {
    let tensors = |scale: f32| {
        let words = Tensor::zeros((2, 16), DType::U32, &CPU).unwrap();
        let scales = Tensor::full(scale, (2, 1), &CPU).unwrap();
        let tensors = [("weight".to_string(), words), ("scales".to_string(), scales)];
        VarBuilder::from_tensors(tensors.into(), DType::F32, &CPU)
    };
    for scale in [0.1 + 1e-5, 1e-30 + 1e-34, f32::MAX] {
        assert_error(
            linear_no_bias(128, 2, tensors(scale)),
            &["`scales`", "F16", "BF16"],
        );
    }
    for scale in [0.5, 2f32.powi(100)] {
        linear_no_bias(128, 2, tensors(scale)).unwrap();
    }
}
