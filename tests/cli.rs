//! The `mmfp4` program as its users run it.

mod common;
#[allow(dead_code, reason = "each test file uses a part")]
#[path = "common/hub_server.rs"]
mod hub_server;

use common::draft::{Draft, tiny, write_json};
use common::gguf::{Gguf, f16, mxfp4 as as_mxfp4};
use common::{bf16_demo, mmfp4_demo, rewritten};
use hub_server::{Server, State};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const QUESTION: &str = "What does `Ordering::is_eq` do?";
const ANSWER: &str = "Returns true if the ordering is the Equal variant.";

/// The program, with nothing of the environment that would change what it does, and nothing to read.
fn mmfp4(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfp4"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let matters = [
            "ALPHAHENG_",
            "MMFP4_",
            "HF_",
            "HUGGING",
            "TRANSFORMERS_",
            "XDG_CACHE",
            "RUST_LOG",
            "RUST_BACKTRACE",
            "CLICOLOR",
        ];
        if matters.iter().any(|prefix| name.starts_with(prefix))
            || name.to_ascii_lowercase().ends_with("_proxy")
        {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stdout(output: &Output) -> &str {
    assert!(output.status.success(), "{output:?}");
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = run(&mut mmfp4(arguments));
    serde_json::from_str(stdout(&output)).unwrap()
}

fn piped(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = mmfp4(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// Runs what must fail; gives its one line.
fn failure(arguments: &[&str], code: i32) -> String {
    let output = run(&mut mmfp4(arguments));
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let line = stderr(&output).trim_end().to_string();
    assert!(line.starts_with("error: ") && !line.contains('\n'), "{line}");
    line
}

#[test]
fn the_embedded_model_is_the_folders() {
    let embedded = run(&mut mmfp4(&["generate", "-p", QUESTION]));
    assert_eq!(stdout(&embedded).trim_end(), ANSWER);
    let folder = mmfp4_demo();
    let given = run(&mut mmfp4(&[
        "generate",
        "-m",
        folder.to_str().unwrap(),
        "--prompt",
        QUESTION,
    ]));
    assert_eq!(stdout(&given), stdout(&embedded));
}

#[test]
fn results_go_to_stdout_and_all_else_to_stderr() {
    let output = run(&mut mmfp4(&["generate", "-p", QUESTION]));
    assert_eq!(stdout(&output), format!("{ANSWER}\n"));
    let lines: Vec<_> = stderr(&output).lines().collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("tokens/s") && lines[0].contains("peak memory"),
        "{lines:?}"
    );
    assert!(!stderr(&output).contains('\x1b'));
}

#[test]
fn a_prompt_may_be_piped_in() {
    for arguments in [&["generate", "-p", "-"][..], &["generate"]] {
        for ending in ["", "\n", "\r\n"] {
            let output = piped(arguments, format!("{QUESTION}{ending}").as_bytes());
            assert_eq!(stdout(&output).trim_end(), ANSWER, "{arguments:?} {ending:?}");
        }
    }
    // What is on the command line goes before what is piped in.
    let output = piped(&["generate", "-p", QUESTION], b"something else");
    assert_eq!(stdout(&output).trim_end(), ANSWER);
    // Nothing said at all: the program's own question.
    assert!(stdout(&run(&mut mmfp4(&["generate"]))).contains("option"));
    assert!(failure(&["generate", "-p", "-"], 2).contains("standard input is empty"));
    let output = piped(&["generate"], &[0xff, 0xfe]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not UTF-8"), "{output:?}");
}

#[test]
fn json_is_one_object_with_all_there_is() {
    let found = json(&["generate", "--json", "--logprobs", "3", "-p", QUESTION]);
    assert_eq!(found["text"], ANSWER);
    assert_eq!(found["content"], ANSWER);
    assert_eq!(found["reasoning"], "");
    assert_eq!(found["tool_calls"], Value::Array(Vec::new()));
    assert_eq!(found["reason"], "stop");
    let tokens = found["tokens"].as_array().unwrap();
    assert_eq!(found["statistics"]["generated_tokens"], tokens.len());
    let logprobs = found["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), tokens.len());
    for (entry, token) in logprobs.iter().zip(tokens) {
        // Greedy: the token is the most probable one.
        assert_eq!(entry["id"], *token);
        assert_eq!(entry["top"][0]["id"], *token);
        assert_eq!(entry["top"].as_array().unwrap().len(), 3);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
    let said: String = logprobs
        .iter()
        .map(|entry| entry["token"].as_str().unwrap())
        .collect();
    assert_eq!(said, ANSWER);
}

#[test]
fn thinking_is_told_from_the_answer() {
    let found = json(&[
        "generate",
        "--json",
        "--thinking",
        "--max-tokens",
        "20",
        "-p",
        QUESTION,
    ]);
    // The prompt ends with an open <think>: what comes before </think>, or all, is reasoning.
    let (text, reasoning) = (
        found["text"].as_str().unwrap(),
        found["reasoning"].as_str().unwrap(),
    );
    assert!(!reasoning.is_empty());
    assert_eq!(text.split("</think>").next().unwrap().trim(), reasoning);
}

#[test]
fn options_reach_the_generation() {
    let generate = |more: &[&str]| json(&[&["generate", "--json", "-p", QUESTION][..], more].concat());
    let plain = generate(&[]);
    assert_eq!(generate(&["--no-cache"])["tokens"], plain["tokens"]);

    let short = generate(&["--max-tokens", "3"]);
    assert_eq!(short["tokens"].as_array().unwrap().len(), 3);
    assert_eq!(short["reason"], "length");

    let stopped = generate(&["--stop", " the Eq"]);
    assert_eq!(stopped["text"], "Returns true if the ordering is");
    assert_eq!(stopped["reason"], "stop");

    let hot = ["--temperature", "3", "--max-tokens", "16", "--seed"];
    let seeded = |seed| generate(&[&hot[..], &[seed]].concat())["tokens"].clone();
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
    // However hot, of one token the first is chosen.
    for narrow in [["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]] {
        let found = generate(&[&hot[..], &["1"], &narrow].concat());
        let n = found["tokens"].as_array().unwrap().len();
        assert_eq!(
            found["tokens"].as_array().unwrap()[..n],
            plain["tokens"].as_array().unwrap()[..n]
        );
    }
    for penalty in [
        "--repetition-penalty",
        "--presence-penalty",
        "--frequency-penalty",
    ] {
        assert_ne!(generate(&[penalty, "50"])["tokens"], plain["tokens"], "{penalty}");
    }
    assert_ne!(
        generate(&["--system", "Answer in French."])["statistics"],
        plain["statistics"]
    );
    let raw = generate(&["--raw", "--max-tokens", "4"]);
    assert!(raw["statistics"]["prompt_tokens"].as_u64() < plain["statistics"]["prompt_tokens"].as_u64());
}

#[test]
fn a_floating_point_model_is_quantised_while_loading() {
    let folder = bf16_demo();
    let folder = folder.to_str().unwrap();
    let output = run(&mut mmfp4(&[
        "generate",
        "-v",
        "-m",
        folder,
        "--quantize",
        "nvfp4",
        "-p",
        QUESTION,
    ]));
    assert_eq!(stdout(&output).trim_end(), ANSWER);
    assert!(stderr(&output).contains("quantised while loading"), "{output:?}");
    let output = run(&mut mmfp4(&["generate", "--quantize", "nvfp4", "-p", QUESTION]));
    assert!(stderr(&output).contains("4-bit already"), "{output:?}");
}

#[test]
fn layers_and_patterns_stay_in_floating_point() {
    let folder = bf16_demo();
    let load = [
        "generate",
        "-m",
        folder.to_str().unwrap(),
        "--quantize",
        "mmfp4",
        "--max-tokens",
        "1",
    ];
    let told = |more: &[&str]| {
        let output = run(&mut mmfp4(&[&load[..], more].concat()));
        stdout(&output);
        stderr(&output).to_string()
    };
    assert_eq!(told(&[]).lines().count(), 1);
    let told = told(&[
        "--skip-layers",
        "-1,0",
        "--keep",
        "o_proj",
        "--keep",
        "no_such_layer",
    ]);
    for expected in [
        "layer 5 is one of",
        "layer 0 is one of",
        "names it: o_proj",
        "`no_such_layer` in keep matches no",
    ] {
        assert!(told.contains(expected), "{told}");
    }
    let mut command = mmfp4(&load);
    let output = run(command.args(["--skip-layers", "6"]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn memory_is_logged() {
    let output = run(&mut mmfp4(&["generate", "-p", QUESTION, "--log-memory"]));
    assert_eq!(stdout(&output).trim_end(), ANSWER);
    for tag in ["start ", "model loaded ", "prompt computed ", "finished "] {
        assert!(
            stderr(&output).lines().any(|line| line.starts_with(tag)),
            "{output:?}"
        );
    }
}

/// The demo model with NaN in one norm's weight.
fn broken_model(folder: &Path) {
    const NORM: &str = "model.layers.2.post_attention_layernorm.weight";
    let mut found = false;
    for entry in std::fs::read_dir(mmfp4_demo()).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if path.extension().unwrap() == "safetensors" {
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let fields: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
            if let Some(start) = fields[NORM]["data_offsets"][0].as_u64() {
                assert_eq!(fields[NORM]["dtype"], "BF16");
                bytes[header + start as usize..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
                found = true;
            }
        }
        std::fs::write(folder.join(path.file_name().unwrap()), bytes).unwrap();
    }
    assert!(found);
}

#[test]
fn check_nan_names_the_layer_and_the_op() {
    let folder = tempfile::tempdir().unwrap();
    broken_model(folder.path());
    let model = folder.path().to_str().unwrap();
    let line = failure(&["generate", "-m", model], 1);
    assert!(
        line.starts_with("error: logits: expected finite numbers"),
        "{line}"
    );
    let line = failure(&["generate", "-m", model, "--check-nan"], 1);
    assert!(line.contains("layer 2, post_attention_layernorm"), "{line}");
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "some words of a text").unwrap();
    let line = failure(&["perplexity", file.to_str().unwrap(), "-m", model], 1);
    assert!(line.contains("found NaN"), "{line}");
    // A sound model says what it always says.
    let output = run(&mut mmfp4(&["generate", "--check-nan", "-p", QUESTION]));
    assert_eq!(stdout(&output).trim_end(), ANSWER);
}

#[test]
fn validate_puts_the_worst_first() {
    let folder = bf16_demo();
    let folder = folder.to_str().unwrap();
    let errors = |more: &[&str]| -> Vec<(String, f64)> {
        let found = json(&[&["validate", "--json", folder], more].concat());
        let tensors = found["tensors"].as_array().unwrap().iter();
        tensors
            .map(|t| {
                (
                    t["name"].as_str().unwrap().to_string(),
                    t["relative_rmse"].as_f64().unwrap(),
                )
            })
            .collect()
    };
    let stored = errors(&[mmfp4_demo().to_str().unwrap()]);
    assert_eq!(stored.len(), 168);
    assert!(stored.is_sorted_by(|a, b| a.1 >= b.1));
    // The folder was written with the quantiser that is simulated, and is the one in the program.
    assert_eq!(errors(&["mmfp4"]), stored);
    assert_eq!(errors(&[]), stored);
    let worst = |errors: &[(String, f64)]| errors[0].1;
    assert!(worst(&errors(&["nvfp4"])) < worst(&stored) && worst(&stored) < worst(&errors(&["mxfp4"])));

    let output = run(&mut mmfp4(&["validate", folder, "--top", "3"]));
    let lines: Vec<_> = stdout(&output).lines().collect();
    assert_eq!(lines.len(), 6, "{lines:?}");
    assert!(lines[1].starts_with(&stored[0].0), "{lines:?}");
    assert!(lines[5].starts_with("168 tensors: "), "{lines:?}");

    let packed = mmfp4_demo();
    let packed = packed.to_str().unwrap();
    assert!(failure(&["validate", packed, "nvfp4"], 1).contains("floating-point original"));
    assert!(failure(&["validate", folder, folder], 1).contains("a format to simulate"));
    assert!(failure(&["validate", folder, "./nowhere"], 1).contains("does not exist"));
}

#[test]
fn mistakes_are_one_line_with_a_remedy() {
    let line = failure(&["generate", "-m", "./no/such/folder"], 1);
    assert!(line.contains("check the path"), "{line}");
    let folder = tempfile::tempdir().unwrap();
    let line = failure(&["generate", "-m", folder.path().to_str().unwrap()], 1);
    assert!(
        line.contains("config.json") && line.contains("the model needs its"),
        "{line}"
    );
    let line = failure(&["generate", "--temperature=-1"], 2);
    assert!(line.contains("temperature"), "{line}");
    let line = failure(&["perplexity", "no/such/file"], 1);
    assert!(line.contains("no/such/file"), "{line}");
    let line = failure(&["generate", "--raw", "-p", ""], 1);
    assert!(line.contains("the prompt is empty"), "{line}");
    #[cfg(not(target_os = "macos"))]
    assert!(failure(&["generate", "--device", "metal"], 1).contains("use --device cpu"));
    #[cfg(all(target_os = "linux", target_arch = "x86_64", not(feature = "msl-host")))]
    {
        let line = failure(&["generate", "--device", "msl-host"], 1);
        assert!(line.contains("--features cli,msl-host"), "{line}");
    }
    // What clap sees, it says in its own words.
    for wrong in [
        &["generate", "--no-such-flag"][..],
        &["generate", "--max-tokens", "many"],
        &["generate", "--quantize", "int4"],
        &["generate", "--raw", "--system", "x"],
        &["generate", "--logprobs", "1"],
        &["generate", "--no-fused-moe", "--use-fused-moe"],
        &["bench", "--no-fused-moe", "--use-fused-moe"],
        &["bench", "--synthetic", "glm"],
        &["bench", "--synthetic", "slice", "-m", "model"],
        &["bench", "--synthetic-dir", "folder"],
        &["bench", "--json", "--csv"],
        &["bench", "--profile", "--csv"],
        &["bench", "-r", "0"],
        &["doctor", "--context", "many"],
        &["doctor", "--kv-cache", "int8"],
        &["generate", "--kv-cache", "fp16"],
        &["generate", "--kv-cache", "bf16,fp8"],
        &["generate", "--kv-memory", "2GB"],
        &["generate", "--kv-memory", "-1"],
        &["generate", "--kv-memory", "1G", "--context", "5"],
        &["generate", "--kv-memory", "1G", "--kv-cache", "contiguous"],
        &["perplexity", "text", "--kv-cache", ""],
        &["bench", "--kv-cache", "bf16,int8"],
        &["bench", "--kv-memory", "1G", "--kv-cache", "contiguous"],
        &["doctor", "--device", "gpu"],
        &["perplexity"],
        &["no-such-command"],
        &[],
    ] {
        let output = run(&mut mmfp4(wrong));
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty(), "{wrong:?}");
    }
    let mut command = mmfp4(&["generate"]);
    let output = run(command.env("RUST_LOG", "x=y=z"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("RUST_LOG=mmfp4=debug"), "{output:?}");
}

#[test]
fn the_cache_is_what_was_asked_for() {
    for kind in ["f16", "bf16", "fp8", "fp4", "fp4-32-rotated", "contiguous"] {
        let output = run(&mut mmfp4(&["generate", "-p", QUESTION, "--kv-cache", kind]));
        assert_eq!(stdout(&output).trim_end(), ANSWER, "{kind}");
    }
    // 1,920 bytes a token in BF16, 16 tokens a block.
    let long = QUESTION.repeat(3);
    for (size, told) in [
        ("30719", "a block at least: 16 tokens, 30720 bytes"),
        ("30K", "of 16 tokens are needed, 1 of the cache's 1 are free"),
    ] {
        let line = failure(&["generate", "-p", &long, "--kv-memory", size], 1);
        assert!(line.contains(told), "{line}");
    }
    let output = run(&mut mmfp4(&["generate", "-p", QUESTION, "--kv-memory", "0.25M"]));
    assert_eq!(stdout(&output).trim_end(), ANSWER);
    let output = run(&mut mmfp4(&["generate", "-p", QUESTION, "--context", "64"]));
    assert_eq!(stdout(&output).trim_end(), ANSWER);
    #[cfg(target_os = "linux")]
    for command in [&["generate"][..], &["perplexity", "Cargo.toml"]] {
        let line = failure(&[command, &["--kv-memory", "4096T"]].concat(), 1);
        assert!(line.contains("the memory that is available"), "{line}");
    }
}

#[test]
fn verbose_tells_layers_then_ops() {
    let told = |flags: &[&str]| {
        let output = run(&mut mmfp4(&[&["generate", "--max-tokens", "1"], flags].concat()));
        stdout(&output);
        stderr(&output).to_string()
    };
    assert!(!told(&[]).contains("layer"));
    let layers = told(&["-v"]);
    for index in ["0", "5", "head"] {
        assert!(
            layers.contains(&format!("layer{{index={index} resident=")),
            "{layers}"
        );
    }
    assert!(!layers.contains("q_a_proj"));
    let ops = told(&["-vv"]);
    assert!(
        ops.contains("layer{index=1}:op{name=\"mlp.experts\" shape=[") && ops.contains("time.busy="),
        "{ops}"
    );
    let mut command = mmfp4(&["generate", "--max-tokens", "1"]);
    let by_variable = run(command.env("RUST_LOG", "mmfp4=debug"));
    assert!(stderr(&by_variable).contains("q_a_proj"));
}

#[test]
fn no_escape_codes_without_a_terminal_or_with_no_color() {
    for (arguments, color) in [
        (&["generate", "-vv", "--max-tokens", "1"][..], None),
        (&["generate", "-vv", "--max-tokens", "1"], Some(("NO_COLOR", "1"))),
        (&["--help"], Some(("NO_COLOR", "1"))),
        (&["generate", "--wrong"], Some(("NO_COLOR", "1"))),
    ] {
        let mut command = mmfp4(arguments);
        command.envs(color);
        let output = run(&mut command);
        assert!(
            !output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b),
            "{arguments:?}"
        );
    }
}

#[test]
fn help_shows_examples_and_formats() {
    for (arguments, shown) in [
        (&["--help"][..], &["Examples:", "mxfp4", "The one to choose"][..]),
        (
            &["generate", "--help"],
            &["Examples:", "--top-p", "The one to choose"],
        ),
        (&["help", "perplexity"], &["Examples:", "--stride", "mean loss"]),
        (&["bench", "--help"], &["Examples:", "--synthetic", "noisy"]),
        (&["doctor", "--help"], &["Examples:", "--context", "ends with 1"]),
        (&["--version"], &[env!("CARGO_PKG_VERSION")]),
    ] {
        let output = run(&mut mmfp4(arguments));
        for text in shown {
            assert!(stdout(&output).contains(text), "{arguments:?} {text}");
        }
    }
    // Lines are wrapped once, by clap.
    for (command, start) in [("bench", "Each test runs"), ("doctor", "Each line is")] {
        let text = stdout(&run(&mut mmfp4(&["help", command]))).to_string();
        let paragraph = text.lines().skip_while(|line| !line.starts_with(start));
        let lines: Vec<_> = paragraph.take_while(|line| !line.is_empty()).collect();
        let (_, full) = lines.split_last().unwrap();
        assert!(full.iter().all(|line| line.len() > 80), "{lines:#?}");
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("auto, cpu, metal"), "{text}");
        assert_eq!(words.contains("msl-host"), cfg!(feature = "msl-host"), "{text}");
    }
}

#[test]
fn the_doctor_fetches_no_weights() {
    let server = demo_server();
    let home = tempfile::tempdir().unwrap();
    let mut command = mmfp4(&["doctor", "--device", "cpu", "-m", "org/demo"]);
    let output = run(command
        // Nothing is computed: only what is said of memory counts here.
        .env("MMFP4_CPU", "z80")
        .env("HF_HOME", home.path())
        .env("HF_ENDPOINT", &server.address));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert!(text.contains("org/demo: 10 MB of weights"), "{output:?}");
    assert!(!server.state().requests.is_empty());
    for file in [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ] {
        assert!(server.downloads(file).is_empty(), "{file}");
    }
}

#[test]
fn a_repository_is_inspected_by_the_headers_of_its_files() {
    let files = common::contents(&mmfp4_demo());
    let weights = files.iter().filter(|(name, _)| name.ends_with(".safetensors"));
    // The connection breaks where a header ends, to which 32 KiB are enough.
    let ends = weights.map(|(name, _)| (name.clone(), [32 << 10].into()));
    let server = Server::start(State {
        repo: "org/demo".into(),
        commit: "0123456789abcdef0123456789abcdef01234567".into(),
        revisions: ["main".to_string()].into(),
        cuts: ends.collect(),
        files,
        ..State::default()
    });
    let home = tempfile::tempdir().unwrap();
    let output = run(mmfp4(&["inspect", "org/demo", "--json"])
        .env("HF_HOME", home.path())
        .env("HF_ENDPOINT", &server.address));
    let found: Value = serde_json::from_str(stdout(&output)).unwrap();
    let mut here = json(&["inspect", "--json"]);
    for part in ["load", "layouts", "dtypes", "problems"] {
        assert_eq!(found[part], here[part], "{part}");
    }
    let state = server.state();
    let of_weights = (state.sent.iter()).filter(|(name, _)| name.ends_with(".safetensors"));
    assert_eq!(of_weights.map(|(_, sent)| sent).sum::<usize>(), 2 * (32 << 10));
    drop(state);

    // A model that is in the cache is not asked for.
    let command = |name: &str| {
        let mut command = mmfp4(&[name, "org/demo", "--json"]);
        command
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.address);
        command
    };
    server.state().cuts.clear();
    let mut fetch = mmfp4(&["generate", "-m", "org/demo", "-p", QUESTION]);
    assert!(
        run(fetch
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.address))
        .status
        .success()
    );
    server.state().requests.clear();
    let found: Value = serde_json::from_str(stdout(&run(&mut command("inspect")))).unwrap();
    assert!(found["load"] == here["load"].take() && server.state().requests.is_empty());
}

#[test]
fn inspect_tells_what_a_model_is_and_what_is_wrong_with_it() {
    let output = run(&mut mmfp4(&["inspect", "--context", "1000"]));
    for part in [
        "layout marlin (Marlin MMFP4), told by words of codes beside 16-bit scales",
        "experts                MMFP4                  marlin",
        "at load: 19.6 kB for 30 weights: norms and biases",
        "a decoded token reads 4.8 MB of weights",
        "+ cache 1.9 MB (bf16 for 1000 tokens of 1920 bytes)",
    ] {
        assert!(stdout(&output).contains(part), "{output:?} should hold {part:?}");
    }
    let report = json(&[
        "inspect",
        bf16_demo().to_str().unwrap(),
        "--quantize",
        "nvfp4",
        "--json",
    ]);
    let quantized = &report["load"]["own"][0];
    assert_eq!(
        (&quantized["reason"], &quantized["weights"]),
        (&"quantized".into(), &168.into())
    );

    // Whatever loads refuses a layout that the model is not in; what is no layout is a mistake on the command line.
    for command in [
        &["generate", "--layout", "modelopt-nvfp4"][..],
        &["inspect", "--layout", "modelopt-nvfp4"],
    ] {
        let output = run(&mut mmfp4(command));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.contains("it is in marlin (") && text.contains("--layout says modelopt-nvfp4"),
            "{text}"
        );
    }
    let output = run(&mut mmfp4(&["inspect", "--layout", "awq"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("mlx-nvfp4"), "{output:?}");
}

/// What its JSON says under `supplied` and `dangling`.
#[test]
fn inspect_tells_what_the_base_supplies_and_what_is_in_no_file() {
    let mut draft = Draft::plain();
    let lacking = ["model.norm.weight", "model.layers.1.mlp.gate.weight"];
    for name in lacking {
        draft.tensors.remove(name).unwrap();
    }
    let folder = draft.write_split(|name| match name.contains("layers.1.") {
        true => "a.safetensors",
        false => "b.safetensors",
    });
    let index = "model.safetensors.index.json";
    let text = std::fs::read(folder.path().join(index)).unwrap();
    let mut entries: Value = serde_json::from_slice(&text).unwrap();
    // The model has layers 0 to 2.
    for number in 0..6 {
        entries["weight_map"][format!("model.layers.3.extra.{number}")] = "c.safetensors".into();
    }
    write_json(folder.path(), index, &entries);
    let base = tiny();
    let output = run(&mut mmfp4(&[
        "inspect",
        folder.path().to_str().unwrap(),
        "--base",
        base.to_str().unwrap(),
    ]));
    let file = base.join("model.safetensors");
    let [norm, gate] = lacking;
    let dangling: String = (0..5)
        .map(|number| format!("model.layers.3.extra.{number}, "))
        .collect();
    for line in [
        format!(
            "from the base: 2 tensors that the checkpoint lacks, of {} ({gate}, {norm})",
            file.display()
        ),
        format!(
            "in no file: 6 tensors that the index lists of layers that the model does not have, ignored ({dangling}…)"
        ),
    ] {
        let count = stdout(&output).lines().filter(|told| *told == line).count();
        assert_eq!(count, 1, "{line:?} in {output:?}");
    }
    // Where nothing is supplied and nothing dangles, there are no such lines.
    let output = run(&mut mmfp4(&["inspect", base.to_str().unwrap()]));
    for part in ["from the base", "in no file"] {
        assert!(!stdout(&output).contains(part), "{output:?}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = mmfp4(&["generate", "-p", QUESTION])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

fn perplexity(folder: &Path, name: &str, contents: &str, more: &[&str]) -> Value {
    let file = folder.join(name);
    std::fs::write(&file, contents).unwrap();
    json(&[&["perplexity", "--json", file.to_str().unwrap()], more].concat())
}

#[test]
fn perplexity_of_texts_and_lists() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (a, b) = (
        "A vector is a contiguous growable array type, written as Vec and pronounced vector.",
        "[An iterator] yields the elements of a collection one after the other.",
    );
    let alone: Vec<Value> = [a, b]
        .iter()
        .map(|text| perplexity(folder, "one.txt", text, &[]))
        .collect();
    for (name, list) in [
        ("strings.json", serde_json::json!([a, b])),
        (
            "objects.json",
            serde_json::json!([{ "text": a, "source": "x" }, { "text": b }]),
        ),
        ("mixed", serde_json::json!([a, { "text": b }])),
    ] {
        let found = perplexity(folder, name, &list.to_string(), &[]);
        assert_eq!(found["documents"], 2);
        assert_eq!(found["windows"], 2);
        let of = |value: &Value, field: &str| value[field].as_f64().unwrap();
        let tokens: f64 = alone.iter().map(|one| of(one, "tokens")).sum();
        assert_eq!(of(&found, "tokens"), tokens);
        let loss: f64 = alone
            .iter()
            .map(|one| of(one, "mean_loss") * of(one, "tokens"))
            .sum();
        assert!(
            (of(&found, "perplexity").ln() - loss / tokens).abs() < 1e-6,
            "{name}"
        );
    }
    // More context, a better prediction: and each token counts once.
    let tokens = alone[0]["tokens"].as_u64().unwrap() + 1;
    let overlapping = perplexity(folder, "one.txt", a, &["--window", "6", "--stride", "2"]);
    assert_eq!(overlapping["tokens"], tokens - 1);
    let disjoint = perplexity(folder, "one.txt", a, &["--window", "6"]);
    assert_eq!(
        disjoint["windows"],
        tokens.div_ceil(6) - u64::from(tokens % 6 == 1)
    );
    assert!(overlapping["perplexity"].as_f64() < disjoint["perplexity"].as_f64());
    assert_ne!(overlapping["perplexity"], alone[0]["perplexity"]);

    let file = folder.join("one.txt");
    let output = run(&mut mmfp4(&["perplexity", file.to_str().unwrap()]));
    let value = alone[0]["perplexity"].as_f64().unwrap();
    assert!(
        stdout(&output).starts_with(&format!("perplexity {value:.4} (")),
        "{output:?}"
    );
    let output = piped(&["perplexity", "-"], a.as_bytes());
    assert!(
        stdout(&output).starts_with(&format!("perplexity {value:.4} (")),
        "{output:?}"
    );

    let bad = folder.join("bad.json");
    for (contents, named) in [
        ("{\"text\": 1}", "not a JSON list"),
        ("[\"a\", 1]", "item 1"),
        ("[]", "two tokens"),
    ] {
        std::fs::write(&bad, contents).unwrap();
        let code = if contents == "[]" { 1 } else { 2 };
        let line = failure(&["perplexity", bad.to_str().unwrap()], code);
        assert!(line.contains(named), "{line}");
    }
    let line = failure(&["perplexity", file.to_str().unwrap(), "--window", "1"], 1);
    assert!(line.contains("window"), "{line}");
}

#[test]
fn a_base_supplies_what_a_model_lacks() {
    const NORM: &str = "model.norm.weight";
    let model = rewritten(&mmfp4_demo(), |name, _| (name == NORM).then(Vec::new));
    let folder = model.path().to_str().unwrap();
    let line = failure(&["generate", "-m", folder, "-p", QUESTION], 1);
    assert!(
        line.contains(&format!("`{NORM}`")) && line.contains("--base"),
        "{line}"
    );

    let original = mmfp4_demo();
    let told = |output: &Output| stderr(output).contains("1 missing tensors taken from ");
    let arguments = ["generate", "-m", folder, "-p", QUESTION, "--base"];
    let output = run(&mut mmfp4(
        &[&arguments[..], &[original.to_str().unwrap()]].concat(),
    ));
    assert_eq!(stdout(&output), format!("{ANSWER}\n"));
    assert!(told(&output), "{output:?}");

    // Of a repository only the file that holds it comes.
    let server = demo_server();
    let home = tempfile::tempdir().unwrap();
    let with_hub = |arguments: &[&str]| {
        let mut command = mmfp4(arguments);
        run(command
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.address))
    };
    let output = with_hub(&[&arguments[..], &["org/demo"]].concat());
    assert_eq!(stdout(&output), format!("{ANSWER}\n"));
    assert!(told(&output), "{output:?}");
    let index: Value = serde_json::from_slice(&server.state().files["model.safetensors.index.json"]).unwrap();
    for file in [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ] {
        let holds = index["weight_map"][NORM] == file;
        assert_eq!(!server.downloads(file).is_empty(), holds, "{file}");
    }
    assert!(server.downloads("tokenizer.json").is_empty());
    let measured = with_hub(&[
        "bench", "-m", folder, "--base", "org/demo", "-p", "0", "-n", "1", "-r", "1", "--json",
    ]);
    let rows: Value = serde_json::from_str(stdout(&measured)).unwrap();
    assert!(generated(&rows, 1), "{rows}");

    // A whole model needs none.
    let output = with_hub(&["generate", "-p", QUESTION, "--base", "org/none"]);
    assert!(stderr(&output).contains("--base has no effect"), "{output:?}");
}

#[test]
fn a_gguf_file_comes_from_the_hub_by_its_quantisation() {
    let files = [
        ("tiny-MXFP4.gguf", Gguf::tiny(false, as_mxfp4).bytes()),
        ("tiny-F16.gguf", Gguf::tiny(false, f16).bytes()),
    ];
    let server = Server::start(State {
        repo: "org/tiny".into(),
        commit: "0123456789abcdef0123456789abcdef01234567".into(),
        revisions: ["main".to_string()].into(),
        files: files.map(|(name, bytes)| (name.to_string(), bytes)).into(),
        ..State::default()
    });
    let home = tempfile::tempdir().unwrap();
    let with_hub = |command: &str, model: &str, more: &[&str]| {
        let mut command = mmfp4(&[&[command, "-m", model], more].concat());
        run(command
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.address))
    };
    let bench = ["-p", "0", "-n", "1", "-r", "1", "--json"];
    let output = with_hub("bench", "org/tiny", &bench);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("name one as `org/tiny:F16`; it has F16, MXFP4"),
        "{output:?}"
    );
    // Before it is here nothing tells its dimensions.
    let output = with_hub("doctor", "org/tiny:mxfp4", &["--device", "cpu"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("fetch it first"), "{output:?}");
    let output = with_hub("bench", "org/tiny:mxfp4", &bench);
    let rows: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert!(generated(&rows, 1), "{rows}");
    assert!(server.downloads("tiny-F16.gguf").is_empty());
}

/// Whether a benchmark measured the generation of so many tokens.
fn generated(rows: &Value, tokens: u64) -> bool {
    let mut rows = rows.as_array().unwrap().iter();
    rows.any(|row| row["test"] == "tg" && row["generated_tokens"] == tokens)
}

/// A hub with the demo model as `org/demo`.
fn demo_server() -> Server {
    let files = std::fs::read_dir(mmfp4_demo()).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        (name, std::fs::read(path).unwrap())
    });
    Server::start(State {
        repo: "org/demo".into(),
        commit: "0123456789abcdef0123456789abcdef01234567".into(),
        revisions: ["main".to_string()].into(),
        files: files.collect(),
        ..State::default()
    })
}

#[test]
fn a_model_comes_from_the_hub_by_its_name() {
    let server = demo_server();
    let home = tempfile::tempdir().unwrap();
    let command = |more: &[&str]| {
        let mut command = mmfp4(&[&["generate", "-m", "org/demo", "-p", QUESTION], more].concat());
        command
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.address);
        command
    };
    let first = run(&mut command(&[]));
    assert_eq!(stdout(&first), format!("{ANSWER}\n"));
    assert!(stderr(&first).contains("fetching 9.8"), "{first:?}");
    // No terminal, no bar.
    assert!(
        !stderr(&first).contains('\r') && !stderr(&first).contains('\x1b'),
        "{first:?}"
    );

    let requests = || std::mem::take(&mut server.state().requests).len();
    assert!(requests() > 0);
    assert_eq!(stdout(&run(&mut command(&[]))), stdout(&first));
    assert_eq!(requests(), 0);
    assert_eq!(stdout(&run(&mut command(&["--refresh"]))), stdout(&first));
    assert!(requests() > 0);

    let output = run(command(&[])
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", home.path().join("empty")));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("unset HF_HUB_OFFLINE"), "{output:?}");
    let mut missing = mmfp4(&["generate", "-m", "org/missing", "-p", QUESTION]);
    let output = run(missing
        .env("HF_HOME", home.path())
        .env("HF_ENDPOINT", &server.address));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("error: org/missing: "), "{output:?}");
    assert_eq!(stderr(&output).trim_end().lines().count(), 1, "{output:?}");
}

#[test]
fn a_head_in_eight_bits_answers_and_is_told_of() {
    let output = run(&mut mmfp4(&["generate", "--int8-head", "-v", "-p", QUESTION]));
    assert!(stdout(&output).contains(ANSWER), "{output:?}");
    assert!(
        stderr(&output).contains("output head rounded to 8 bits"),
        "{output:?}"
    );
    let rows = |more: &[&str]| {
        let all = json(&[&["bench", "--json", "-p", "0", "-n", "2", "-r", "1"][..], more].concat());
        let last = all.as_array().unwrap().last().unwrap().clone();
        (
            last["int8_head"].clone(),
            last["bytes_per_token"].as_u64().unwrap(),
        )
    };
    let ((no, plain), (yes, rounded)) = (rows(&[]), rows(&["--int8-head"]));
    assert_eq!((no, yes), (false.into(), true.into()));
    // 4,096 rows of 256 numbers: in BF16, and in two blocks of 132 bytes.
    assert_eq!(plain - rounded, 4096 * (512 - 264));
}

#[test]
fn experts_one_by_one_say_the_same() {
    let fused = run(&mut mmfp4(&["generate", "--use-fused-moe", "-p", QUESTION]));
    let separate = run(&mut mmfp4(&["generate", "--no-fused-moe", "-p", QUESTION]));
    assert_eq!(stdout(&fused).trim_end(), ANSWER);
    assert_eq!(stdout(&separate), stdout(&fused));
}

/// A row's test, prompt tokens, generated tokens and depth.
fn kind(row: &Value) -> (&str, u64, u64, u64) {
    let number = |field: &str| row[field].as_u64().unwrap();
    let tokens = (number("prompt_tokens"), number("generated_tokens"));
    (row["test"].as_str().unwrap(), tokens.0, tokens.1, number("depth"))
}

#[test]
fn bench_measures_each_test() {
    let sizes = ["-p", "8,600", "-n", "4", "-d", "0,5", "-r", "3"];
    let output = run(&mut mmfp4(&[&["bench", "--json"][..], &sizes].concat()));
    let rows: Vec<Value> = serde_json::from_str(stdout(&output)).unwrap();
    let expected = [
        ("load", 0, 0, 0),
        ("first_prompt", 1, 0, 0),
        ("first_decode", 0, 1, 0),
        ("later_prompt", 1, 0, 0),
        ("later_decode", 0, 1, 0),
        ("pp", 8, 0, 0),
        ("pp", 600, 0, 0),
        ("pp", 8, 0, 5),
        ("pp", 600, 0, 5),
        ("tg", 0, 4, 0),
        ("tg", 0, 4, 5),
    ];
    assert_eq!(rows.iter().map(kind).collect::<Vec<_>>(), expected);
    let number = |row: &Value, field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"));
    for row in &rows {
        assert_eq!(
            (row["model"].as_str(), row["fused_moe"].as_bool()),
            (Some("demo model"), Some(true))
        );
        assert!(number(row, "latency_ms") > 0.0 && number(row, "threads") >= 1.0);
        let tokens = number(row, "prompt_tokens") + number(row, "generated_tokens");
        if cfg!(target_os = "linux") {
            let peak = number(row, "peak_memory_bytes");
            assert!(peak >= number(row, "private_memory_bytes") && peak > 1e6, "{row}");
        }
        let bandwidth = number(row, "read_bandwidth_gb_s");
        assert!(bandwidth > 0.0);
        assert_eq!(row["noisy"], number(row, "bandwidth_spread") > 0.15);
        if row["test"] == "load" {
            let of_tokens = ["tokens_per_s", "bytes_per_token", "share_of_bandwidth"];
            assert_eq!(of_tokens.map(|field| number(row, field)), [0.0; 3]);
            continue;
        }
        let (rate, median) = (number(row, "tokens_per_s"), number(row, "latency_ms"));
        assert!((rate * median / 1e3 / tokens - 1.0).abs() < 1e-9, "{row}");
        let share = rate * number(row, "bytes_per_token") / 1e9 / bandwidth;
        assert!(
            (number(row, "share_of_bandwidth") / share - 1.0).abs() < 1e-9,
            "{row}"
        );
        let samples = row["samples_ms"].as_array().unwrap();
        let mut times: Vec<_> = samples.iter().map(|time| time.as_f64().unwrap()).collect();
        times.sort_by(f64::total_cmp);
        let first = row["test"].as_str().unwrap().starts_with("first");
        assert_eq!(times.len(), if first { 1 } else { 3 }, "{row}");
        assert_eq!(number(row, "repetitions"), times.len() as f64);
        assert_eq!(median, times[times.len() / 2]);
        let spread = (times[times.len() - 1] - times[0]) / median;
        assert!((number(row, "spread") - spread).abs() < 1e-9);
        // Six layers of 160 numbers a token, in BF16.
        let held = number(row, "depth") + tokens;
        if ["pp", "tg"].contains(&row["test"].as_str().unwrap()) {
            assert_eq!(number(row, "cache_bytes"), held * 6.0 * 160.0 * 2.0);
        }
    }
    let decode = number(&rows[9], "bytes_per_token");
    // All weights of the demo model are read once in 8 tokens, and more often in the two chunks of 600.
    assert!(decode > 4e6 && number(&rows[5], "bytes_per_token") < decode / 2.0);
    assert!(number(&rows[6], "bytes_per_token") < decode / 100.0);
    for text in [
        "pp 600 at depth 5, cache bf16 (5 of 6)",
        "tg 4 at depth 0, 5, cache bf16 (6 of 6)",
        "demo model",
        "tg 4 at 5",
        "tokens/s",
    ] {
        assert!(stderr(&output).contains(text), "{text}: {}", stderr(&output));
    }
}

#[test]
fn bench_tells_generation_by_depth() {
    let sizes = ["-p", "0", "-n", "4", "-d", "40,0,17", "-r", "1"];
    let more = ["--json", "--kv-cache", "fp8,contiguous"];
    let output = run(&mut mmfp4(&[&["bench"][..], &sizes, &more].concat()));
    let rows: Vec<Value> = serde_json::from_str(stdout(&output)).unwrap();
    let rows: Vec<_> = rows.iter().filter(|row| row["test"] == "tg").collect();
    let of = rows
        .iter()
        .map(|row| (row["kv_cache"].as_str().unwrap(), row["depth"].as_u64().unwrap()));
    let depths = |cache| [0, 17, 40].map(|depth| (cache, depth));
    assert_eq!(
        of.collect::<Vec<_>>(),
        [depths("fp8"), depths("contiguous")].concat()
    );
    for (cache, rows) in [("fp8", &rows[..3]), ("contiguous", &rows[3..])] {
        // Of the demo model: 128 codes, a scale and 32 BF16s; 160 F32s.
        let of_token = if cache == "fp8" { 208.0 } else { 640.0 } * 6.0;
        for row in rows {
            let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"));
            let (ms, depth, first) = (number("latency_ms"), number("depth"), &rows[0]["latency_ms"]);
            assert_eq!(number("cache_bytes"), (depth + 4.0) * of_token);
            let first = first.as_f64().unwrap();
            assert!((number("of_depth_0") * ms / first - 1.0).abs() < 1e-9, "{row}");
            // Six layers, four heads, sums of 128 and scores of 160.
            let operations = 6.0 * 4.0 * 2.0 * 288.0;
            let seconds =
                (of_token / number("read_bandwidth_gb_s")).max(operations / number("float_peak_gop_s")) / 1e9;
            let bound = first + 4.0 * depth * seconds * 1e3;
            assert!((number("bound_ms") / bound - 1.0).abs() < 1e-9, "{row}");
            assert!((number("of_bound") * bound / ms - 1.0).abs() < 1e-9, "{row}");
        }
    }
    let text = stderr(&output);
    assert!(text.contains("÷ bound") && text.contains("of depth 0"), "{text}");
    // Without depth 0 there is nothing to compare with.
    let output = run(&mut mmfp4(&["bench", "-p", "0", "-n", "1", "-d", "3", "-r", "1"]));
    assert!(
        output.status.success() && !stderr(&output).contains("of depth 0"),
        "{output:?}"
    );
}

#[test]
fn bench_writes_csv_and_a_table() {
    let sizes = ["-p", "0", "-n", "3", "-r", "1", "--no-fused-moe"];
    let output = run(&mut mmfp4(&[&["bench", "--csv"][..], &sizes].concat()));
    let lines: Vec<_> = stdout(&output).lines().collect();
    let head: Vec<_> = lines[0].split(',').collect();
    assert_eq!((lines.len(), head[0]), (7, "test"));
    let column = |name: &str| head.iter().position(|column| *column == name).unwrap();
    let last: Vec<_> = lines[6].split(',').collect();
    assert_eq!(last.len(), head.len());
    assert_eq!((last[0], last[column("generated_tokens")]), ("tg", "3"));
    assert_eq!(last[column("fused_moe")], "false");
    assert!(stderr(&output).contains("experts one by one"));
    // Without either the table is all there is.
    let output = run(&mut mmfp4(&[&["bench"][..], &sizes].concat()));
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("tg 3"));
}

#[test]
fn bench_in_task_mode_loads_nothing() {
    for (more, expected) in [(&["--json"][..], "[]\n"), (&[], "")] {
        let arguments = [&["bench", "-m", "./no-such-model"][..], more].concat();
        let output = run(mmfp4(&arguments).env("ALPHAHENG_TASK_MODE", "1"));
        assert_eq!(stdout(&output), expected);
        assert!(stderr(&output).contains("skipped"), "{output:?}");
        let output = run(mmfp4(&arguments).env("ALPHAHENG_TASK_MODE", "0"));
        assert_eq!(output.status.code(), Some(1));
    }
}

#[test]
fn bench_refuses_what_cannot_run() {
    let line = failure(&["bench", "-p", "2000", "-d", "49"], 2);
    assert!(
        line.contains("2049 tokens do not fit the model's context of 2048"),
        "{line}"
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let line = failure(&["bench", "--synthetic", "slice", "--synthetic-dir", path], 1);
    assert!(line.contains("expected the synthetic checkpoint slice"), "{line}");
    assert!(failure(&["bench", "-m", path], 1).contains("config.json"));
}

#[test]
#[cfg(target_os = "linux")]
fn bench_refuses_what_does_not_fit_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(mmfp4_demo()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.path().join("config.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["max_position_embeddings"] = 1_000_000_000_000u64.into();
    std::fs::write(&config, fields.to_string()).unwrap();
    let model = folder.path().to_str().unwrap();
    let line = failure(
        &[
            "bench",
            "-m",
            model,
            "-p",
            "0",
            "-n",
            "1",
            "-d",
            "99999999999",
            "--kv-cache",
            "contiguous",
        ],
        1,
    );
    // 100,000,000,000 tokens, six layers of 160 numbers of four bytes each.
    assert!(
        line.contains("384000000000000 of cache") && line.contains("are available"),
        "{line}"
    );
}

/// On this machine the Metal kernels stand in for the CPU's: a prompt of the references, and what transformers answers to it.
#[cfg(all(feature = "msl-host", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn msl_host_says_the_golden_words() {
    if candle_mmfp4::metal::host::build::compiler().is_none() {
        assert!(std::env::var_os("MMFP4_MSL_REQUIRED").is_none(), "no clang");
        eprintln!("skipped: Metal kernels need clang 17 or newer");
        return;
    }
    let golden = std::fs::read(bf16_demo().join("golden.json")).unwrap();
    let golden: Vec<Value> = serde_json::from_slice(&golden).unwrap();
    let chat = golden.iter().find(|case| case["name"] == "chat-2").unwrap();
    let part = |name: &str, begin: &str, end: &str| {
        let text = chat[name].as_str().unwrap();
        let (_, text) = text.split_once(begin).unwrap();
        text.split_once(end).unwrap().0.to_string()
    };
    let question = part("prompt", "<|user|>", "<|assistant|>");
    let answer = part("greedy_text", "", "<|user|>");
    // As on a GPU.
    let generate = ["generate", "--activations", "bf16", "-p", &question];
    let output = run(&mut mmfp4(&[&generate[..], &["--device", "msl-host"]].concat()));
    assert_eq!(stdout(&output).trim_end(), answer);
    let fell_back: Vec<_> = stderr(&output)
        .lines()
        .filter(|line| line.contains("no kernel"))
        .collect();
    assert_eq!(
        fell_back,
        ["msl-host: no kernel for mmfp4-attention yet; it runs on the CPU"]
    );
    // The line tells that kernels stood in at all.
    let plain = run(&mut mmfp4(&generate));
    assert!(!stderr(&plain).contains("no kernel"), "{plain:?}");
}

/// The sums of a profile's rows, which are to be its total's.
fn check_profile(profile: &Value, passes: &[(&str, u64)]) {
    assert_eq!(profile["clock"], "host");
    let phases = profile["phases"].as_array().unwrap();
    assert_eq!(phases.len(), passes.len(), "{profile}");
    for (phase, (name, count)) in phases.iter().zip(passes) {
        assert_eq!(
            (&phase["phase"], &phase["passes"]),
            (&(*name).into(), &(*count).into())
        );
        let total = phase["total_ms"].as_f64().unwrap();
        assert!(total > 0.0);
        for rows in ["ops", "layers"] {
            let rows = phase[rows].as_array().unwrap();
            let sum = |field: &str| rows.iter().map(|row| row[field].as_f64().unwrap()).sum::<f64>();
            assert!((sum("total_ms") / total - 1.0).abs() < 1e-6, "{phase}");
            assert!((sum("share") - 1.0).abs() < 1e-6, "{phase}");
        }
        let calls = |list: &str, name: &str| {
            let rows = phase[list].as_array().unwrap();
            rows.iter().find(|row| row["name"] == name).unwrap()["calls"].clone()
        };
        // Six layers, the first of them dense.
        assert_eq!(calls("ops", "attention"), count * 6);
        assert_eq!(calls("ops", "mlp.experts"), count * 5);
        assert_eq!(calls("ops", "lm_head"), *count);
        assert_eq!(calls("layers", "5"), *count);
        assert_eq!(calls("layers", "outside"), *count);
    }
}

#[test]
fn a_profile_says_where_the_time_went() {
    let generate = ["generate", "--profile", "--max-tokens", "4", "-p", QUESTION];
    let found = json(&[&generate[..], &["--json"]].concat());
    check_profile(&found["profile"], &[("prompt", 1), ("generation", 3)]);
    let statistics = &found["statistics"];
    let milliseconds = |field: &str| statistics[field].as_f64().unwrap() * 1e3;
    for (phase, wall) in [(0, "prefill_seconds"), (1, "decode_seconds")] {
        let total = found["profile"]["phases"][phase]["total_ms"].as_f64().unwrap();
        assert!(total < milliseconds(wall), "{found}");
    }

    let output = run(&mut mmfp4(&generate));
    let plain = run(&mut mmfp4(&[&["generate"], &generate[2..]].concat()));
    assert_eq!(stdout(&output), stdout(&plain));
    for text in [
        "host's clock",
        "1 pass for the prompt",
        "mlp.experts",
        "us a call",
    ] {
        assert!(stderr(&output).contains(text), "{output:?}");
    }
    assert!(!stderr(&plain).contains("us a call"));

    // Without a cache a token is generated by a pass over all before it, which is no prompt for that.
    let anew = json(&[&generate[..], &["--json", "--no-cache"]].concat());
    check_profile(&anew["profile"], &[("prompt", 1), ("generation", 3)]);
}

#[test]
fn bench_profiles_a_repetition_of_its_own() {
    let sizes = ["-p", "8", "-n", "3", "-r", "1", "--profile"];
    let output = run(&mut mmfp4(&[&["bench", "--json"][..], &sizes].concat()));
    let rows: Vec<Value> = serde_json::from_str(stdout(&output)).unwrap();
    let [.., prompt, generation] = rows.as_slice() else {
        panic!("{rows:?}");
    };
    check_profile(&prompt["profile"], &[("prompt", 1)]);
    check_profile(&generation["profile"], &[("generation", 3)]);
    assert!(rows[0].get("profile").is_none());
    for head in ["pp 8\n", "tg 3\n"] {
        assert!(stderr(&output).contains(head), "{output:?}");
    }
}

/// Runs the doctor; gives what it found, of which its exit code has to tell.
fn doctor(arguments: &[&str]) -> Value {
    let output = run(&mut mmfp4(&[&["doctor", "--json"][..], arguments].concat()));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let checks = report["checks"].as_array().unwrap();
    let wrong = checks.iter().any(|check| check["status"] == "wrong");
    assert_eq!(report["status"] == "wrong", wrong, "{report}");
    assert_eq!(output.status.code(), Some(i32::from(wrong)), "{report}");
    if cfg!(target_os = "linux") {
        assert!(!wrong, "{report}");
    }
    report
}

#[test]
fn the_doctor_examines_machine_and_kernels() {
    let report = doctor(&["--device", "cpu"]);
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    let machine = &report["machine"];
    assert_eq!(machine["os"], std::env::consts::OS);
    assert!(
        machine["os_version"].is_string() && machine["gpu"].is_null(),
        "{machine}"
    );
    assert!(machine["memory_bytes"].as_u64() > Some(1 << 28), "{machine}");
    let checks = report["checks"].as_array().unwrap();
    for check in checks {
        let texts = ["name", "found"].map(|field| check[field].as_str().unwrap());
        assert!(texts.iter().all(|text| !text.is_empty()), "{check}");
        let advised = !check["advice"].as_str().unwrap().is_empty();
        assert_eq!(advised, check["status"] != "ok", "{check}");
    }
    let named = |end: &str| {
        let found = checks
            .iter()
            .filter(|check| check["name"].as_str().unwrap().ends_with(end));
        found.collect::<Vec<_>>()
    };
    for name in [
        "system",
        "program",
        "processor",
        "instructions",
        "memory for a model",
    ] {
        assert_eq!(named(name).len(), 1, "{name}");
    }
    let number = |check: &Value, name: &str| {
        check["numbers"][name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name} of {check}"))
    };
    // Each set of instructions: plain code at least.
    assert!(!named(": linear").is_empty());
    for family in [
        "linear",
        "linear, floating point",
        "joined linear",
        "normed linear",
        "per head",
        "per head, floating point",
        "MLP",
        "mixture of experts",
        "routing",
        "RMS norm",
        "addition",
        "RoPE",
        "latent rows",
        "storing in a paged cache",
        "attention",
    ] {
        assert_eq!(named(&format!(": {family}")).len(), named(": linear").len());
        for check in named(&format!(": {family}")) {
            assert!(number(check, "nmse") <= number(check, "bound"), "{check}");
            // Six numbers of rows in three dtypes; whole, as counts are.
            assert!(check["numbers"]["cases"].as_u64() >= Some(18), "{check}");
        }
    }
    for check in named("speed of linear, 1 row") {
        assert!(number(check, "gb_per_s") > 0.0 && number(check, "bytes") > 3e7);
        assert!(number(check, "first_ms") > 0.0 && number(check, "later_ms") > 0.0);
    }
    for check in named("first call") {
        assert!(number(check, "later_ms") > 0.0);
    }
}

#[test]
fn the_doctor_says_what_is_wrong_and_what_to_do() {
    // The demo model fits wherever this runs; its sizes are known.
    let folder = mmfp4_demo();
    let mut command = mmfp4(&["doctor", "-m", folder.to_str().unwrap(), "--context", "1000"]);
    let output = run(command.env("MMFP4_CPU", "z80"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = std::str::from_utf8(&output.stdout).unwrap();
    for part in [
        "wrong    instructions",
        "`z80`",
        "correct the variable",
        "10 MB of weights",
        "1000 tokens",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(stderr(&output).contains(" wrong"), "{output:?}");
    if cfg!(target_os = "linux") {
        assert!(text.contains("none that this program uses"), "{text}");
    }
    let line = failure(&["doctor", "-m", "./no/such/folder"], 1);
    assert!(line.contains("check the path"), "{line}");
}
