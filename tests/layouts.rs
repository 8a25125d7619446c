//! The layouts that FP4 checkpoints come in: the same codes give the same logits.

mod common;

use candle_mmfp4::checkpoint::{Checkpoint, Layout, LoadOptions, LoadReport, ModelFiles};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Factor, Format, Fp4Tensor, ScaleRule, quantize};
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model};
use common::draft::{Draft, Stored, tiny};
use common::packed::{Factors, Lie, pack_experts};
use common::values;
use safetensors::Dtype;
use std::path::Path;

const UP: &str = "model.layers.1.mlp.experts.3.up_proj";

fn load(folder: &Path, quantize: Option<Format>) -> candle_mmfp4::Result<(Model, LoadReport)> {
    let options = LoadOptions {
        quantize,
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    common::load(&ModelFiles::folder(folder), &options)
}

fn bits(model: &Model) -> Vec<u32> {
    let logits = model.forward(&[5, 99, 3, 511, 0, 42], 0, &mut model.new_cache(), Logits::All);
    values(&logits.unwrap()).into_iter().map(f32::to_bits).collect()
}

fn stored(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Stored {
    Stored {
        dtype,
        shape: shape.into(),
        bytes: bytes.into(),
    }
}

/// The tiny model with its linear layers quantised and each written as `write` gives it: what follows the module's name,
/// and the tensor.
fn quantised(
    format: Format,
    mut write: impl FnMut(&str, &Fp4Tensor) -> Vec<(&'static str, Stored)>,
) -> Draft {
    let (original, mut draft) = (Checkpoint::open(tiny()).unwrap(), Draft::plain());
    let names: Vec<_> = draft.tensors.keys().cloned().collect();
    for name in names {
        let linear = name.ends_with("_proj.weight") || name.ends_with("_proj_with_mqa.weight");
        let Some(module) = name.strip_suffix(".weight").filter(|_| linear) else {
            continue;
        };
        let (n, k) = {
            let shape = draft.tensors.remove(&name).unwrap().shape;
            (shape[0], shape[1])
        };
        let weights = original.get(&name).unwrap().matrix(&name, n, k).unwrap().to_f32();
        let packed = quantize(&name, &weights, (n, k), format, ScaleRule::default()).unwrap();
        for (suffix, stored) in write(module, &packed) {
            draft.tensors.insert(format!("{module}.{suffix}"), stored);
        }
    }
    draft
}

fn factor(tensor: &Fp4Tensor) -> f32 {
    match tensor.factor() {
        Factor::Mul(factor) => factor,
        other => panic!("{other:?}"),
    }
}

/// A number as `f` of the tensor's factor.
fn number(tensor: &Fp4Tensor, f: impl Fn(f32) -> f32) -> Stored {
    stored(Dtype::F32, &[1], &f(factor(tensor)).to_le_bytes())
}

fn modelopt() -> Draft {
    quantised(Format::nvfp4(), |_, tensor| {
        let (n, k) = tensor.shape();
        let mut factor = number(tensor, |f| f);
        factor.shape = Vec::new();
        vec![
            ("weight", stored(Dtype::U8, &[n, k / 2], tensor.codes())),
            (
                "weight_scale",
                stored(Dtype::F8_E4M3, &[n, k / 16], tensor.scales()),
            ),
            ("weight_scale_2", factor.clone()),
            ("input_scale", factor),
        ]
    })
}

fn compressed(format: Format) -> Draft {
    quantised(format, |_, tensor| {
        let (n, k) = tensor.shape();
        let codes = stored(Dtype::U8, &[n, k / 2], tensor.codes());
        let scales = |dtype| stored(dtype, &[n, k / format.group], tensor.scales());
        if format == Format::mxfp4() {
            return vec![("weight_packed", codes), ("weight_scale", scales(Dtype::U8))];
        }
        vec![
            ("weight_packed", codes),
            ("weight_scale", scales(Dtype::F8_E4M3)),
            ("weight_global_scale", number(tensor, |f| 1.0 / f)),
            ("input_global_scale", number(tensor, |f| f)),
        ]
    })
}

/// The same with another factor for each of the experts' matrices; those that the quantiser chooses are mostly alike.
fn modelopt_varied() -> Draft {
    let mut draft = modelopt();
    let of_experts = |name: &str| name.contains(".experts.") && name.ends_with("weight_scale_2");
    let factors = draft.tensors.iter_mut().filter(|(name, _)| of_experts(name));
    for (index, (_, tensor)) in factors.enumerate() {
        let factor = f32::from_le_bytes(tensor.bytes[..].try_into().unwrap());
        tensor.bytes = (factor * (1.0 + index as f32 / 64.0)).to_le_bytes().into();
    }
    draft
}

/// ModelOpt's, with a layer's experts in `gate_up_proj` and `down_proj`.
fn modelopt_packed(lie: Lie, factors: Factors) -> Draft {
    let mut draft = modelopt_varied();
    pack_experts(&mut draft, lie, factors);
    draft
}

/// MLX's, with the experts of a layer in one tensor.
fn mlx(format: Format) -> Draft {
    let mut draft = quantised(format, |_, tensor| {
        let (n, k) = tensor.shape();
        vec![
            ("weight", stored(Dtype::U32, &[n, k / 8], tensor.codes())),
            (
                "scales",
                stored(Dtype::U8, &[n, k / format.group], tensor.scales()),
            ),
        ]
    });
    let experts: Vec<_> = (draft.tensors.keys().filter(|name| name.contains(".experts.")))
        .cloned()
        .collect();
    // By name: expert 10 would come before expert 2, of which the tiny model has none.
    for name in experts {
        let tensor = draft.tensors.remove(&name).unwrap();
        let (layer, expert) = name.split_once(".experts.").unwrap();
        let (_, rest) = expert.split_once('.').unwrap();
        let stack = draft
            .tensors
            .entry(format!("{layer}.switch_mlp.{rest}"))
            .or_insert_with(|| {
                let shape = [&[0], &tensor.shape[..]].concat();
                stored(tensor.dtype, &shape, &[])
            });
        stack.shape[0] += 1;
        stack.bytes.extend_from_slice(&tensor.bytes);
    }
    draft
}

/// The layouts found, and logits.
fn read(draft: &Draft) -> (Vec<Layout>, Vec<u32>) {
    let folder = draft.write();
    let (model, report) = load(folder.path(), None).unwrap();
    assert!(
        report.unused.is_empty() && report.quantized.tensors == 0,
        "{report}"
    );
    (report.layouts.into_iter().collect(), bits(&model))
}

#[test]
fn the_same_codes_give_the_same_logits() {
    let expected = |format| bits(&load(&tiny(), Some(format)).unwrap().0);
    let (nvfp4, mxfp4) = (expected(Format::nvfp4()), expected(Format::mxfp4()));
    assert!(read(&modelopt()) == (vec![Layout::ModelOpt], nvfp4.clone()));
    assert!(read(&compressed(Format::mxfp4())) == (vec![Layout::CompressedMxfp4], mxfp4.clone()));
    assert!(read(&mlx(Format::mxfp4())) == (vec![Layout::MlxMxfp4], mxfp4));

    // The reciprocal of a factor is an ulp off.
    let (layouts, logits) = read(&compressed(Format::nvfp4()));
    assert_eq!(layouts, [Layout::CompressedNvfp4]);
    for (a, b) in logits
        .iter()
        .zip(&nvfp4)
        .map(|(a, b)| (f32::from_bits(*a), f32::from_bits(*b)))
    {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }

    // MLX has no factor: as ModelOpt's with a factor of 1.
    let mut without = modelopt();
    for (name, tensor) in &mut without.tensors {
        if name.ends_with("weight_scale_2") {
            tensor.bytes = 1f32.to_le_bytes().into();
        }
    }
    let (layouts, logits) = read(&mlx(Format::nvfp4()));
    assert_eq!(layouts, [Layout::MlxNvfp4]);
    assert!(logits == read(&without).1 && logits != nvfp4);
}

#[test]
fn packed_experts_are_repacked_once_and_keep_their_factors() {
    // What the packed ones have for all, each has.
    let apart = |factors: Factors| {
        let mut draft = modelopt_varied();
        let named = draft.tensors.clone();
        for (name, tensor) in &mut draft.tensors {
            let Some((layer, expert)) = name.split_once(".experts.").filter(|_| name.ends_with("scale_2"))
            else {
                continue;
            };
            let part = match expert.split('.').nth(1).unwrap() {
                "up_proj" if factors == Factors::One => "gate_proj",
                part => part,
            };
            if factors != Factors::Each {
                tensor.bytes = named[&format!("{layer}.experts.0.{part}.weight_scale_2")]
                    .bytes
                    .clone();
            }
        }
        read(&draft).1
    };
    for factors in [Factors::Each, Factors::Halves, Factors::One] {
        let expected = apart(factors);
        for lie in [Lie::Rows, Lie::Columns] {
            let (layouts, logits) = read(&modelopt_packed(lie, factors));
            let packed = match lie {
                Lie::Rows => vec![Layout::ModelOpt],
                Lie::Columns => vec![Layout::ModelOpt, Layout::ModelOptPacked],
            };
            assert_eq!(layouts, packed);
            assert!(logits == expected);
        }
    }
    assert!(apart(Factors::Each) != apart(Factors::Halves) && apart(Factors::Halves) != apart(Factors::One));

    // Two layers of eight experts, three matrices each, in columns; of rows nothing is repacked.
    let folder = modelopt_packed(Lie::Columns, Factors::Each).write();
    let (_, report) = load(folder.path(), None).unwrap();
    assert_eq!(report.repacked.tensors, 2 * 8 * 3);
    assert!(
        report.to_string().contains("48 repacked while loading"),
        "{report}"
    );
    // Four tensors of the experts, and one of each other linear layer: 15 of attention, 3 of the MLP, 6 of shared experts.
    assert_eq!(report.input_scales, 4 + 24);
    assert!(
        report.to_string().contains("28 scales of activations ignored"),
        "{report}"
    );
    let folder = modelopt_packed(Lie::Rows, Factors::Each).write();
    assert_eq!(load(folder.path(), None).unwrap().1.repacked.tensors, 0);
}

#[test]
fn packed_experts_that_do_not_fit_are_refused() {
    let stack = "model.layers.1.mlp.experts.gate_up_proj";
    let changed = |suffix: &str, change: &dyn Fn(&mut Stored), parts: &[&str]| {
        let mut draft = modelopt_packed(Lie::Columns, Factors::Each);
        change(draft.get(&format!("{stack}{suffix}")));
        assert_refused(&draft, parts);
    };
    let scales = format!("`{stack}_weight_scale`");
    changed("", &|tensor| tensor.shape.swap(1, 2), &[&scales, "expected [E, "]);
    changed(
        "_weight_scale",
        &|tensor| tensor.shape.swap(0, 2),
        &[&scales, "expected [E, "],
    );
    changed(
        "_weight_scale",
        &|tensor| tensor.dtype = Dtype::I8,
        &[&scales, "I8"],
    );
    changed(
        "_weight_scale",
        &|tensor| tensor.bytes[0] = 0xff,
        &[&scales, "scale [0, 0]"],
    );
    changed(
        "",
        &|tensor| tensor.dtype = Dtype::BOOL,
        &[&format!("`{stack}`"), "BOOL", "U8"],
    );
    let factor = format!("`{stack}_weight_scale_2`");
    changed(
        "_weight_scale_2",
        &|tensor| tensor.shape = vec![4, 4],
        &[&factor, "[4, 4]", "8 experts"],
    );
    changed(
        "_weight_scale_2",
        &|tensor| tensor.bytes[..4].fill(0),
        &[&factor, "above 0"],
    );
    let fewer = |tensor: &mut Stored| {
        tensor.shape[0] = 7;
        tensor.bytes.truncate(tensor.bytes.len() / 8 * 7);
    };
    let mut draft = modelopt_packed(Lie::Columns, Factors::Each);
    for suffix in ["", "_weight_scale", "_weight_scale_2"] {
        fewer(draft.get(&format!("{stack}{suffix}")));
    }
    assert_refused(&draft, &[&format!("`{stack}`"), "more than 7 experts"]);
    for suffix in ["_weight_scale", "_weight_scale_2"] {
        let mut draft = modelopt_packed(Lie::Columns, Factors::Each);
        draft.tensors.remove(&format!("{stack}{suffix}")).unwrap();
        assert_refused(&draft, &[&format!("`{stack}{suffix}`"), "missing"]);
    }
}

/// Loading fails and says all of `parts`.
fn assert_refused(draft: &Draft, parts: &[&str]) {
    let error = load(draft.write().path(), None)
        .err()
        .unwrap_or_else(|| panic!("should say {parts:?}"))
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} should hold {part:?}");
    }
}

#[test]
fn what_is_missing_or_malformed_beside_codes_is_named() {
    let named = |suffix: &str| format!("`{UP}.{suffix}`");
    let without = |mut draft: Draft, suffix: &str| {
        draft.tensors.remove(&format!("{UP}.{suffix}")).unwrap();
        assert_refused(&draft, &[&named(suffix), "missing"]);
    };
    without(modelopt(), "weight_scale");
    without(modelopt(), "weight_scale_2");
    without(compressed(Format::nvfp4()), "weight_scale");
    without(compressed(Format::nvfp4()), "weight_global_scale");
    without(compressed(Format::mxfp4()), "weight_scale");

    let changed = |mut draft: Draft, suffix: &str, change: &dyn Fn(&mut Stored), parts: &[&str]| {
        change(draft.get(&format!("{UP}.{suffix}")));
        assert_refused(&draft, &[&[named(suffix).as_str()], parts].concat());
    };
    let flat = |stored: &mut Stored| stored.shape = vec![stored.shape.iter().product()];
    for suffix in ["weight_packed", "weight_scale"] {
        changed(compressed(Format::nvfp4()), suffix, &flat, &["shape"]);
        changed(compressed(Format::mxfp4()), suffix, &flat, &["shape"]);
    }
    changed(modelopt(), "weight_scale", &flat, &["shape"]);
    let nan = |stored: &mut Stored| stored.bytes[0] = 0xff;
    changed(
        compressed(Format::mxfp4()),
        "weight_scale",
        &nan,
        &["scale [0, 0]"],
    );
    changed(modelopt(), "weight_scale", &nan, &["scale [0, 0]"]);
    let zero = |stored: &mut Stored| stored.bytes.fill(0);
    changed(
        compressed(Format::nvfp4()),
        "weight_global_scale",
        &zero,
        &["above 0"],
    );
    let wide = |stored: &mut Stored| (stored.shape, stored.bytes) = (vec![2], vec![1; 8]);
    changed(
        compressed(Format::nvfp4()),
        "weight_global_scale",
        &wide,
        &["[2]"],
    );
    let other = |stored: &mut Stored| stored.dtype = Dtype::I8;
    changed(
        compressed(Format::nvfp4()),
        "weight_scale",
        &other,
        &["I8", "NVFP4"],
    );
    changed(modelopt(), "weight_scale", &other, &["I8", "ModelOpt"]);

    let stack = "model.layers.1.mlp.switch_mlp.up_proj.scales";
    let mut draft = mlx(Format::mxfp4());
    let experts = draft.get(stack).shape[0];
    draft.get(stack).shape[0] = experts - 1;
    let shorter = draft.get(stack).bytes.len() / experts * (experts - 1);
    draft.get(stack).bytes.truncate(shorter);
    assert_refused(&draft, &[&format!("`{stack}`"), "experts"]);
}

#[test]
fn other_quantisers_are_refused_by_name() {
    let integers = stored(Dtype::I32, &[1], &[0; 4]);
    let beside = |suffix: &str, parts: &[&str]| {
        let mut draft = Draft::packed();
        draft.tensors.insert(format!("{UP}.{suffix}"), integers.clone());
        assert_refused(
            &draft,
            &[&[format!("`{UP}.{suffix}`").as_str(), "--quantize"], parts].concat(),
        );
    };
    beside("biases", &["affine"]);
    beside("g_idx", &["GPTQ"]);
    beside("qzeros", &["AWQ"]);
    beside("weight_zero_point", &["zero points"]);
    beside("weight_shape", &["pack-quantized"]);
    beside("weight.absmax", &["bitsandbytes"]);
    beside("weight_scale_inv", &["FP8"]);
    beside("weight.quant_map", &["bitsandbytes"]);
    beside("SCB", &["bitsandbytes"]);
    beside("q_weight", &["EXL2"]);
    beside("trellis", &["EXL3"]);
    beside("W_q", &["HQQ"]);
    beside("codebooks", &["AQLM"]);
    beside("Qidxs", &["QuIP#"]);
    beside("su", &["trellis"]);
    beside("pre_quant_scale", &["NVFP4_AWQ"]);
    beside("svdquant_lora_a", &["NVFP4_SVD"]);

    // By the dtype alone.
    for (dtype, what) in [
        (Dtype::F8_E4M3, "FP8"),
        (Dtype::F8_E5M2, "FP8"),
        (Dtype::I8, "eight-bit integers"),
    ] {
        let mut draft = Draft::plain();
        let name = format!("{UP}.weight");
        let tensor = draft.get(&name);
        *tensor = stored(dtype, &tensor.shape, &tensor.bytes[..tensor.bytes.len() / 2]);
        assert_refused(&draft, &[&format!("`{name}`"), what, "--quantize"]);
    }
}

#[test]
fn codes_of_a_column_in_a_word_are_refused() {
    let name = "model.layers.1.mlp.shared_experts.up_proj";
    let mut draft = Draft::packed();
    draft.get(&format!("{name}.weight")).shape.reverse();
    let [k, n] = draft.get(&format!("{name}.weight")).shape[..] else {
        panic!()
    };
    assert_ne!(k, n);
    assert_refused(
        &draft,
        &[&format!("`{name}.weight`"), "codes of a column", "--quantize"],
    );
}

#[test]
fn scales_that_lie_the_other_way_round_are_turned() {
    let expected = read(&Draft::packed());
    assert_eq!(expected.0, [Layout::Marlin]);
    let mut draft = Draft::packed();
    let mut turned = 0;
    for (name, tensor) in &mut draft.tensors {
        let &[rows, columns] = &tensor.shape[..] else {
            continue;
        };
        if !name.ends_with(".scales") || rows == columns {
            continue;
        }
        let from = tensor.bytes.clone();
        for (i, to) in tensor.bytes.chunks_exact_mut(2).enumerate() {
            let at = 2 * (i % rows * columns + i / rows);
            to.copy_from_slice(&from[at..at + 2]);
        }
        tensor.shape = vec![columns, rows];
        turned += 1;
    }
    assert!(turned > 10 && read(&draft) == (vec![Layout::MarlinTurned], expected.1));
}

#[test]
fn rotations_are_refused_wherever_they_are_told() {
    let said = |name: &str, text: &str| {
        let folder = Draft::packed().write();
        std::fs::write(folder.path().join(name), text).unwrap();
        load(folder.path(), None)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    const BESIDE: &str = "quantization_config.json";
    said(
        BESIDE,
        r#"{"format": "mmfp4_e2m1_marlin", "use_hadamard": false, "hadamard_block_size": 64}"#,
    )
    .unwrap();
    for (text, parts) in [
        (
            r#"{"use_hadamard": true, "hadamard_block_size": 64}"#,
            ["use_hadamard = true", "--quantize mmfp4"],
        ),
        (
            r#"{"hadamard_block_size": 128}"#,
            ["hadamard_block_size = 128", "--quantize mmfp4"],
        ),
        ("{", ["not JSON", "fetch"]),
    ] {
        let error = said(BESIDE, text).unwrap_err();
        for part in parts.iter().chain(&[BESIDE]) {
            assert!(error.contains(part), "{error} should hold {part}");
        }
    }
    // And in it, and beside the weight, in either spelling.
    let mut draft = Draft::packed();
    draft.config["quantization_config"] = serde_json::json!({"quant_method": "mmfp4", "use_hadamard": true});
    assert_refused(&draft, &["quantization_config.use_hadamard = true", "Hadamard"]);
    for name in ["hadamard_block_size", "weight.hadamard_block_size"] {
        let name = format!("{UP}.{name}");
        let marked = |dtype, bytes: &[u8]| {
            let mut draft = Draft::packed();
            let (shape, bytes) = (vec![1], bytes.to_vec());
            draft.tensors.insert(name.clone(), Stored { dtype, shape, bytes });
            draft
        };
        let named = format!("`{name}`");
        assert_refused(
            &marked(Dtype::I32, &64i32.to_le_bytes()),
            &[
                &named,
                "model.safetensors",
                "it is 64",
                "Hadamard",
                "--quantize mmfp4",
            ],
        );
        assert_refused(&marked(Dtype::I64, &(-2i64).to_le_bytes()), &[&named, "it is -2"]);
        assert_refused(
            &marked(Dtype::F32, &64f32.to_le_bytes()),
            &[&named, "F32", "one integer"],
        );
        // A block of one is no rotation.
        let (model, report) = load(marked(Dtype::I32, &1i32.to_le_bytes()).write().path(), None).unwrap();
        assert!(report.unused.is_empty(), "{report}");
        assert!(bits(&model) == bits(&load(Draft::packed().write().path(), None).unwrap().0));
    }
}

/// The tiny model with `kv_b_proj` as MLX and llama.cpp split it, in floating point: keys transposed, values as they are.
fn split() -> Draft {
    let mut draft = Draft::plain();
    let size = |name: &str| draft.config[name].as_u64().unwrap() as usize;
    let (heads, latent) = (size("num_attention_heads"), size("kv_lora_rank"));
    let (nope, value) = (size("qk_nope_head_dim"), size("v_head_dim"));
    let names: Vec<_> = (draft.tensors.keys().filter(|name| name.contains("kv_b_proj")))
        .cloned()
        .collect();
    for name in names {
        let tensor = draft.tensors.remove(&name).unwrap();
        let element = tensor.bytes.len() / (heads * (nope + value) * latent);
        let at = |row: usize, column: usize| {
            let start = (row * latent + column) * element;
            tensor.bytes[start..start + element].to_vec()
        };
        let rows = |head: usize| head * (nope + value)..;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..heads {
            let first = rows(head).start;
            for column in 0..latent {
                keys.extend((first..first + nope).flat_map(|row| at(row, column)));
            }
            for row in first + nope..first + nope + value {
                values.extend((0..latent).flat_map(|column| at(row, column)));
            }
        }
        let prefix = name.strip_suffix("kv_b_proj.weight").unwrap();
        let dtype = tensor.dtype;
        draft.tensors.insert(
            format!("{prefix}embed_q.weight"),
            stored(dtype, &[heads, latent, nope], &keys),
        );
        draft.tensors.insert(
            format!("{prefix}unembed_out.weight"),
            stored(dtype, &[heads, value, latent], &values),
        );
    }
    draft
}

fn logits_by(model: &mut Model, path: AttentionPath) -> Vec<f32> {
    model.set_attention_path(path);
    bits(model).into_iter().map(f32::from_bits).collect()
}

#[test]
fn a_split_kv_b_is_used_in_its_own_orientation() {
    let close = |a: &[f32], b: &[f32], what: &str| {
        let error: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f32 = b.iter().map(|b| b * b).sum();
        assert!(error <= 1e-9 * norm, "{what}: {}", error / norm);
    };
    let (mut joint, _) = load(&tiny(), None).unwrap();
    let folder = split().write();
    let (mut model, report) = load(folder.path(), None).unwrap();
    assert!(report.unused.is_empty(), "{report}");
    for path in [AttentionPath::Absorbed, AttentionPath::Materialised] {
        close(
            &logits_by(&mut model, path),
            &logits_by(&mut joint, path),
            &format!("{path:?}"),
        );
    }
    // Quantised, its sums run along other axes than those of the joint one; both ways to attend read the same weights.
    let quantize = Format {
        group: 16,
        ..Format::mmfp4()
    };
    let (mut model, report) = load(folder.path(), Some(quantize)).unwrap();
    assert!(report.kept.is_empty(), "{report}");
    let absorbed = logits_by(&mut model, AttentionPath::Absorbed);
    close(
        &logits_by(&mut model, AttentionPath::Materialised),
        &absorbed,
        "quantised",
    );
    assert!(absorbed != logits_by(&mut joint, AttentionPath::Absorbed));

    let mut draft = split();
    draft
        .tensors
        .remove("model.layers.1.self_attn.unembed_out.weight")
        .unwrap();
    assert_refused(
        &draft,
        &["`model.layers.1.self_attn.unembed_out.weight`", "missing"],
    );
    let mut draft = split();
    draft
        .get("model.layers.1.self_attn.embed_q.weight")
        .shape
        .swap(1, 2);
    assert_refused(&draft, &["`model.layers.1.self_attn.embed_q.weight`", "shape"]);
}
