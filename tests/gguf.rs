//! GGUF files: the same codes give the same logits, and no damaged file does harm.

mod common;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_mmfp4::checkpoint::{Checkpoint, Layout, LoadOptions, LoadReport, ModelFiles};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Bytes, Format, Weight};
use candle_mmfp4::generation::{Message, Pipeline, RenderOptions, Tokenizer};
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Config, Logits, Model};
use common::draft::{Draft, tiny};
use common::gguf::{
    self, Gguf, Packed, bool_value, f16, f32_value, i32s_value, integers, mxfp4, nvfp4, text_value,
    texts_value, u32_value,
};
use common::{assert_nmse, mmfp4_demo, repository, values};
use safetensors::Dtype;
use std::collections::BTreeMap;

/// Blocks of a matrix `[N, K]`.
type Pack = fn((usize, usize), &[f32]) -> Packed;

fn options(quantize: Option<Format>) -> LoadOptions {
    LoadOptions {
        quantize,
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    }
}

fn files(bytes: &[u8]) -> ModelFiles {
    ModelFiles::in_memory("held", [("model.gguf", Bytes::copy_from(bytes).unwrap())])
}

fn open(file: &Gguf) -> candle_mmfp4::Result<(Model, LoadReport)> {
    common::load(&files(&file.bytes()), &options(None))
}

fn logits(model: &Model) -> Vec<f32> {
    let logits = model.forward(&[5, 99, 3, 511, 0, 42], 0, &mut model.new_cache(), Logits::All);
    values(&logits.unwrap())
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

fn of_folder(folder: &std::path::Path, quantize: Option<Format>) -> Vec<f32> {
    logits(
        &Model::from_folder(folder, &options(quantize), &Device::Cpu)
            .unwrap()
            .0,
    )
}

/// Attention layers of five linear layers, an MLP of three and two mixtures of nine experts.
const LINEARS: usize = 3 * 5 + 3 + 2 * 3 * 9;

#[test]
fn the_same_codes_give_the_same_logits() {
    let cases: [(Pack, _, _); 2] = [
        (mxfp4, Format::mxfp4(), Layout::GgufMxfp4),
        (nvfp4, Format::nvfp4(), Layout::GgufNvfp4),
    ];
    for (pack, format, layout) in cases {
        let file = Gguf::tiny(false, pack);
        let (model, report) = open(&file).unwrap();
        assert_eq!(report.layouts.iter().collect::<Vec<_>>(), [&layout]);
        assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
        assert_eq!((report.fp4.tensors, report.repacked.tensors), (0, LINEARS));
        let codes: usize = model
            .weights()
            .iter()
            .filter(|w| matches!(w, Weight::Fp4(_)))
            .map(|w| w.size_in_bytes())
            .sum();
        assert_eq!(report.repacked.bytes, codes);
        assert!(report.to_string().contains("repacked while loading"), "{report}");
        assert!(
            bits(logits(&model)) == bits(of_folder(&tiny(), Some(format))),
            "{layout}"
        );
    }
}

#[test]
fn what_a_file_says_is_what_a_config_says() {
    let expected = Config::from_file(tiny().join("config.json")).unwrap();
    for split in [false, true] {
        let file = Gguf::tiny(split, mxfp4);
        assert_eq!(
            Config::from_files(&files(&file.bytes())).unwrap(),
            expected,
            "{split}"
        );
    }
}

#[test]
fn halves_of_kv_b_are_used_as_they_lie() {
    let whole = open(&Gguf::tiny(false, f16)).unwrap().0;
    let (mut halves, report) = open(&Gguf::tiny(true, f16)).unwrap();
    assert!(report.unused.is_empty() && report.copied.is_empty(), "{report}");
    assert_eq!(whole.bytes_read(1), halves.bytes_read(1));
    for path in [AttentionPath::Absorbed, AttentionPath::Materialised] {
        halves.set_attention_path(path);
        assert_nmse(&logits(&halves), &logits(&whole), 1e-9, &format!("{path:?}"));
    }
    // In four bits too, both ways.
    let (mut halves, _) = open(&Gguf::tiny(true, mxfp4)).unwrap();
    halves.set_attention_path(AttentionPath::Absorbed);
    let absorbed = logits(&halves);
    halves.set_attention_path(AttentionPath::Materialised);
    assert_nmse(&logits(&halves), &absorbed, 1e-9, "MXFP4");
}

#[test]
fn floats_are_used_where_they_lie() {
    let (model, report) = open(&Gguf::tiny(false, f16)).unwrap();
    assert_eq!(
        (report.dense.tensors > LINEARS, report.repacked.tensors),
        (true, 0)
    );
    // The tiny model's BF16 weights are F16's too, but for the smallest.
    assert_nmse(&logits(&model), &of_folder(&tiny(), None), 1e-6, "F16");
}

/// The tiny model with the weights that `pack` makes of its own, in F32.
fn decoded(pack: &impl Fn((usize, usize), &[f32]) -> Packed) -> Draft {
    decoded_or(pack, |_| false)
}

/// The same, but those that `stays` is true of as they were.
fn decoded_or(pack: &impl Fn((usize, usize), &[f32]) -> Packed, stays: impl Fn(&Packed) -> bool) -> Draft {
    let mut draft = Draft::plain();
    for (name, tensor) in &mut draft.tensors {
        if !(name.ends_with("_proj.weight") || name.ends_with("_with_mqa.weight")) {
            continue;
        }
        let values: Vec<f32> = tensor
            .bytes
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        let shape = (tensor.shape[0], tensor.shape[1]);
        let packed = pack(shape, &values);
        if stays(&packed) {
            continue;
        }
        tensor.bytes = gguf::decoded(&packed, shape)
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        tensor.dtype = Dtype::F32;
    }
    draft
}

#[test]
fn integers_are_decoded_as_candle_decodes_them() {
    for (by_256, by_32) in [
        (GgmlDType::Q4K, GgmlDType::Q5_0),
        (GgmlDType::Q6K, GgmlDType::Q8_0),
        (GgmlDType::Q8_0, GgmlDType::Q8_0),
    ] {
        let pack = integers(by_256, by_32);
        let (model, report) = open(&Gguf::tiny(false, &pack)).unwrap();
        assert_eq!(
            (report.blocks.tensors, report.fp4.tensors),
            (LINEARS, 0),
            "{report}"
        );
        assert!(
            report.to_string().contains("in integer blocks") && report.copied.is_empty(),
            "{report}"
        );
        let folder = decoded(&pack).write();
        assert_nmse(
            &logits(&model),
            &of_folder(folder.path(), None),
            1e-9,
            &format!("{by_256:?}"),
        );
        // Both ways to attend, of halves.
        let (mut halves, _) = open(&Gguf::tiny(true, &pack)).unwrap();
        halves.set_attention_path(AttentionPath::Absorbed);
        let absorbed = logits(&halves);
        halves.set_attention_path(AttentionPath::Materialised);
        assert_nmse(&logits(&halves), &absorbed, 1e-9, &format!("{by_256:?}, halves"));
    }
}

#[test]
fn what_k_quants_cannot_hold_is_in_f16_and_reported() {
    // As llama.cpp does where not even 32 divides a row; here wherever 256 does not.
    let pack = |shape: (usize, usize), values: &[f32]| match shape.1.is_multiple_of(256) {
        true => integers(GgmlDType::Q4K, GgmlDType::Q8_0)(shape, values),
        false => f16(shape, values),
    };
    let (model, report) = open(&Gguf::tiny(false, pack)).unwrap();
    let draft = Draft::plain();
    let linear = |name: &str| name.ends_with("_proj.weight") || name.ends_with("_with_mqa.weight");
    let odd = draft
        .tensors
        .iter()
        .filter(|(name, tensor)| linear(name) && tensor.shape[1] % 256 != 0);
    let odd: Vec<_> = odd
        .map(|(name, tensor)| (name.clone(), tensor.shape[1]))
        .collect();
    assert!(!odd.is_empty() && odd.len() < LINEARS);
    assert_eq!(report.blocks.tensors, LINEARS - odd.len());
    let kept: BTreeMap<_, _> = report
        .kept
        .iter()
        .map(|kept| (&kept.name, &kept.reason))
        .collect();
    assert_eq!(kept.len(), odd.len());
    for (name, k) in &odd {
        let reason = format!("the file has it in F16: K = {k} is not a multiple of 256, which k-quants need");
        assert_eq!(*kept[name], reason);
    }
    assert!(report.to_string().contains("stay in floating point"), "{report}");
    let expected = decoded_or(&pack, |packed| packed.kind == gguf::F16);
    assert_nmse(
        &logits(&model),
        &of_folder(expected.write().path(), None),
        1e-6,
        "F16 and Q4_K",
    );
    // Of a file without k-quants there is nothing to tell.
    let report = open(&Gguf::tiny(false, f16)).unwrap().1;
    assert!(report.kept.is_empty(), "{report}");
}

#[test]
fn integers_can_be_quantised_while_loading() {
    let file = Gguf::tiny(false, integers(GgmlDType::Q6K, GgmlDType::Q8_0));
    let bytes = files(&file.bytes());
    let (_, report) = Model::from_files(&bytes, &options(Some(Format::nvfp4())), &Device::Cpu).unwrap();
    assert_eq!(
        (report.quantized.tensors, report.blocks.tensors),
        (LINEARS, 0),
        "{report}"
    );
}

/// FNV-1a, 64 bits, over the values' bytes; zeros have no sign, as the library's codes have none.
fn fnv(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|value| (value + 0.0).to_le_bytes());
    let digest = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{digest:016x}")
}

/// Files of llama.cpp's own library, made by tools/gguf_fixtures.py.
#[test]
fn every_value_is_the_librarys() {
    let folder = repository("tests/data/gguf");
    let text = std::fs::read_to_string(folder.join("digests.json")).unwrap();
    let expected: BTreeMap<String, Vec<String>> = serde_json::from_str(&text).unwrap();
    assert_eq!(expected.len(), 4);
    for (name, mut expected) in expected {
        let path = folder.join(format!("{name}.gguf"));
        let (model, report) = Model::from_folder(&path, &options(None), &Device::Cpu).unwrap();
        assert!(report.unused.is_empty(), "{name}: {report}");
        let mut found: Vec<String> = model
            .weights()
            .into_iter()
            .map(|weight| fnv(&decode(weight)))
            .collect();
        found.sort();
        // Embeddings are no product's.
        expected.sort();
        assert!(found == expected, "{name}: {found:?} {expected:?}");
        let logits = model.forward(&[1, 2, 3], 0, &mut model.new_cache(), Logits::All);
        assert!(
            values(&logits.unwrap()).iter().all(|value| value.is_finite()),
            "{name}"
        );
    }
}

fn decode(weight: &Weight) -> Vec<f32> {
    let (n, k) = weight.shape();
    let mut values = vec![0.0; n * k];
    for (n, row) in values.chunks_mut(k).enumerate() {
        weight.decode_row(n, row);
    }
    values
}

fn assert_refused(file: &Gguf, parts: &[&str]) {
    assert_bytes_refused(&file.bytes(), parts);
}

fn assert_bytes_refused(bytes: &[u8], parts: &[&str]) {
    let error = common::load(&files(bytes), &options(None));
    let error = error.unwrap_err().to_string();
    for part in parts.iter().chain(&["held"]) {
        assert!(error.contains(part), "{error} should contain {part}");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let plain = Gguf::tiny(false, mxfp4);
    let set = |key: &str, value: gguf::Value, parts: &[&str]| {
        let mut file = plain.clone();
        file.set(key, value);
        assert_refused(&file, &[&[key], parts].concat());
    };
    set(
        "general.architecture",
        text_value("llama"),
        &["llama", "deepseek2"],
    );
    set("deepseek2.expert_gating_func", u32_value(1), &["sigmoid"]);
    set("deepseek2.expert_gating_func", f32_value(2.0), &["sigmoid"]);
    set("deepseek2.block_count", text_value("three"), &["a size"]);
    set("deepseek2.block_count", u32_value(u32::MAX), &["tensors"]);
    set("deepseek2.expert_weights_norm", u32_value(1), &["true or false"]);
    set("deepseek2.rope.freq_base", f32_value(f32::NAN), &["finite"]);
    set(
        "deepseek2.attention.key_length",
        u32_value(15),
        &["rope.dimension_count"],
    );
    set("tokenizer.ggml.eos_token_id", bool_value(true), &["token's id"]);
    let say = |key: &str, value: gguf::Value, field: &str| {
        let mut file = plain.clone();
        file.set(key, value);
        assert_refused(&file, &[field, "its metadata"]);
    };
    say("deepseek2.rope.scaling.type", text_value("yarn"), "rope_type");
    say("deepseek2.embedding_length", u32_value(0), "hidden_size = 0");
    for key in [
        "deepseek2.expert_gating_func",
        "deepseek2.kv_lora_rank",
        "deepseek2.context_length",
    ] {
        let mut file = plain.clone();
        let key = if key.ends_with("kv_lora_rank") {
            "deepseek2.attention.kv_lora_rank"
        } else {
            key
        };
        file.remove(key);
        assert_refused(&file, &[key, "lack"]);
    }
    let change = |name: &str, change: &dyn Fn(&mut gguf::Stored), parts: &[&str]| {
        let mut file = plain.clone();
        change(file.get(name));
        assert_refused(&file, parts);
    };
    let name = "blk.1.ffn_up_exps.weight";
    change(name, &|tensor| tensor.kind = 23, &[name, "blocks of 256"]);
    let larger = |tensor: &mut gguf::Stored| {
        tensor.kind = 20;
        tensor.bytes.resize(8 * 64 * 128 / 32 * 18, 0);
    };
    change(name, &larger, &[name, "IQ4_NL", "Q4_K_M"]);
    change(name, &|tensor| tensor.kind = 99, &[name, "type 99"]);
    change(
        name,
        &|tensor| tensor.shape[0] = 7,
        &["switch_mlp.up_proj.weight.mxfp4", "experts"],
    );
    change(
        name,
        &|tensor| tensor.shape[2] = 64,
        &["switch_mlp.up_proj.weight.mxfp4", "shape"],
    );
    let gone = "blk.2.attn_norm.weight";
    change(
        gone,
        &|tensor| tensor.name = "other".into(),
        &["model.layers.2.input_layernorm.weight", "missing"],
    );
    change(
        "output_norm.weight",
        &|tensor| tensor.kind = 8,
        &["model.norm.weight", "missing"],
    );
    let biased = "blk.1.attn_q_a.bias";
    change(
        "blk.1.attn_q_a.weight",
        &|tensor| tensor.name = biased.into(),
        &[biased, "only weights"],
    );
    change(
        "blk.1.attn_q_a.weight",
        &|tensor| tensor.name = "blk.01.attn_q_b.weight".into(),
        &["attn_q_b", "second"],
    );
    // A scale that is NaN, of a block's first byte; a factor that nobody multiplies by.
    change(
        name,
        &|tensor| tensor.bytes[0] = 255,
        &["up_proj", "scale [0, 0]"],
    );
    let mut file = Gguf::tiny(false, nvfp4);
    file.get(name).bytes[0] |= 0x80;
    assert_refused(&file, &["up_proj", "sign"]);
    file = Gguf::tiny(false, nvfp4);
    file.get("blk.1.ffn_up_exps.scale").bytes[..4].copy_from_slice(&0f32.to_le_bytes());
    assert_refused(&file, &["up_proj.scale", "it is 0"]);
    for pack in [f16, |shape: (usize, usize), values: &[f32]| {
        integers(GgmlDType::Q4K, GgmlDType::Q8_0)(shape, values)
    }] {
        let factor = |shape: (usize, usize), values: &[f32]| Packed {
            factor: Some(2.0),
            ..pack(shape, values)
        };
        assert_refused(&Gguf::tiny(false, factor), &[".scale", "not in FP4"]);
    }
}

#[test]
fn damaged_headers_are_refused() {
    let plain = Gguf::tiny(false, mxfp4);
    let bytes = plain.bytes();
    let at = |at: usize, new: &[u8], parts: &[&str]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        assert_bytes_refused(&bytes, &[&["model.gguf"], parts].concat());
    };
    at(0, b"GGML", &["not a GGUF file"]);
    at(4, &1u32.to_le_bytes(), &["version 1"]);
    at(4, &3u32.to_be_bytes(), &["big-endian"]);
    // Counts and lengths that no memory holds.
    for huge in [u64::MAX, 1 << 60, 1 << 40] {
        at(8, &huge.to_le_bytes(), &["tensor"]);
        at(16, &huge.to_le_bytes(), &["metadata"]);
        at(24, &huge.to_le_bytes(), &["metadata"]);
    }
    let with = |key: &str, kind: u32, value: &[u8], parts: &[&str]| {
        let mut file = plain.clone();
        file.set(key, (kind, value.to_vec()));
        assert_refused(&file, &[&["model.gguf"], parts].concat());
    };
    for kind in [4u32, 8, 9, 12, 13] {
        let array = [&kind.to_le_bytes()[..], &(u64::MAX / 4).to_le_bytes()].concat();
        with("an.array", 9, &array, &["an.array"]);
    }
    with("a.text", 8, &u64::MAX.to_le_bytes(), &["a.text"]);
    with("a.text", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff], &["a.text"]);
    with("a.truth", 7, &[2], &["a.truth"]);
    with("a.kind", 77, &[], &["a.kind"]);
    for alignment in [0u32, 1, 4, 24, 1 << 30] {
        with(
            "general.alignment",
            4,
            &alignment.to_le_bytes(),
            &["general.alignment"],
        );
    }
    let mut twice = plain.clone();
    twice.metadata.push(("general.name".into(), text_value("again")));
    assert_refused(&twice, &["general.name", "twice"]);
    let mut twice = plain.clone();
    twice.tensors.push(plain.tensors[3].clone());
    assert_refused(&twice, &[&plain.tensors[3].name, "twice"]);

    // The first tensor's description: rank, dimensions, type, offset.
    let name = plain.tensors[1].name.as_bytes();
    let start = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap()
        + name.len();
    let rank = plain.tensors[1].shape.len();
    let name = plain.tensors[1].name.as_str();
    at(start, &5u32.to_le_bytes(), &[name, "dimensions"]);
    at(start, &0u32.to_le_bytes(), &[name, "dimensions"]);
    at(start + 4, &0u64.to_le_bytes(), &[name, "shape"]);
    at(start + 4, &(1u64 << 62).to_le_bytes(), &[name]);
    let offset = start + 4 + 8 * rank + 4;
    at(offset, &1u64.to_le_bytes(), &[name, "multiple of 32"]);
    at(offset, &0u64.to_le_bytes(), &["overlaps"]);
    at(offset, &(1u64 << 40).to_le_bytes(), &[name, "outside"]);
    at(offset, &(u64::MAX - 31).to_le_bytes(), &[name, "outside"]);

    // An alignment of its own is followed.
    let mut aligned = plain.clone();
    aligned.alignment = 128;
    aligned.set("general.alignment", u32_value(128));
    assert!(bits(logits(&open(&aligned).unwrap().0)) == bits(logits(&open(&plain).unwrap().0)));
}

/// A file that ends early is refused wherever it ends.
#[test]
fn every_truncation_is_refused() {
    let bytes = Gguf::tiny(false, mxfp4).bytes();
    let header = bytes.len() - data_len(&bytes);
    let ends = (0..header)
        .chain((header..bytes.len()).step_by(997))
        .chain([bytes.len() - 1]);
    for end in ends {
        let error = Checkpoint::from_files(&files(&bytes[..end]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("model.gguf"), "{end}: {error}");
    }
    assert!(Checkpoint::from_files(&files(&bytes)).is_ok());
}

/// Bytes from the first tensor's data on.
fn data_len(bytes: &[u8]) -> usize {
    let checkpoint = Checkpoint::from_files(&files(bytes)).unwrap();
    let first = checkpoint
        .tensors()
        .map(|(_, tensor)| tensor.bytes.offset())
        .min();
    bytes.len() - first.unwrap()
}

/// Headers with a few bytes changed: whatever they say, no panic, and errors name the file.
#[test]
fn no_mutation_does_harm() {
    let plain = Gguf::tiny(true, integers(GgmlDType::Q6K, GgmlDType::Q8_0)).bytes();
    let header = plain.len() - data_len(&plain);
    let mut state = 7u64;
    let mut next = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let (mut bytes, mut refused, mut loaded) = (plain.clone(), 0, 0);
    for _ in 0..20_000 {
        let mut places = Vec::new();
        for _ in 0..1 + next(3) {
            let place = next(header);
            bytes[place] = [0, 1, 8, 0x7f, 0x80, 0xff, next(256) as u8][next(7)];
            places.push(place);
        }
        let held = files(&bytes);
        let opened =
            Checkpoint::from_files(&held).and_then(|checkpoint| Ok((Config::from_files(&held)?, checkpoint)));
        match opened {
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("model.gguf"), "{error}");
                refused += 1;
            }
            // Loading takes its time: some of those that can be opened.
            Ok((config, checkpoint)) if loaded < 300 => {
                let _ = Model::load(config, &checkpoint, &options(None), &Device::Cpu);
                loaded += 1;
            }
            Ok(_) => {}
        }
        places.into_iter().for_each(|place| bytes[place] = plain[place]);
    }
    assert!(refused > 4000 && loaded == 300, "{refused} {loaded}");
}

/// The demo model's tokenizer, as llama.cpp's converter writes it.
fn with_tokenizer(file: &mut Gguf) {
    let text = std::fs::read_to_string(mmfp4_demo().join("tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut tokens = BTreeMap::new();
    for (token, id) in json["model"]["vocab"].as_object().unwrap() {
        tokens.insert(id.as_u64().unwrap(), (token.clone(), 1));
    }
    for token in json["added_tokens"].as_array().unwrap() {
        let content = token["content"].as_str().unwrap().to_string();
        tokens.insert(token["id"].as_u64().unwrap(), (content, 3));
    }
    // Rows of the embedding that no token stands for are written so.
    let last = tokens.len() as u64;
    tokens.insert(last, (format!("[PAD{last}]"), 5));
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    file.set("tokenizer.ggml.model", text_value("gpt2"));
    file.set("tokenizer.ggml.pre", text_value("glm4"));
    let texts: Vec<&str> = tokens.values().map(|(token, _)| token.as_str()).collect();
    file.set("tokenizer.ggml.tokens", texts_value(&texts));
    let kinds: Vec<i32> = tokens.values().map(|(_, kind)| *kind).collect();
    file.set("tokenizer.ggml.token_type", i32s_value(&kinds));
    file.set(
        "tokenizer.ggml.merges",
        texts_value(&merges.iter().map(String::as_str).collect::<Vec<_>>()),
    );
}

fn pipeline(file: &Gguf) -> candle_mmfp4::Result<Pipeline> {
    Ok(Pipeline::from_files(&files(&file.bytes()), &options(None), &Device::Cpu)?.0)
}

#[test]
fn a_file_speaks_for_itself() {
    let mut file = Gguf::tiny(false, mxfp4);
    with_tokenizer(&mut file);
    file.set("tokenizer.ggml.eot_token_id", u32_value(7));
    file.set(
        "tokenizer.chat_template",
        text_value("<|user|>{{ messages[0].content }}<|assistant|>"),
    );
    let pipeline = pipeline(&file).unwrap();
    let expected = Tokenizer::from_file(mmfp4_demo().join("tokenizer.json")).unwrap();
    let texts = [
        "Hello,  world!\n\n  x = 12345;",
        "<|user|>What's a `Vec`?<|assistant|><think>",
        "für 日本 🦀\t",
        "",
    ];
    for text in texts {
        let tokens = expected.encode(text).unwrap();
        assert_eq!(pipeline.tokenizer().encode(text).unwrap(), tokens, "{text:?}");
        assert_eq!(
            pipeline.tokenizer().encode_plain(text).unwrap(),
            expected.encode_plain(text).unwrap()
        );
        for skip in [false, true] {
            let decoded = expected.decode(&tokens, skip).unwrap();
            assert_eq!(pipeline.tokenizer().decode(&tokens, skip).unwrap(), decoded);
        }
    }
    assert_eq!(pipeline.tokenizer().token_id("[PAD4096]"), None);
    let prompt = pipeline
        .chat_prompt(&[Message::new("user", "Hi")], &RenderOptions::default())
        .unwrap();
    assert_eq!(prompt, expected.encode("<|user|>Hi<|assistant|>").unwrap());
    assert_eq!(pipeline.defaults().eos_token_id, [1, 7]);
}

#[test]
fn another_tokenizer_is_refused_unless_one_lies_beside_it() {
    let mut plain = Gguf::tiny(false, mxfp4);
    with_tokenizer(&mut plain);
    let refused = |change: &dyn Fn(&mut Gguf), parts: &[&str]| {
        let mut file = plain.clone();
        change(&mut file);
        let error = pipeline(&file).unwrap_err().to_string();
        for part in parts.iter().chain(&["model.gguf"]) {
            assert!(error.contains(part), "{error} should contain {part}");
        }
    };
    let beside = "put the tokenizer.json of the original model beside it";
    refused(
        &|file| file.remove("tokenizer.ggml.model"),
        &["model = missing", beside],
    );
    refused(
        &|file| file.set("tokenizer.ggml.pre", text_value("llama-bpe")),
        &["pre = llama-bpe", beside],
    );
    refused(
        &|file| file.remove("tokenizer.ggml.merges"),
        &["lack tokenizer.ggml.merges", beside],
    );
    refused(
        &|file| file.set("tokenizer.ggml.tokens", i32s_value(&[1])),
        &["tokenizer.ggml.tokens", beside],
    );
    refused(
        &|file| file.set("tokenizer.ggml.token_type", i32s_value(&[1])),
        &["types of 1", beside],
    );
    refused(
        &|file| file.set("tokenizer.ggml.merges", texts_value(&["no such"])),
        &["not a tokenizer"],
    );

    let text = std::fs::read(mmfp4_demo().join("tokenizer.json")).unwrap();
    let held = [
        ("model.gguf", Gguf::tiny(false, mxfp4).bytes()),
        ("tokenizer.json", text),
    ];
    let held = held.map(|(name, bytes)| (name, Bytes::copy_from(&bytes).unwrap()));
    Pipeline::from_files(&ModelFiles::in_memory("held", held), &options(None), &Device::Cpu).unwrap();
}
