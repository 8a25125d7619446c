//! `mmfp4 validate`: what quantising cost, tensor by tensor.

use crate::output::print_json;
use crate::{FORMATS, demo, model, progress};
use candle_mmfp4::checkpoint::{Checkpoint, Layout, Quantized, validate_checkpoint};
use candle_mmfp4::fp4::{Format, Validation};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

const EXAMPLES: &str = "\
The relative RMSE is that of the weights; about 10 % in mmfp4, 9 % in nvfp4 and 11 % in mxfp4 are normal. A tensor far
above the others is one to leave in floating point (`--keep`). What that costs in the end, `mmfp4 perplexity` tells.

Examples:
  mmfp4 validate path/to/bf16-model path/to/mmfp4-model
  mmfp4 validate zai-org/GLM-4.7-Flash nvfp4 --top 50
  mmfp4 validate path/to/bf16-model mxfp4 --json";

/// Compare a model with its quantised form, tensor by tensor: worst first.
#[derive(clap::Args)]
#[command(after_help = format!("{FORMATS}\n\n{EXAMPLES}"))]
pub struct Arguments {
    /// The floating-point model: a folder, or a repository of the hub.
    original: String,
    /// The same model in MMFP4, or the name of a format to simulate [default: the demo model in MMFP4].
    quantised: Option<String>,
    /// The layout of its 4-bit weights, where their tensors leave it open, by the name that `mmfp4 inspect` prints.
    #[arg(long, value_name = "NAME")]
    layout: Option<Layout>,
    /// How many tensors to print; 0 prints all.
    #[arg(long, value_name = "N", default_value_t = 20)]
    top: usize,
    /// Print one JSON object, with all tensors.
    #[arg(long)]
    json: bool,
    /// Ask the hub whether a repository that is in the cache has moved on.
    #[arg(long)]
    refresh: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let original = Checkpoint::from_files(&model::find(&arguments.original, arguments.refresh)?)?;
    let stored;
    let quantized = match arguments.quantised.as_deref() {
        // A folder of a format's name is still a folder.
        Some(name) if !Path::new(name).is_dir() && name.parse::<Format>().is_ok() => {
            Quantized::Simulated(name.parse()?)
        }
        Some(name) => {
            stored = Checkpoint::from_files(&model::find(name, arguments.refresh)?)?;
            Quantized::Stored(&stored, arguments.layout)
        }
        None => {
            stored = Checkpoint::from_files(&demo::files()?)?;
            Quantized::Stored(&stored, arguments.layout)
        }
    };
    let bar = progress::counting("tensors");
    let found = validate_checkpoint(&original, quantized)?;
    bar.set_length(found.len() as u64);
    let mut found = found
        .inspect(|_| bar.inc(1))
        .collect::<candle_mmfp4::Result<Vec<_>>>()?;
    bar.finish_and_clear();
    found.sort_by(|(_, a), (_, b)| b.relative_rmse.total_cmp(&a.relative_rmse));
    match arguments.json {
        true => print_json(&json!({ "tensors": found.iter().map(to_json).collect::<Vec<_>>() })),
        false => print_table(&found, arguments.top),
    }
}

fn print_table(found: &[(&str, Validation)], top: usize) -> anyhow::Result<()> {
    let shown = match top {
        0 => found,
        top => &found[..top.min(found.len())],
    };
    let width = shown.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(6);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:width$}  {:>13}  {:>9}  {:>8}  {:>9}  {:>6}  {:>9}",
        "tensor", "shape", "rel. RMSE", "cosine", "max error", "zeros", "saturated"
    )?;
    for (name, v) in shown {
        writeln!(
            out,
            "{name:width$}  {:>13}  {:>7.2} %  {:>8.6}  {:>9.2e}  {:>4.1} %  {:>7.1} %",
            format!("{} × {}", v.shape.0, v.shape.1),
            100.0 * v.relative_rmse,
            v.cosine,
            v.largest_error,
            100.0 * v.zeros,
            100.0 * v.saturated
        )?;
    }
    if shown.len() < found.len() {
        writeln!(
            out,
            "and {} more, with smaller errors (--top 0)",
            found.len() - shown.len()
        )?;
    }
    let relative = |index: usize| {
        found
            .get(index)
            .map_or(f64::NAN, |(_, v)| 100.0 * v.relative_rmse)
    };
    writeln!(
        out,
        "{} tensors: relative RMSE {:.2} % at worst, {:.2} % in the median",
        found.len(),
        relative(0),
        relative(found.len() / 2)
    )?;
    Ok(())
}

fn to_json((name, v): &(&str, Validation)) -> Value {
    let blocks = v.worst_blocks.iter();
    let blocks =
        blocks.map(|b| json!({ "row": b.row, "group": b.group, "relative_error": b.relative_error }));
    json!({
        "name": name,
        "shape": v.shape,
        "relative_rmse": v.relative_rmse,
        "rmse": v.rmse,
        "cosine": v.cosine,
        "largest_error": v.largest_error,
        "largest_error_at": v.largest_error_at,
        "zeros": v.zeros,
        "saturated": v.saturated,
        "worst_blocks": blocks.collect::<Vec<_>>(),
    })
}
