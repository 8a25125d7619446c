//! Rounding with calibration: that it loses less, and that interruptions do no harm.

mod common;

use candle_core::Device;
use candle_mmfp4::Result;
use candle_mmfp4::checkpoint::{
    Checkpoint, LoadOptions, QuantizeOptions, QuantizeReport, StoredTensor, quantize_calibrated,
    quantize_checkpoint,
};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{Tokenizer, calibration_windows};
use candle_mmfp4::models::glm4_moe_lite::{Calibration, Config, Logits, Model, Sequence};
use common::{bf16_demo, contents, goldens, noise, repository, rewritten, values};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Tokens that the demo model knows.
const VOCABULARY: usize = 4096;

/// Every second held-out document, from this one on, in windows of so many tokens; so many tokens of them at most.
fn documents(first: usize, size: usize, most: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read(bf16_demo().join("heldout.json")).unwrap();
    let documents: Value = serde_json::from_slice(&text).unwrap();
    let documents = documents.as_array().unwrap().iter();
    let texts: Vec<&str> = documents
        .map(|document| document["text"].as_str().unwrap())
        .collect();
    let tokenizer = Tokenizer::from_file(bf16_demo().join("tokenizer.json")).unwrap();
    let chosen: Vec<_> = texts.iter().skip(first).step_by(2).collect();
    calibration_windows(&tokenizer, &chosen, size, most).unwrap()
}

/// Windows to calibrate with, and, of other documents, those to measure with.
fn windows() -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    (documents(0, 128, 16_384), documents(1, 128, 8192))
}

fn write(
    windows: &[Vec<u32>],
    target: &Path,
    options: &QuantizeOptions,
    progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    write_from(&bf16_demo(), windows, target, options, progress)
}

fn write_from(
    source: &Path,
    windows: &[Vec<u32>],
    target: &Path,
    options: &QuantizeOptions,
    progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    let config = Config::from_file(source.join("config.json"))?;
    let source = Checkpoint::open(source)?;
    let mut inputs = Calibration::new(&source, config, windows, "text")?;
    quantize_calibrated(&source, target, options, &mut inputs, progress)
}

fn opened(folder: &Path) -> Model {
    let options = LoadOptions {
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    Model::from_folder(folder, &options, &Device::Cpu).unwrap().0
}

/// Logarithms of probabilities, a row a token; windows run together.
fn logarithms(model: &Model, windows: &[Vec<u32>]) -> Vec<f32> {
    let alone = windows.iter().map(|tokens| Sequence {
        tokens,
        position: 0,
        cache: None,
    });
    let logits = model.forward_batch(&mut alone.collect::<Vec<_>>(), Logits::All, None);
    values(&candle_nn::ops::log_softmax(&logits.unwrap(), 1).unwrap())
}

/// [`logarithms`] of all windows.
fn predictions(folder: &Path, windows: &[Vec<u32>]) -> Vec<f32> {
    let model = opened(folder);
    let rows = windows.chunks(8).map(|windows| logarithms(&model, windows));
    rows.flatten().collect()
}

/// The sum of each window's losses.
fn losses(folder: &Path, windows: &[Vec<u32>]) -> Vec<f64> {
    let model = opened(folder);
    let mut losses = Vec::new();
    for windows in windows.chunks(4) {
        let rows = logarithms(&model, windows);
        let mut rows = rows.chunks_exact(VOCABULARY);
        for tokens in windows {
            let rows: Vec<_> = rows.by_ref().take(tokens.len()).collect();
            let predicted = rows.iter().zip(&tokens[1..]);
            losses.push(
                -predicted
                    .map(|(row, next)| f64::from(row[*next as usize]))
                    .sum::<f64>(),
            );
        }
    }
    losses
}

/// The mean divergence of a token's predictions from those of another model.
fn divergence(found: &[f32], reference: &[f32], vocabulary: usize) -> f64 {
    let terms = found
        .iter()
        .zip(reference)
        .map(|(q, p)| f64::from(p.exp() * (p - q)));
    terms.sum::<f64>() / (found.len() / vocabulary) as f64
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
    let of = |folder: &Path| divergence(&predictions(folder, &unread), &original, VOCABULARY);
    let (before, after) = (of(&plain), of(&calibrated));
    println!("divergence: {before} by plain rounding, {after} calibrated");
    // Not the loss, which over so few tokens may fall or rise by chance. With the original model's inputs alone, whatever the
    // layers before have become, 0.85 of it are left.
    assert!(after < 0.83 * before, "{after} for {before}");
}

/// All held-out text, each half of its documents by a model that was calibrated with the other half.
#[test]
fn perplexity_falls() {
    let halves = [0, 1].map(|first| documents(first, 512, usize::MAX));
    let source = Checkpoint::open(bf16_demo()).unwrap();
    for (format, errors) in [
        (Format::mmfp4(), 2.0),
        (Format::mxfp4(), 5.0),
        (Format::nvfp4(), 3.0),
    ] {
        let place = tempfile::tempdir().unwrap();
        let options = QuantizeOptions::new(format);
        let plain = place.path().join("plain");
        quantize_checkpoint(&source, &plain, &options, |_, _| {}).unwrap();
        let mut compared = Vec::new();
        for (read, unread) in [(0, 1), (1, 0)] {
            let calibrated = place.path().join(format!("calibrated-{read}"));
            write(&halves[read], &calibrated, &options, |_, _| {}).unwrap();
            let predicted = halves[unread].iter().map(|window| window.len() - 1);
            let before = losses(&plain, &halves[unread]);
            let after = losses(&calibrated, &halves[unread]);
            compared.extend(predicted.zip(before.into_iter().zip(after)));
        }
        let tokens = compared.iter().map(|(tokens, _)| *tokens).sum::<usize>() as f64;
        let perplexity = |losses: f64| (losses / tokens).exp();
        let before = perplexity(compared.iter().map(|(_, losses)| losses.0).sum());
        let after = perplexity(compared.iter().map(|(_, losses)| losses.1).sum());
        // A window's gain beyond what its length explains.
        let gain = (before / after).ln();
        let rests = compared
            .iter()
            .map(|(tokens, (before, after))| before - after - gain * *tokens as f64);
        let error = rests.map(|rest| rest * rest).sum::<f64>().sqrt() / tokens;
        let what = format!(
            "{format:?}: {before} by plain rounding, {after} calibrated: a token's loss falls by {gain} ± {error}"
        );
        println!("{what}");
        assert!(gain > errors * error, "{what}");
    }
}

/// Without a low rank of queries, with biases, with layers beyond the decoder's, and so on; one weight stays as it is.
#[test]
fn every_kind_of_model_is_calibrated() {
    const WORDS: usize = 512;
    let windows = |count: usize, seed| -> Vec<Vec<u32>> {
        let places = noise(count * 64, seed).into_iter();
        let ids: Vec<u32> = places.map(|x| ((x + 1.0) / 2.0 * WORDS as f32) as u32).collect();
        ids.chunks(64).map(<[u32]>::to_vec).collect()
    };
    let (read, unread) = (windows(128, 1), windows(32, 2));
    let kept = "layers.1.self_attn.o_proj".to_string();
    let options = QuantizeOptions {
        keep: vec![kept.clone()],
        ..QuantizeOptions::new(Format::mxfp4())
    };
    let attention = QuantizeOptions {
        keep: vec![kept, "mlp".into()],
        ..options.clone()
    };
    for golden in goldens() {
        let source = golden.folder;
        if source == bf16_demo() {
            continue;
        }
        let place = tempfile::tempdir().unwrap();
        let target = |name: &str| place.path().join(name);
        let report = write_from(&source, &read, &target("attention"), &attention, |_, _| {}).unwrap();
        let beyond = source.ends_with("transformers4-config");
        let expected = if beyond { 5 } else { 0 };
        assert_eq!(report.uncalibrated, expected, "{}: {report}", source.display());

        let (plain, calibrated) = (target("plain"), target("calibrated"));
        quantize_checkpoint(&Checkpoint::open(&source).unwrap(), &plain, &options, |_, _| {}).unwrap();
        let report = write_from(&source, &read, &calibrated, &options, |_, _| {}).unwrap();
        assert_eq!(report.kept.len(), 1, "{}: {report}", source.display());
        let original = predictions(&source, &unread);
        let of = |folder: &Path| divergence(&predictions(folder, &unread), &original, WORDS);
        let (before, after) = (of(&plain), of(&calibrated));
        println!(
            "{}: {before} by plain rounding, {after} calibrated",
            source.display()
        );
        assert!(after < 0.7 * before, "{}: {after} for {before}", source.display());
    }
}

/// Such weights stand at the end of their file, behind those of later layers.
#[test]
fn weights_of_odd_sizes_are_calibrated() {
    const RANK: usize = 62;
    let source = repository("tests/data/tiny-models/plain");
    let bytes = |stored: &StoredTensor, shape: &[usize], kept: usize| -> Vec<u8> {
        let rows = stored.bytes.chunks(stored.shape.last().unwrap() * 2);
        let rows = rows.map(|row| &row[..2 * shape.last().unwrap()]);
        rows.take(kept).flatten().copied().collect()
    };
    let folder = rewritten(&source, |name, stored| {
        let (shape, rows) = match name.rsplit_once("self_attn.")?.1 {
            // 62 rows of four scales each.
            "q_a_proj.weight" => (vec![RANK, stored.shape[1]], RANK),
            "q_a_layernorm.weight" => (vec![RANK], 1),
            "q_b_proj.weight" => (vec![stored.shape[0], RANK], stored.shape[0]),
            _ => return None,
        };
        let bytes = bytes(stored, &shape, rows);
        Some(vec![(name.to_string(), stored.dtype, shape, bytes)])
    });
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["q_lora_rank"] = RANK.into();
    std::fs::write(&path, config.to_string()).unwrap();

    let windows: Vec<Vec<u32>> = (0..8)
        .map(|w| (0..64).map(|t| (w * 71 + t * 37) % 512).collect())
        .collect();
    let options = QuantizeOptions {
        keep: vec!["mlp".into()],
        ..QuantizeOptions::new(Format::mxfp4())
    };
    let place = tempfile::tempdir().unwrap();
    let mut last = (0, 0);
    let report = write_from(
        folder.path(),
        &windows,
        &place.path().join("out"),
        &options,
        |done, total| {
            assert!(done <= total, "{done} of {total}");
            last = (done, total);
        },
    );
    let report = report.unwrap();
    assert_eq!((report.uncalibrated, report.shards), (0, 1), "{report}");
    // All but q_b_proj, whose inputs are no multiple of a group.
    assert_eq!(report.quantized.tensors, 3 * 4, "{report}");
    assert_eq!(last.0, last.1);
}

/// Writes the first half of a model.
fn interrupted(windows: &[Vec<u32>], target: &Path, options: &QuantizeOptions) {
    let stopped = catch_unwind(AssertUnwindSafe(|| {
        write(windows, target, options, |done, total| {
            assert!(done < total / 2, "stopped")
        })
    }));
    assert!(stopped.is_err() && !target.exists());
}

/// What an interrupted run has left is what the layers behind it are calibrated with.
#[test]
fn an_interrupted_run_ends_as_one_that_was_not() {
    let windows = documents(0, 512, 4096);
    for format in [Format::mmfp4(), Format::nvfp4()] {
        let place = tempfile::tempdir().unwrap();
        let options = QuantizeOptions {
            shard_bytes: 1_000_000,
            keep: vec!["layers.0.self_attn".into()],
            ..QuantizeOptions::new(format)
        };
        let straight = place.path().join("straight");
        write(&windows, &straight, &options, |_, _| {}).unwrap();
        let continued = place.path().join("continued");
        interrupted(&windows, &continued, &options);
        let report = write(&windows, &continued, &options, |_, _| {}).unwrap();
        assert!(report.resumed > 1 && report.resumed < report.shards, "{report}");
        assert!(contents(&continued) == contents(&straight), "{format:?}");
    }
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

    let target = place.path().join("anew");
    interrupted(read, &target, &options);
    assert_eq!(write(other, &target, &options, |_, _| {}).unwrap().resumed, 0);
    let target = place.path().join("plain");
    interrupted(read, &target, &options);
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
