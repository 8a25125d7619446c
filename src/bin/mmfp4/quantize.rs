//! `mmfp4 quantize`: a floating-point model as a folder of four bits.

use crate::output::{mib, say};
use crate::{FORMATS, documents, model, progress};
use anyhow::Context;
use candle_core::Device;
use candle_mmfp4::checkpoint::hub::ModelSource;
use candle_mmfp4::checkpoint::{
    Checkpoint, ModelFiles, QuantizeOptions, quantize_calibrated, quantize_checkpoint,
};
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{Tokenizer, calibration_windows};
use candle_mmfp4::memory;
use candle_mmfp4::models::glm4_moe_lite::{Calibration, Config, Model};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
mmfp4 is in Marlin's layout. nvfp4 and mxfp4 are in that of compressed-tensors, which vLLM and SGLang serve: there the
experts of a layer, gate_proj and up_proj, and q_a_proj and kv_a_proj_with_mqa are kept all or none.

Embeddings, output head, routers, norms and biases stay as they are. An interrupted run is continued by the same command:
finished files are checked and kept in OUT.partial, which becomes OUT when all is whole.

Examples:
  mmfp4 quantize zai-org/GLM-4.7-Flash GLM-4.7-Flash-MMFP4
  mmfp4 quantize path/to/bf16-model path/to/nvfp4-model --format nvfp4
  mmfp4 quantize path/to/bf16-model OUT --keep 'kv_b_proj=bf16' --skip-layers 0,-1
  mmfp4 quantize path/to/bf16-model OUT --calibrate book.txt";

/// Tokens that the model reads together to be calibrated.
const WINDOW: usize = 512;

/// Write a floating-point model in four bits.
#[derive(clap::Args)]
#[command(after_help = format!("{FORMATS}\n\n{EXAMPLES}"))]
pub struct Arguments {
    /// The floating-point model: a folder, or a repository of the hub, `org/name` or `org/name@revision`.
    #[arg(value_name = "IN")]
    source: String,
    /// The folder to write, which must not be there.
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// mmfp4, nvfp4 or mxfp4.
    #[arg(long, value_name = "FORMAT", default_value = "mmfp4")]
    format: Format,
    /// Weights to leave as they are, by a part of their names, or all of it with `*`; may be given several times.
    #[arg(long, value_name = "PATTERN=bf16", value_parser = kept)]
    keep: Vec<String>,
    /// Layers to leave as they are, -1 being the last: `0,-1`.
    #[arg(
        long,
        value_name = "LAYERS",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    skip_layers: Vec<i64>,
    /// The most that a file of tensors holds, as 500MB or 4GB, where a layer is not larger.
    #[arg(long, value_name = "SIZE", default_value = "2GB", value_parser = size)]
    shard_size: usize,
    /// Have the model read a text, and round so that it then loses less: plain text, or a JSON list of strings or of objects
    /// with a `text`; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// How much of it is read at most, in windows of 512 tokens from all of it; each token takes 32 KB of memory in GLM-4.7-Flash.
    #[arg(long, value_name = "TOKENS", default_value_t = 65_536, requires = "calibrate")]
    calibrate_tokens: usize,
    /// Ask the hub whether a repository that is in the cache has moved on.
    #[arg(long)]
    refresh: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let files = model::find(&arguments.source, arguments.refresh)?;
    let source = Checkpoint::from_files(&files)?;
    let options = QuantizeOptions {
        skip_layers: arguments.skip_layers.clone(),
        keep: arguments.keep.clone(),
        shard_bytes: arguments.shard_size,
        source: match ModelSource::parse(&arguments.source)? {
            ModelSource::Folder(_) => None,
            ModelSource::Repo(repo) => {
                // The cache's folder of a commit bears its name.
                let commit = files.root().file_name().unwrap_or_default().to_string_lossy();
                Some(format!("{}@{commit}", repo.name()))
            }
        },
        ..QuantizeOptions::new(arguments.format)
    };
    let mut calibration = match &arguments.calibrate {
        None => None,
        Some(text) => Some(calibration(&source, &files, text, arguments.calibrate_tokens)?),
    };
    let start = Instant::now();
    let bar = progress::writing(&format!("writing {}", arguments.target.display()));
    let mut begun = false;
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if !begun {
            // What was finished before says nothing of what is left.
            bar.reset_eta();
            begun = true;
        }
    };
    let (report, own) = watched(|| match &mut calibration {
        None => quantize_checkpoint(&source, &arguments.target, &options, progress),
        Some(inputs) => quantize_calibrated(&source, &arguments.target, &options, inputs, progress),
    });
    bar.finish_and_clear();
    let report = report?;
    let seconds = start.elapsed().as_secs_f64();
    say(format!(
        "{seconds:.1} s, at most {} of memory of this program's own",
        mib(own)
    ));
    let (model, loaded) = Model::from_folder(&arguments.target, &Default::default(), &Device::Cpu)
        .with_context(|| format!("{} was written, and cannot be read", arguments.target.display()))?;
    loaded
        .warnings
        .iter()
        .for_each(|line| say(format!("warning: {line}")));
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: {report}", arguments.target.display())?;
    writeln!(
        out,
        "{:.3} GB read a decoded token",
        model.bytes_read(1) as f64 / 1e9
    )?;
    Ok(())
}

/// Does some work, and tells the most memory of this program's own that there was meanwhile, looked at twenty times a second.
fn watched<R>(work: impl FnOnce() -> R) -> (R, Option<u64>) {
    struct Ended<'a>(&'a AtomicBool);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = memory::private_resident();
            while !ended.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(50));
                most = most.max(memory::private_resident());
            }
            most
        });
        let result = {
            // Also where the work panics: the scope waits for its threads.
            let _ended = Ended(&ended);
            work()
        };
        watch.thread().unpark();
        (result, watch.join().unwrap_or_default())
    })
}

/// What the model makes of a text, of which it reads so many tokens.
fn calibration<'a>(
    source: &'a Checkpoint,
    files: &ModelFiles,
    text: &Path,
    tokens: usize,
) -> anyhow::Result<Calibration<'a>> {
    let documents = documents::read(text)?;
    let tokenizer = Tokenizer::from_file(files.path("tokenizer.json"))?;
    let windows = calibration_windows(&tokenizer, &documents, WINDOW, tokens)?;
    let name = text.file_name().unwrap_or_default().to_string_lossy();
    let config = Config::from_files(files)?;
    Ok(Calibration::new(source, config, &windows, &name)?)
}

/// A pattern; of what it is kept in there is one choice, that of the source.
fn kept(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        None | Some((_, "bf16")) => Ok(text.strip_suffix("=bf16").unwrap_or(text).to_string()),
        Some((_, other)) => Err(format!(
            "`{other}`: weights are kept as they are, which is called bf16"
        )),
    }
}

fn size(text: &str) -> Result<usize, String> {
    let expected = || "expected a size such as 500MB or 4GB".to_string();
    let units = [("MB", 1_000_000), ("GB", 1_000_000_000)];
    let (number, unit) = units
        .into_iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .ok_or_else(expected)?;
    let number: usize = number.trim().parse().map_err(|_| expected())?;
    match number.checked_mul(unit) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(expected()),
    }
}
