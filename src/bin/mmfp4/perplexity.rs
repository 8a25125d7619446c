//! `mmfp4 perplexity`: how well a model predicts a text.

use crate::output::print_json;
use crate::{cache, documents, model, progress};
use candle_mmfp4::generation::Windows;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

const EXAMPLES: &str = "\
Each document stands on its own, as plain text without special tokens, and is cut into windows that are run without
a past, through the cache that --kv-cache names; the result is e to the power of the mean loss over all predicted tokens. Numbers compare only between models
with the same tokenizer, and with the same windows.

Examples:
  mmfp4 perplexity book.txt
  mmfp4 perplexity heldout.json -m path/to/bf16-model --quantize nvfp4 --json
  mmfp4 perplexity book.txt --window 512 --stride 256";

/// Measure how well a model predicts a text: lower is better.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Plain text, or a JSON list of strings or of objects with a `text`: one document each; `-` is standard input.
    file: PathBuf,
    /// Tokens that the model sees together.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,
    /// How far a window begins after the one before; of overlapping windows only new tokens count
    /// [default: the window].
    #[arg(long, value_name = "TOKENS")]
    stride: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: model::Arguments,
    #[command(flatten)]
    cache: cache::Arguments,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.cache.check()?;
    let documents = documents::read(&arguments.file)?;
    let windows = Windows {
        size: arguments.window,
        stride: arguments.stride.unwrap_or(arguments.window),
    };
    let (pipeline, _) = arguments.model.load(&arguments.cache)?;
    let bar = progress::counting("windows");
    let start = Instant::now();
    let result = pipeline.perplexity(&documents, windows, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    if arguments.json {
        return print_json(&json!({
            "model": arguments.model.name(),
            "perplexity": result.value(),
            "mean_loss": result.loss / result.tokens as f64,
            "documents": documents.len(),
            "windows": result.windows,
            "tokens": result.tokens,
            "window": windows.size,
            "stride": windows.stride,
            "seconds": seconds,
        }));
    }
    writeln!(
        std::io::stdout(),
        "perplexity {:.4} ({} tokens in {} windows of {}, {:.1} s)",
        result.value(),
        result.tokens,
        result.windows,
        windows.size,
        seconds
    )?;
    Ok(())
}
