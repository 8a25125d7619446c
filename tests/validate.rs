//! What 4 bits cost and where a number went wrong, from outside: on the trained model and on models broken
//! on purpose.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_mmfp4::Error;
use candle_mmfp4::checkpoint::{Checkpoint, LoadOptions, LoadReport, ModelFiles, quantize_folder};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{FloatKind, Format, ScaleRule, quantize, validate};
use candle_mmfp4::generation::{Options, Pipeline};
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model, Sequence};
use candle_mmfp4::models::{Site, check_finite};
use candle_mmfp4::nn::MmfP4Linear;
use candle_mmfp4::ops::{Tolerance, compare_with_reference, validate_kernel_output};
use common::{Written, assert_nmse, bf16_demo, mmfp4_demo, repository, rewritten, values};
use half::bf16;
use safetensors::Dtype;
use std::path::Path;

fn load(folder: &Path, options: &LoadOptions) -> Result<(Model, LoadReport), Error> {
    common::load(&ModelFiles::folder(folder), options)
}

fn tiny() -> std::path::PathBuf {
    repository("tests/data/tiny-models/plain")
}

fn quantizing(skip_layers: &[i64], keep: &[&str]) -> LoadOptions {
    LoadOptions {
        quantize: Some(Format::nvfp4()),
        skip_layers: skip_layers.to_vec(),
        keep: keep.iter().map(|pattern| pattern.to_string()).collect(),
        ..LoadOptions::default()
    }
}

#[test]
fn trained_weights_cost_what_four_bits_cost() {
    let checkpoint = Checkpoint::open(bf16_demo()).unwrap();
    let name = "model.layers.2.self_attn.o_proj.weight";
    let stored = checkpoint.get(name).unwrap();
    let [n, k] = stored.shape[..] else {
        panic!("{:?}", stored.shape)
    };
    let original = stored.matrix(name, n, k).unwrap();
    assert_eq!(original.kind(), FloatKind::BF16);
    let original = original.to_f32();
    let cost = |rule| {
        let packed = quantize(name, &original, (n, k), Format::mmfp4(), rule).unwrap();
        let layer = MmfP4Linear::new(packed.clone(), None).unwrap();
        let x = Tensor::randn(0f32, 1f32, (3, k), &Device::Cpu).unwrap();
        let kernel = validate_kernel_output(&layer, &x).unwrap();
        assert!(kernel.all_close, "{kernel}");
        validate(&original, &packed).unwrap()
    };
    let (searched, maximum) = (cost(ScaleRule::SquaredError), cost(ScaleRule::Maximum));
    assert!(
        searched.relative_rmse > 0.05 && searched.relative_rmse < 0.12,
        "{searched}"
    );
    assert!(searched.relative_rmse < maximum.relative_rmse, "{maximum}");
    assert!(searched.cosine > 0.99 && searched.worst_blocks[0].relative_error > searched.relative_rmse);
}

#[test]
fn logits_are_compared_with_those_of_another_model() {
    let tokens = [5u32, 3, 100, 42, 7, 260];
    let logits = |folder: &Path, options: &LoadOptions| {
        let (model, _) = load(folder, options).unwrap();
        model
            .forward(&tokens, 0, &mut model.new_cache(), Logits::All)
            .unwrap()
    };
    let as_it_is = LoadOptions::default();
    let (exact, rounded) = (logits(&bf16_demo(), &as_it_is), logits(&mmfp4_demo(), &as_it_is));
    let comparison = compare_with_reference(&rounded, &exact, Tolerance::Nmse(0.05)).unwrap();
    assert!(comparison.all_close && comparison.nmse > 1e-4, "{comparison}");
    assert_eq!(comparison.largest_absolute.at.len(), 2);
    // All layers kept: nothing is rounded, and the logits are the same bits.
    let (kept, exact) = (
        logits(&tiny(), &quantizing(&[0, 1, 2], &[])),
        logits(&tiny(), &as_it_is),
    );
    let same = compare_with_reference(&kept, &exact, Tolerance::Nmse(0.0)).unwrap();
    assert!(same.all_close, "{same}");
}

/// The tiny model with some elements of one tensor replaced.
fn broken(source: &Path, tensor: &str, value: f32, count: usize) -> tempfile::TempDir {
    rewritten(source, |name, stored| {
        (name == tensor).then(|| {
            assert_eq!(stored.dtype, Dtype::BF16);
            let mut bytes = stored.bytes.to_vec();
            for element in bytes.chunks_exact_mut(2).take(count) {
                element.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
            vec![(name.to_string(), stored.dtype, stored.shape.clone(), bytes)]
        })
    })
}

fn first_non_finite(folder: &Path) -> (Site, candle_mmfp4::ops::ValueRange, String) {
    let (model, _) = load(folder, &LoadOptions::default()).unwrap();
    let mut alone = [Sequence {
        tokens: &[5, 3, 100],
        position: 0,
        cache: None,
    }];
    let unchecked = model.forward_batch(&mut alone, Logits::Last, None);
    assert!(unchecked.is_ok(), "without the check nothing is looked at");
    let error = model
        .forward_batch(&mut alone, Logits::Last, Some(&mut check_finite))
        .unwrap_err();
    let text = error.to_string();
    match error {
        Error::NonFiniteOutput { site, input, output } => {
            assert!(!output.is_finite());
            (site, input, text)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_first_layer_and_op_with_nan_or_infinity_are_named() {
    let layer = |part: &str| format!("model.layers.1.{part}.weight");
    let cases = [
        (layer("input_layernorm"), f32::NAN, 1, Some(1), "input_layernorm"),
        (layer("self_attn.o_proj"), f32::INFINITY, 1, Some(1), "o_proj"),
        (layer("self_attn.q_a_proj"), 3e38, 128, Some(1), "q_a_proj"),
        (layer("mlp.gate"), f32::NAN, 3, Some(1), "mlp.gate"),
        (
            layer("mlp.shared_experts.up_proj"),
            f32::NAN,
            1,
            Some(1),
            "mlp.experts",
        ),
        ("lm_head.weight".into(), f32::NAN, 1, None, "lm_head"),
    ];
    for (tensor, value, count, layer, op) in cases {
        let folder = broken(&tiny(), &tensor, value, count);
        let (site, input, text) = first_non_finite(folder.path());
        assert_eq!((site.layer, site.op), (layer, op), "{tensor}: {text}");
        assert!(
            input.is_finite() && input.finite.unwrap().0 < input.finite.unwrap().1,
            "{text}"
        );
        assert!(
            text.contains(&site.to_string()) && text.contains(" to "),
            "{text}"
        );
    }
    let embeddings = broken(&tiny(), "model.embed_tokens.weight", f32::NAN, 512 * 128);
    assert_eq!(first_non_finite(embeddings.path()).0.op, "embed_tokens");
}

#[test]
fn generation_checks_when_asked_and_only_then() {
    let name = "model.layers.3.post_attention_layernorm.weight";
    let folder = broken(&mmfp4_demo(), name, f32::NAN, 1);
    let (pipeline, _) = Pipeline::from_folder(folder.path(), &LoadOptions::default(), &Device::Cpu).unwrap();
    let mut options = pipeline.options();
    options.max_tokens = Some(1);
    let prompt = pipeline.tokenizer().encode("What does").unwrap();
    let run = |options: &Options| {
        pipeline
            .generate(&prompt, options)
            .unwrap()
            .collect::<Result<Vec<_>, _>>()
    };
    // Sampling refuses NaN as well, but knows nothing of where it came from.
    let unchecked = run(&options).unwrap_err();
    assert!(matches!(unchecked, Error::Logits(_)), "{unchecked}");
    options.check_finite = true;
    match run(&options).unwrap_err() {
        Error::NonFiniteOutput { site, .. } => {
            assert_eq!((site.layer, site.op), (Some(3), "post_attention_layernorm"));
        }
        other => panic!("{other}"),
    }

    let (sound, _) = Pipeline::from_folder(mmfp4_demo(), &LoadOptions::default(), &Device::Cpu).unwrap();
    assert!(
        sound
            .generate(&prompt, &options)
            .unwrap()
            .all(|event| event.is_ok())
    );
}

#[test]
fn layers_and_patterns_stay_in_bf16() {
    let (_, all) = load(&tiny(), &quantizing(&[], &[])).unwrap();
    assert!(all.kept.is_empty() && all.warnings.is_empty(), "{all}");
    let (_, report) = load(
        &tiny(),
        &quantizing(&[-1], &["*.layers.1.*.o_proj.weight", "q_b_proj"]),
    )
    .unwrap();
    assert!(report.warnings.is_empty(), "{report}");
    let in_layer = |layer: usize| {
        let prefix = format!("model.layers.{layer}.");
        let kept = report
            .kept
            .iter()
            .filter(move |kept| kept.name.starts_with(&prefix));
        kept.map(|kept| kept.name.as_str()).collect::<Vec<_>>()
    };
    assert_eq!(in_layer(0), ["model.layers.0.self_attn.q_b_proj.weight"]);
    assert_eq!(
        in_layer(1),
        [
            "model.layers.1.self_attn.q_b_proj.weight",
            "model.layers.1.self_attn.o_proj.weight"
        ]
    );
    // Five projections of attention, three of each of eight experts and of the shared one.
    assert_eq!(in_layer(2).len(), 5 + 3 * 9);
    assert_eq!(
        report.quantized.tensors + report.kept.len(),
        all.quantized.tensors
    );
    assert_eq!(report.dense.tensors - report.kept.len(), all.dense.tensors);
    let text = report.to_string();
    assert!(
        text.contains("32 weights stay in floating point") && text.contains("layer 2"),
        "{text}"
    );
}

#[test]
fn options_that_make_no_sense_are_errors_or_warnings() {
    let error = load(&tiny(), &quantizing(&[3], &[])).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Argument {
                argument: "skip_layers",
                ..
            }
        ),
        "{error}"
    );
    assert!(load(&tiny(), &quantizing(&[], &["*"])).is_err());
    let (_, report) = load(&tiny(), &quantizing(&[], &["o_porj", "lm_head", "mlp.gate"])).unwrap();
    assert!(
        report.warnings.len() == 1 && report.warnings[0].contains("`o_porj`"),
        "{report}"
    );
    let options = LoadOptions {
        quantize: None,
        ..quantizing(&[0], &[])
    };
    let (_, report) = load(&tiny(), &options).unwrap();
    assert!(report.warnings[0].contains("without quantize"), "{report}");
}

#[test]
fn our_own_files_give_no_warning_and_maximum_scales_one() {
    let (_, report) = load(&mmfp4_demo(), &LoadOptions::default()).unwrap();
    assert!(report.warnings.is_empty(), "{report}");
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("maximum");
    let source = Checkpoint::open(bf16_demo()).unwrap();
    quantize_folder(&source, &target, Format::mmfp4(), ScaleRule::Maximum).unwrap();
    let (_, report) = load(&target, &LoadOptions::default()).unwrap();
    assert!(
        report.warnings.len() == 1 && report.warnings[0].contains("maximum"),
        "{report}"
    );
}

#[test]
fn mxfp4_is_warned_of_once() {
    let options = LoadOptions {
        quantize: Some(Format::mxfp4()),
        ..LoadOptions::default()
    };
    let (_, report) = load(&tiny(), &options).unwrap();
    assert!(
        report.warnings.len() == 1 && report.warnings[0].contains("MXFP4"),
        "{report}"
    );
    assert!(report.to_string().contains("\nwarning: "), "{report}");
}

/// The tiny model with the weights whose modules end so in MMFP4.
fn in_four_bits(names: &[&str]) -> tempfile::TempDir {
    rewritten(&tiny(), |name, stored| {
        let [n, k] = stored.shape[..] else { return None };
        let module = name.strip_suffix(".weight")?;
        if !names.iter().any(|end| module.ends_with(end)) {
            return None;
        }
        let values = stored.matrix(name, n, k).unwrap().to_f32();
        let format = Format::mmfp4();
        let packed = quantize(name, &values, (n, k), format, ScaleRule::SquaredError).unwrap();
        let codes: Written = (name.into(), Dtype::U32, vec![n, k / 8], packed.codes().to_vec());
        let scales = packed.scales().to_vec();
        Some(vec![
            codes,
            (format!("{module}.scales"), Dtype::F16, vec![n, 1], scales),
        ])
    })
}

#[test]
fn four_bits_where_they_hurt_are_warned_of() {
    let four_bits = |names: &[&str]| {
        let folder = in_four_bits(names);
        let (model, report) = load(folder.path(), &LoadOptions::default()).unwrap();
        let logits = model
            .forward(&[1, 2], 0, &mut model.new_cache(), Logits::Last)
            .unwrap();
        assert_eq!((logits.dims(), logits.dtype()), (&[1, 512][..], DType::F32));
        report.warnings
    };
    let warnings = four_bits(&["mlp.gate"]);
    assert!(
        warnings.len() == 1 && warnings[0].contains("of 2 layers"),
        "{warnings:?}"
    );
    let warnings = four_bits(&["lm_head", "embed_tokens"]);
    assert!(
        warnings.len() == 1 && warnings[0].contains("embed_tokens and lm_head"),
        "{warnings:?}"
    );
}

fn with_int8_head(arithmetic: Arithmetic) -> LoadOptions {
    LoadOptions {
        int8_head: true,
        arithmetic,
        ..LoadOptions::default()
    }
}

fn all_logits(model: &Model) -> Vec<f32> {
    let tokens = [1, 2, 3, 4, 5, 6, 7];
    values(
        &model
            .forward(&tokens, 0, &mut model.new_cache(), Logits::All)
            .unwrap(),
    )
}

#[test]
fn a_head_is_rounded_to_eight_bits_while_loading() {
    for (folder, tied) in [
        (mmfp4_demo(), false),
        (repository("tests/data/tiny-models/tied-and-biased"), true),
    ] {
        for arithmetic in [Arithmetic::W4A8, Arithmetic::Exact] {
            let options = LoadOptions {
                arithmetic,
                ..LoadOptions::default()
            };
            let (plain, without) = load(&folder, &options).unwrap();
            let (model, report) = load(&folder, &with_int8_head(arithmetic)).unwrap();
            let (n, k) = (model.config().vocab_size, model.config().hidden_size);
            let head = report.int8_head.unwrap();
            let stored = without.dense.bytes - report.dense.bytes;
            // Blocks of 128 codes and a scale.
            assert_eq!(head.after, n * k.div_ceil(128) * 132);
            assert!(head.before == n * k * 2 || head.before == n * k * 4, "{head:?}");
            assert_eq!(stored, if tied { 0 } else { head.before });
            assert!(without.int8_head.is_none() && report.warnings.is_empty() && report.unused.is_empty());
            assert!(
                report.to_string().contains("output head rounded to 8 bits ("),
                "{report}"
            );
            // The last of the weights, and all that differs.
            let head_bytes = |model: &Model| model.weights().last().unwrap().size_in_bytes() as u64;
            assert_eq!(
                (head_bytes(&plain), head_bytes(&model)),
                (head.before as u64, head.after as u64)
            );
            assert_eq!(
                plain.bytes_read(1) - head.before as u64,
                model.bytes_read(1) - head.after as u64
            );
            let (expected, actual) = (all_logits(&plain), all_logits(&model));
            assert_nmse(&actual, &expected, 5e-4, &format!("{arithmetic:?}"));
            assert_ne!(actual, expected);
        }
    }
}

#[test]
fn a_head_in_four_bits_stays_and_a_broken_one_is_refused() {
    let folder = in_four_bits(&["lm_head"]);
    let (plain, _) = load(folder.path(), &LoadOptions::default()).unwrap();
    let (model, report) = load(folder.path(), &with_int8_head(Arithmetic::W4A8)).unwrap();
    assert!(report.int8_head.is_none());
    assert!(
        report
            .warnings
            .iter()
            .any(|w| w.contains("in 8 bits was asked for")),
        "{report}"
    );
    assert_eq!(all_logits(&model), all_logits(&plain));

    let folder = rewritten(&tiny(), |name, stored| {
        let mut bytes = stored.bytes.to_vec();
        // The highest bits of the second number, all ones: NaN in every float kind.
        let size = bytes.len() / stored.shape.iter().product::<usize>();
        bytes[size..2 * size].fill(0xff);
        (name == "lm_head.weight").then(|| vec![(name.into(), stored.dtype, stored.shape.clone(), bytes)])
    });
    assert!(load(folder.path(), &LoadOptions::default()).is_ok());
    match load(folder.path(), &with_int8_head(Arithmetic::W4A8)) {
        Err(Error::NonFinite { name, index, .. }) => assert_eq!((&*name, index), ("lm_head.weight", 1)),
        other => panic!("{other:?}"),
    }
}

/// [`Arithmetic::Exact`] holds for a head in FP4 too.
#[test]
fn a_head_in_four_bits_takes_the_arithmetic() {
    let folder = in_four_bits(&["lm_head"]);
    let logits = |arithmetic| {
        let options = LoadOptions {
            arithmetic,
            ..LoadOptions::default()
        };
        let (model, _) = load(folder.path(), &options).unwrap();
        all_logits(&model)
    };
    let (rounded, exact) = (logits(Arithmetic::W4A8), logits(Arithmetic::Exact));
    // Nothing else in this model is in four bits.
    assert_nmse(&rounded, &exact, 5e-4, "rounded activations");
    assert_ne!(rounded, exact);
}
