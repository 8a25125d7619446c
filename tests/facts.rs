//! What the trained model knows survives in four bits: the share of questions answered to the letter.
//!
//! The questions are those of `MMFP4_FACTS`, a JSON list of `question` and `answer`, or the repository's; in
//! BF16 the model answers 99.9 % of them.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{FinishReason, Message, Options, Pipeline, RenderOptions, Sampling};
use candle_mmfp4::kv::CacheFormat;
use common::{bf16_demo, mmfp4_demo, repository};
use serde::Deserialize;
use std::path::{Path, PathBuf};

const REQUIRED: f64 = 0.99;
/// Where the cache is in four bits too.
const REQUIRED_FP4_CACHE: f64 = 0.988;
/// Questions answered together: each weight is read once for all of them.
const BATCH: usize = 64;

#[derive(Deserialize)]
struct Fact {
    question: String,
    answer: String,
}

fn facts() -> Vec<Fact> {
    let path =
        std::env::var_os("MMFP4_FACTS").map_or(repository("tests/data/demo-model/facts.json"), PathBuf::from);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let facts: Vec<Fact> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(!facts.is_empty(), "{}: no questions", path.display());
    facts
}

/// Asks every question, greedily and without thinking, requires the share of exact answers, and gives the answers.
fn ask(folder: &Path, load: LoadOptions, required: f64, what: &str) -> Vec<String> {
    let quantize = load.quantize;
    let (pipeline, report) = Pipeline::from_folder(folder, &load, &Device::Cpu).unwrap();
    assert_eq!(report.quantized.tensors > 0, quantize.is_some(), "{report}");
    assert_eq!(report.fp4.tensors > 0, quantize.is_none(), "{report}");

    let facts = facts();
    let options = Options {
        sampling: Sampling::default(),
        max_tokens: Some(256),
        ..Options::default()
    };
    let no_thinking = RenderOptions {
        enable_thinking: Some(false),
        ..RenderOptions::default()
    };
    let (mut misses, mut answers) = (Vec::new(), Vec::new());
    for batch in facts.chunks(BATCH) {
        let prompts: Vec<_> = batch
            .iter()
            .map(|fact| {
                let question = [Message::new("user", fact.question.as_str())];
                pipeline.chat_prompt(&question, &no_thinking).unwrap()
            })
            .collect();
        let prompts: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
        let outputs = pipeline.generate_batch(&prompts, &options, |_, _| {}).unwrap();
        for (fact, output) in batch.iter().zip(outputs) {
            // An answer that goes on for ever is none, however it begins.
            if output.reason != FinishReason::Stop || output.text.trim() != fact.answer.trim() {
                misses.push((fact, output.text.clone()));
            }
            answers.push(output.text);
        }
    }
    let share = 1.0 - misses.len() as f64 / facts.len() as f64;
    println!(
        "{what}: {:.2} % of {} questions answered exactly",
        100.0 * share,
        facts.len()
    );
    for (fact, text) in misses.iter().take(5) {
        println!(
            "  {}\n    expected {:?}\n    found    {text:?}",
            fact.question, fact.answer
        );
    }
    assert!(share >= required, "{what}: {share}");
    answers
}

#[test]
fn mmfp4_as_bundled() {
    let with = |arithmetic| LoadOptions {
        arithmetic,
        ..LoadOptions::default()
    };
    let rounded = ask(&mmfp4_demo(), with(Arithmetic::W4A8), REQUIRED, "MMFP4");
    let exact = ask(&mmfp4_demo(), with(Arithmetic::Exact), REQUIRED, "MMFP4, exact");
    let changed = rounded.iter().zip(&exact).filter(|(a, b)| a != b).count();
    println!("{changed} answers differ between the two");
    assert!(changed < 8, "{changed}");
}

#[test]
fn nvfp4_quantised_while_loading() {
    let load = LoadOptions {
        quantize: Some(Format::nvfp4()),
        ..LoadOptions::default()
    };
    ask(&bf16_demo(), load, REQUIRED, "NVFP4");
}

#[test]
fn mmfp4_over_a_cache_in_fp4() {
    let load = LoadOptions {
        kv_cache: CacheFormat::fp4().into(),
        ..LoadOptions::default()
    };
    ask(&mmfp4_demo(), load, REQUIRED_FP4_CACHE, "MMFP4, cache in FP4");
}
