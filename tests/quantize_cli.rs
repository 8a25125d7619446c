//! `mmfp4 quantize` as its users run it.

mod common;

use candle_mmfp4::checkpoint::Checkpoint;
use common::{bf16_demo, contents};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const QUESTION: &str = "What does `Ordering::is_eq` do?";
const ANSWER: &str = "Returns true if the ordering is the Equal variant.";
/// Of the demo model's six layers each is larger.
const SMALL: [&str; 2] = ["--shard-size", "1MB"];

fn mmfp4(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfp4"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

fn quantize(target: &Path, more: &[&str]) -> Command {
    let mut command = mmfp4(&["quantize"]);
    command.arg(bf16_demo()).arg(target).args(more);
    command
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn error(output: &Output) -> &str {
    assert!(!output.status.success(), "{output:?}");
    std::str::from_utf8(&output.stderr).unwrap().trim_end()
}

#[test]
fn what_is_written_answers() {
    let place = tempfile::tempdir().unwrap();
    for (format, tensors) in [
        ("mmfp4", ".scales"),
        ("nvfp4", ".weight_global_scale"),
        ("mxfp4", ".weight_packed"),
    ] {
        let target = place.path().join(format);
        let said = succeeds(&mut quantize(&target, &["--format", format]));
        assert!(
            said.contains("read a decoded token") && said.contains("weights in 4 bits"),
            "{said}"
        );
        let written = Checkpoint::open(&target).unwrap();
        assert!(
            written.tensors().any(|(name, _)| name.ends_with(tensors)),
            "{format}"
        );
        let model = target.to_str().unwrap();
        let answer = succeeds(&mut mmfp4(&["generate", "-m", model, "-p", QUESTION]));
        assert_eq!(answer.trim_end(), ANSWER, "{format}");
    }
}

#[test]
fn options_keep_weights_and_mistakes_are_told() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("kept");
    let said = succeeds(&mut quantize(
        &target,
        &[
            "--keep",
            "kv_b_proj=bf16",
            "--keep",
            "o_proj",
            "--skip-layers",
            "0,-1",
        ],
    ));
    for expected in [
        "names it: kv_b_proj",
        "names it: o_proj",
        "layer 0 is one of",
        "layer 5 is one of",
    ] {
        assert!(said.contains(expected), "{said}");
    }
    let again = quantize(&target, &[]).output().unwrap();
    assert!(error(&again).contains("already there"), "{again:?}");
    let other = place.path().join("other");
    let twice = mmfp4(&["quantize", target.to_str().unwrap(), other.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(error(&twice).contains("quantised already"), "{twice:?}");
    for (more, part) in [
        (["--keep", "o_proj=int8"], "kept as they are"),
        (["--shard-size", "2"], "such as 500MB"),
        (["--shard-size", "0GB"], "such as 500MB"),
        (["--format", "int4"], "mmfp4, mxfp4 or nvfp4"),
    ] {
        let refused = quantize(&other, &more).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(error(&refused).contains(part), "{refused:?}");
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
}

/// The names of finished files, and when they were.
fn finished(partial: &Path) -> BTreeMap<String, std::time::SystemTime> {
    let entries = std::fs::read_dir(partial).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors"))
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, entry.metadata().ok()?.modified().ok()?))
        })
        .collect()
}

#[test]
fn a_killed_run_is_continued() {
    let place = tempfile::tempdir().unwrap();
    let straight = place.path().join("straight");
    succeeds(&mut quantize(&straight, &SMALL));
    let expected = contents(&straight);
    for attempt in 0..20 {
        let target = place.path().join(format!("killed-{attempt}"));
        let partial = target.with_extension("partial");
        let mut child = quantize(&target, &SMALL).spawn().unwrap();
        let start = Instant::now();
        while finished(&partial).len() < 3 && start.elapsed() < Duration::from_secs(120) && !target.exists() {
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if target.exists() {
            // It was quicker than the kill.
            continue;
        }
        let before = finished(&partial);
        assert!(before.len() >= 3, "{before:?}");
        let said = succeeds(&mut quantize(&target, &SMALL));
        assert!(contents(&target) == expected);
        let kept = finished(&target)
            .into_iter()
            .filter(|(name, at)| before.get(name) == Some(at))
            .count();
        // The last may have been finished and not yet noted.
        assert!(
            kept + 1 >= before.len() && said.contains(&format!("{kept} of which were finished before")),
            "{kept}: {said}"
        );
        return;
    }
    panic!("every run ended before it could be killed");
}

/// A disk that is full in the middle of a file: here, a limit on the size of files.
#[test]
#[cfg(unix)]
fn a_failed_write_is_told_and_the_rest_continued() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("model");
    // In blocks of 512 bytes; the embeddings' file has 4 MB, a sparse layer's less than 1 MB.
    let script = "trap '' XFSZ; ulimit -f 3000; exec \"$0\" \"$@\"";
    let plain = quantize(&target, &SMALL);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", script])
        .arg(plain.get_program())
        .args(plain.get_args());
    let output = limited.stdin(Stdio::null()).output().unwrap();
    assert!(error(&output).contains("model.partial"), "{output:?}");
    assert!(!target.exists() && !place.path().join("model.partial").exists());

    // The first file fits; that of the two layers that are kept does not.
    let sizes: Vec<_> = {
        let straight = place.path().join("straight");
        succeeds(&mut quantize(
            &straight,
            &["--shard-size", "9MB", "--skip-layers", "3,4"],
        ));
        let files = contents(&straight)
            .into_iter()
            .filter(|(name, _)| name.ends_with(".safetensors"));
        files.map(|(_, bytes)| bytes.len()).collect()
    };
    let largest = sizes.iter().max().unwrap();
    let index = sizes.iter().position(|size| size == largest).unwrap();
    assert!(index > 0, "{sizes:?}");
    let script = format!(
        "trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"",
        (largest - 1) / 512
    );
    let plain = quantize(&target, &["--shard-size", "9MB", "--skip-layers", "3,4"]);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", &script])
        .arg(plain.get_program())
        .args(plain.get_args());
    let output = limited.stdin(Stdio::null()).output().unwrap();
    assert!(error(&output).contains("model-0000"), "{output:?}");
    let said = succeeds(&mut quantize(
        &target,
        &["--shard-size", "9MB", "--skip-layers", "3,4"],
    ));
    assert!(
        said.contains(&format!("{index} of which were finished before")),
        "{said}"
    );
    assert!(contents(&target) == contents(&place.path().join("straight")));
}

#[test]
fn a_text_calibrates_whatever_the_number_of_threads() {
    let place = tempfile::tempdir().unwrap();
    let text = bf16_demo().join("heldout.json");
    let calibrate = [
        "--calibrate",
        text.to_str().unwrap(),
        "--calibrate-tokens",
        "4096",
    ];
    let run = |name: &str, threads: &str, more: &[&str]| {
        let target = place.path().join(name);
        let mut command = quantize(&target, more);
        let command = command
            .env("RAYON_NUM_THREADS", threads)
            .env("MMFP4_THREADS", threads);
        succeeds(command);
        contents(&target)
    };
    let (one, three) = (run("one", "1", &calibrate), run("three", "3", &calibrate));
    assert!(one == three);
    let plain = run("plain", "1", &[]);
    assert!(plain["model.safetensors"] != one["model.safetensors"]);
    let config = std::str::from_utf8(&one["config.json"]).unwrap();
    assert!(
        config.contains("heldout.json") && config.contains("\"calibration\""),
        "{config}"
    );

    let target = place.path().join("refused");
    let facts = bf16_demo().join("facts.json");
    for (more, part) in [
        (vec!["--calibrate-tokens", "4096"], "--calibrate"),
        (vec!["--calibrate", facts.to_str().unwrap()], "string `text`"),
        (vec!["--calibrate", "nothing.txt"], "nothing.txt"),
        (
            vec!["--calibrate", calibrate[1], "--calibrate-tokens", "0"],
            "tokens",
        ),
    ] {
        let refused = quantize(&target, &more).output().unwrap();
        assert!(error(&refused).contains(part), "{refused:?}");
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3);
}
