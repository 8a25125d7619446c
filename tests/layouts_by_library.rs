//! Every layout as its own library writes it: values and logits.
//!
//! The folders are those of `MMFP4_LAYOUTS`, which `tools/layout_fixtures` makes of the whole demo model, or the
//! repository's, which it makes of a small part of it. Every matrix has the values that the library decodes it to, to the
//! bit, and the logits are those of this crate's own file of the same codes.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::{Layout, LoadOptions, LoadReport};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Weight;
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use common::transcribe::transcribed;
use common::{Case, Golden, assert_nmse, bf16_demo, repository, top, values};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How logits compare with those of our own file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Logit {
    Bits,
    /// NMSE: our own file divides by a factor's reciprocal, an ulp off, or holds values in F32, summed in another order.
    Close(f64),
}

/// Folders by name: the layout that is found in them, if they are FP4, and how logits compare.
const LAYOUTS: [(&str, Option<Layout>, Logit); 14] = [
    ("compressed-nvfp4", Some(Layout::CompressedNvfp4), Logit::Bits),
    ("compressed-mxfp4", Some(Layout::CompressedMxfp4), Logit::Bits),
    ("modelopt-nvfp4", Some(Layout::ModelOpt), Logit::Close(1e-9)),
    ("modelopt-nvfp4-power", Some(Layout::ModelOpt), Logit::Bits),
    ("mlx-mxfp4", Some(Layout::MlxMxfp4), Logit::Bits),
    ("mlx-nvfp4", Some(Layout::MlxNvfp4), Logit::Bits),
    ("marlin-a", Some(Layout::Marlin), Logit::Bits),
    ("marlin-b", Some(Layout::Marlin), Logit::Bits),
    ("gguf-mxfp4", Some(Layout::GgufMxfp4), Logit::Bits),
    ("gguf-nvfp4", Some(Layout::GgufNvfp4), Logit::Bits),
    ("gguf-q4_0", None, Logit::Close(1e-9)),
    ("gguf-q5_1", None, Logit::Close(1e-9)),
    ("gguf-q8_0", None, Logit::Close(1e-9)),
    ("gguf-q4_k_m", None, Logit::Close(1e-9)),
];

/// What a library says of the folder that it wrote.
#[derive(Deserialize)]
struct Written {
    library: String,
    digests: Vec<String>,
}

fn root() -> PathBuf {
    std::env::var_os("MMFP4_LAYOUTS").map_or(repository("tests/data/layouts"), PathBuf::from)
}

fn load(folder: &Path, arithmetic: Arithmetic) -> (Model, LoadReport) {
    let options = LoadOptions {
        arithmetic,
        ..LoadOptions::default()
    };
    Model::from_folder(folder, &options, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let logits = model.forward(tokens, 0, &mut model.new_cache(), Logits::All);
    values(&logits.unwrap())
}

/// The bits of all values in F32 as the digits of a number in an odd base, modulo 2^64; zeros without sign, as
/// `tools/layout_fixtures/source.py` has it.
fn digest(weight: &Weight) -> String {
    let (n, k) = weight.shape();
    let (mut digest, mut row) = (0u64, vec![0.0f32; k]);
    for n in 0..n {
        weight.decode_row(n, &mut row);
        for value in &row {
            let bits = u64::from((value + 0.0).to_bits());
            digest = (digest.wrapping_add(bits + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    format!("{digest:016x}")
}

fn digests(model: &Model) -> Vec<String> {
    let mut digests: Vec<_> = model.weights().into_iter().map(digest).collect();
    digests.sort();
    digests
}

/// The greedy words after a prompt.
fn say(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let (mut cache, mut tokens, mut said) = (model.new_cache(), prompt.to_vec(), Vec::new());
    let mut position = 0;
    while said.len() < count {
        let logits = model
            .forward(&tokens, position, &mut cache, Logits::Last)
            .unwrap();
        position += tokens.len();
        let (id, _) = top(&values(&logits));
        tokens = vec![id];
        said.push(id);
    }
    said
}

/// Requires the same words of a library's file and of ours after every golden prompt, where their logits are the same;
/// says which answers are BF16's.
fn said(golden: &Golden, theirs: &Path, ours: &Path, compare: Logit) -> String {
    let [theirs, ours] = [theirs, ours].map(|folder| load(folder, Arithmetic::default()).0);
    let same = |case: &&Case| {
        let count = case.greedy_ids.len();
        let words = say(&theirs, &case.input_ids, count);
        if compare == Logit::Bits {
            assert_eq!(words, say(&ours, &case.input_ids, count), "{}", case.name);
        }
        words == case.greedy_ids
    };
    let names: Vec<_> = (golden.cases.iter().filter(same))
        .map(|case| case.name.as_str())
        .collect();
    format!(" | {}", names.join(", "))
}

/// The source's `config.json`: GGUF files have none, and Marlin's says nothing of quantisation.
fn config(root: &Path) -> Value {
    let text = std::fs::read(root.join("marlin-b/config.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn every_layout_is_read_as_its_library_wrote_it() {
    let root = root();
    let text = std::fs::read_to_string(root.join("digests.json")).unwrap();
    let written: BTreeMap<String, Written> = serde_json::from_str(&text).unwrap();
    assert!(written.len() >= 9, "{:?}", written.keys());
    // The small part of the demo model has nothing to say.
    let golden = Golden::read(&bf16_demo());
    let words = Some(golden).filter(|_| config(&root)["vocab_size"] == 4096);
    for (
        name,
        Written {
            library,
            digests: expected,
        },
    ) in &written
    {
        let (_, layout, compare) = LAYOUTS
            .into_iter()
            .find(|(known, ..)| known == name)
            .unwrap_or_else(|| panic!("{name}"));
        let folder = root.join(name);
        let own = transcribed(&folder, config(&root)).write();
        for arithmetic in [Arithmetic::Exact, Arithmetic::W4A8] {
            let (theirs, report) = load(&folder, arithmetic);
            assert_eq!(
                report.layouts.iter().copied().collect::<Vec<_>>(),
                layout.into_iter().collect::<Vec<_>>(),
                "{name}"
            );
            assert!(report.unused.is_empty(), "{name}: {report}");
            assert!(
                digests(&theirs) == *expected,
                "{name}: other values than the library's"
            );
            let (ours, report) = load(own.path(), arithmetic);
            assert!(report.unused.is_empty(), "{name}: {report}");
            let tokens = [5, 9, 3, 51, 0, 42, 63];
            let (a, b) = (logits(&theirs, &tokens), logits(&ours, &tokens));
            match compare {
                Logit::Bits => {
                    assert!(
                        digests(&ours) == *expected,
                        "{name}: our own file has other values"
                    );
                    let same = a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same && a.len() == b.len(), "{name}, {arithmetic:?}: other logits");
                }
                Logit::Close(bound) if arithmetic == Arithmetic::Exact => assert_nmse(&a, &b, bound, name),
                Logit::Close(_) => {}
            }
        }
        let words = words
            .as_ref()
            .map_or(String::new(), |golden| said(golden, &folder, own.path(), compare));
        println!(
            "{name} | {library} | {} matrices | {compare:?}{words}",
            expected.len()
        );
    }
}
