//! Rounding with calibration: that it loses less, and that interruptions do no harm.

mod common;

use candle_core::Device;
use candle_mmfp4::Result;
use candle_mmfp4::checkpoint::{
    Checkpoint, LoadOptions, QuantizeOptions, QuantizeReport, quantize_calibrated, quantize_checkpoint,
};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{Tokenizer, calibration_windows};
use candle_mmfp4::models::glm4_moe_lite::{Calibration, Config, Logits, Model, Sequence};
use common::{bf16_demo, contents, values};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Tokens that the demo model knows.
const VOCABULARY: usize = 4096;

/// The held-out documents in windows of 128 tokens: those to calibrate with, and, of other documents, those to measure with.
fn windows() -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let text = std::fs::read(bf16_demo().join("heldout.json")).unwrap();
    let documents: Value = serde_json::from_slice(&text).unwrap();
    let documents = documents.as_array().unwrap().iter();
    let texts: Vec<&str> = documents
        .map(|document| document["text"].as_str().unwrap())
        .collect();
    let tokenizer = Tokenizer::from_file(bf16_demo().join("tokenizer.json")).unwrap();
    let of = |remainder: usize, tokens: usize| {
        let chosen: Vec<_> = texts.iter().skip(remainder).step_by(2).collect();
        calibration_windows(&tokenizer, &chosen, 128, tokens).unwrap()
    };
    (of(0, 16_384), of(1, 8192))
}

fn write(
    windows: &[Vec<u32>],
    target: &Path,
    options: &QuantizeOptions,
    progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    let source = Checkpoint::open(bf16_demo())?;
    let config = Config::from_file(bf16_demo().join("config.json"))?;
    let mut inputs = Calibration::new(&source, config, windows, "text")?;
    quantize_calibrated(&source, target, options, &mut inputs, progress)
}

/// Logarithms of probabilities, a row a token.
fn predictions(folder: &Path, windows: &[Vec<u32>]) -> Vec<f32> {
    let options = LoadOptions {
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    let (model, _) = Model::from_folder(folder, &options, &Device::Cpu).unwrap();
    let mut rows = Vec::new();
    for windows in windows.chunks(8) {
        let alone = windows.iter().map(|tokens| Sequence {
            tokens,
            position: 0,
            cache: None,
        });
        let logits = model.forward_batch(&mut alone.collect::<Vec<_>>(), Logits::All, None);
        rows.extend(values(&candle_nn::ops::log_softmax(&logits.unwrap(), 1).unwrap()));
    }
    rows
}

/// The mean divergence of a token's predictions from those of another model.
fn divergence(found: &[f32], reference: &[f32]) -> f64 {
    let terms = found
        .iter()
        .zip(reference)
        .map(|(q, p)| f64::from(p.exp() * (p - q)));
    terms.sum::<f64>() / (found.len() / VOCABULARY) as f64
}

#[test]
fn other_text_is_predicted_better_than_with_plain_rounding() {
    let (read, unread) = windows();
    let place = tempfile::tempdir().unwrap();
    let original = predictions(&bf16_demo(), &unread);
    let options = QuantizeOptions::new(Format::mmfp4());
    let (plain, calibrated) = (place.path().join("plain"), place.path().join("calibrated"));
    let source = Checkpoint::open(bf16_demo()).unwrap();
    quantize_checkpoint(&source, &plain, &options, |_, _| {}).unwrap();
    let report = write(&read, &calibrated, &options, |_, _| {}).unwrap();
    assert_eq!(report.uncalibrated, 0);
    let of = |folder: &Path| divergence(&predictions(folder, &unread), &original);
    let (before, after) = (of(&plain), of(&calibrated));
    println!("divergence: {before} by plain rounding, {after} calibrated");
    // Not the loss, which over so few tokens may fall or rise by chance.
    assert!(after < 0.9 * before, "{after} for {before}");
}

#[test]
fn what_was_read_is_noted_and_tells_interrupted_runs_apart() {
    let (read, other) = windows();
    let (read, other) = (&read[..8], &other[..8]);
    let place = tempfile::tempdir().unwrap();
    let options = QuantizeOptions {
        shard_bytes: 1_000_000,
        ..QuantizeOptions::new(Format::nvfp4())
    };
    let straight = place.path().join("straight");
    let report = write(read, &straight, &options, |_, _| {}).unwrap();
    // In so short a text most experts see less than their weights have columns.
    assert!(
        report.uncalibrated > 50 && report.to_string().contains("without calibration"),
        "{report}"
    );
    let config: Value =
        serde_json::from_slice(&std::fs::read(straight.join("config.json")).unwrap()).unwrap();
    let note = &config["quantization_config"]["producer"]["calibration"];
    assert_eq!(
        (&note["text"], &note["windows"]),
        (&"text".into(), &8.into()),
        "{note}"
    );
    assert_eq!(note["tokens"], read.concat().len(), "{note}");

    let interrupted = |target: &Path| {
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            write(read, target, &options, |done, total| {
                assert!(done < total / 2, "stopped")
            })
        }));
        assert!(stopped.is_err() && !target.exists());
    };
    let target = place.path().join("continued");
    interrupted(&target);
    let resumed = write(read, &target, &options, |_, _| {}).unwrap().resumed;
    assert!(resumed > 1, "{resumed}");
    assert!(contents(&target) == contents(&straight));

    let target = place.path().join("anew");
    interrupted(&target);
    assert_eq!(write(other, &target, &options, |_, _| {}).unwrap().resumed, 0);
    let target = place.path().join("plain");
    interrupted(&target);
    let source = Checkpoint::open(bf16_demo()).unwrap();
    assert_eq!(
        quantize_checkpoint(&source, &target, &options, |_, _| {})
            .unwrap()
            .resumed,
        0
    );
}

#[test]
fn what_no_model_could_read_is_refused() {
    let source = Checkpoint::open(bf16_demo()).unwrap();
    let config = Config::from_file(bf16_demo().join("config.json")).unwrap();
    let limit = config.max_position_embeddings;
    for (windows, part) in [
        (vec![], "at least one token"),
        (vec![vec![1], vec![]], "prompt"),
        (vec![vec![1; limit + 1]], "2048"),
        (vec![vec![1, 4096]], "4096"),
    ] {
        let error = Calibration::new(&source, config.clone(), &windows, "text")
            .err()
            .unwrap();
        assert!(error.to_string().contains(part), "{error}");
    }
}
