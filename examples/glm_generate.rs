//! Asks GLM-4.7-Flash (or any `glm4_moe_lite` model) something: the text goes to stdout as it comes, a line of
//! statistics to stderr.
//!
//! `cargo run --release --example glm_generate` asks the bundled demo model, which was trained on Rust's
//! documentation. `-- --prompt "What does \`Vec::push\` do?"` asks something else.

use candle_mmfp4::Place;
use candle_mmfp4::checkpoint::{Layout, LoadOptions};
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{Event, Message, Pipeline, RenderOptions};
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::memory;
use candle_mmfp4::nn::CacheSize;
use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Generates text with a GLM-4.7-Flash model.
#[derive(Parser)]
struct Arguments {
    /// The model's folder, or a repository of the hub: `org/name` or `org/name@revision`.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model"))]
    model: String,
    /// What to say to the model.
    #[arg(long, default_value = "What does `Option::insert` do?")]
    prompt: String,
    /// Continue the prompt as it is, instead of answering it as a turn of a chat.
    #[arg(long)]
    raw: bool,
    /// The most tokens to generate.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// 0 always takes the most probable token [default: the model's own, else 0].
    #[arg(long)]
    temperature: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long)]
    seed: Option<u64>,
    /// Where to compute: auto, cpu, metal or msl-host.
    #[arg(long, default_value = "auto")]
    device: Place,
    /// Quantise a floating-point model while it loads: mmfp4, mxfp4 or nvfp4.
    #[arg(long)]
    quantize: Option<Format>,
    /// The layout of its 4-bit weights, where their tensors leave it open (`mmfp4 inspect` has the names).
    #[arg(long)]
    layout: Option<Layout>,
    /// What the cache of keys and values stores: f16, bf16, fp8, fp4 or contiguous.
    #[arg(long, default_value_t)]
    kv_cache: CacheKind,
    /// How large it is: bytes, or with K, M, G or T as in 512M [default: as the machine has room].
    #[arg(long)]
    kv_memory: Option<CacheSize>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder that holds the model, fetched from the hub where it has to be.
#[cfg(feature = "hub")]
fn find(model: &str) -> anyhow::Result<PathBuf> {
    use candle_mmfp4::checkpoint::hub::{self, HubSettings, ModelSource, Plan, Progress, machine_memory};

    /// A line for what matters before the download, and one a file.
    struct Lines;

    impl Progress for Lines {
        fn start(&mut self, plan: &Plan) -> candle_mmfp4::Result<()> {
            let advice = machine_memory().and_then(|memory| plan.advice(memory));
            for line in plan.warnings().into_iter().chain(advice) {
                eprintln!("warning: {line}");
            }
            Ok(())
        }

        fn file(&mut self, name: &str, size: u64, present: u64) {
            if present < size {
                eprintln!("fetching {name}: {:.1} MiB", (size - present) as f64 / 1048576.0);
            }
        }

        fn note(&mut self, message: &str) {
            eprintln!("{message}");
        }
    }

    Ok(match ModelSource::parse(model)? {
        ModelSource::Folder(folder) => folder,
        ModelSource::Repo(repo) => hub::fetch(&repo, &HubSettings::from_env()?, &mut Lines)?,
    })
}

#[cfg(not(feature = "hub"))]
fn find(model: &str) -> anyhow::Result<PathBuf> {
    Ok(model.into())
}

fn run() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device = arguments.device.open()?;

    let folder = find(&arguments.model)?;
    let start = Instant::now();
    let options = LoadOptions {
        quantize: arguments.quantize,
        layout: arguments.layout,
        kv_cache: arguments.kv_cache,
        kv_size: arguments.kv_memory,
        ..LoadOptions::default()
    };
    let (pipeline, report) = Pipeline::from_folder(folder, &options, &device)?;
    let load = start.elapsed();
    // The first line counts what was loaded; what follows is what the user should know.
    for line in report.to_string().lines().skip(1) {
        eprintln!("{line}");
    }

    let prompt = match arguments.raw {
        true => pipeline.tokenizer().encode(&arguments.prompt)?,
        false => {
            let turn = [Message::new("user", arguments.prompt)];
            let render = RenderOptions {
                enable_thinking: Some(false),
                ..RenderOptions::default()
            };
            pipeline.chat_prompt(&turn, &render)?
        }
    };
    let mut options = pipeline.options();
    options.max_tokens = Some(arguments.max_tokens);
    options.sampling.seed = arguments.seed;
    if let Some(temperature) = arguments.temperature {
        options.sampling.temperature = temperature;
    }

    let mut out = std::io::stdout().lock();
    for event in pipeline.generate(&prompt, &options)? {
        match event? {
            Event::Prefill { .. } => {}
            Event::Token { text, .. } => {
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            Event::Finished { text, statistics, .. } => {
                writeln!(out, "{text}")?;
                eprintln!(
                    "loaded in {:.2} s; prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s; \
                     peak memory {}",
                    load.as_secs_f64(),
                    statistics.prompt_tokens,
                    statistics.prefill_rate(),
                    statistics.generated_tokens,
                    statistics.decode_rate(),
                    memory::peak_resident()
                        .map_or("unknown".into(), |b| format!("{:.0} MiB", b as f64 / 1048576.0)),
                );
            }
        }
    }
    Ok(())
}
