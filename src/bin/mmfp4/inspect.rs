//! `mmfp4 inspect`: what a checkpoint is, and what loading it would do.

use crate::output::{print_json, say};
use crate::{cache, demo, model};
use candle_mmfp4::checkpoint::hub::{self, HubSettings, ModelSource};
use candle_mmfp4::checkpoint::{LoadReport, ModelFiles, Share, Supplied};
use candle_mmfp4::models::glm4_moe_lite::{Inspection, Model, Needed};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Headers are read, and a few pages: a large model is told as quickly as a small one, and nothing is loaded. Of a repository of \
the hub that is not in the cache, no weights are fetched: config.json, the index, and the beginning of each file. Where \
something is wrong with the model the program ends with 1.

Examples:
  mmfp4 inspect
  mmfp4 inspect path/to/model --context 32768 --kv-cache fp8
  mmfp4 inspect path/to/bf16-model --quantize mmfp4
  mmfp4 inspect path/to/model.gguf --json";

/// Problems that are printed; `--json` has all.
const SHOWN: usize = 10;
/// Tensors that a line names, of however many.
const NAMED: usize = 5;

/// Tell what a checkpoint is: layout, formats, bytes by component and a token, memory, and what loading would do with it.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// A model's folder, a GGUF file, or a repository of the hub [default: the demo model].
    #[arg(value_name = "FOLDER|REPO|FILE.gguf")]
    source: Option<String>,
    /// Ask the hub whether a repository that is in the cache has moved on.
    #[arg(long)]
    refresh: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    weights: model::Weights,
    #[command(flatten)]
    cache: cache::Arguments,
}

/// Gives the exit code, too.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut options = arguments.weights.options();
    arguments.cache.apply(&mut options)?;
    let files = match &arguments.source {
        Some(source) => files(source, arguments.refresh)?,
        None => demo::files()?,
    };
    options.base = arguments.weights.base(&files, arguments.refresh)?;
    let found = Model::inspect(&files, &options)?;
    match arguments.json {
        true => print_json(&found)?,
        false => table(&found)?,
    }
    Ok(match found.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// A model's files, of a repository that is not in the cache without their weights.
fn files(source: &str, refresh: bool) -> anyhow::Result<ModelFiles> {
    match ModelSource::parse(source)? {
        ModelSource::Folder(folder) => Ok(ModelFiles::folder(folder)),
        ModelSource::Repo(repo) => {
            let mut settings = HubSettings::from_env()?;
            settings.refresh = refresh;
            Ok(hub::headers(&repo, &settings)?)
        }
    }
}

fn table(found: &Inspection) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let folders: BTreeSet<_> = found.files.iter().filter_map(|file| file.path.parent()).collect();
    let folders: Vec<_> = folders
        .iter()
        .map(|folder| folder.display().to_string())
        .collect();
    let bytes: u64 = found.files.iter().map(|file| file.bytes).sum();
    let (files, place) = (found.files.len(), folders.join(", "));
    writeln!(
        out,
        "{place}: {files} {}, {} of tensors",
        plural(files, "file"),
        size(bytes)
    )?;
    for told in &found.layouts {
        let (name, writer) = (told.layout.name(), &told.writer);
        let bytes = size(told.stored as u64);
        writeln!(
            out,
            "layout {name} ({writer}), told by {}: {} weights, {bytes}",
            told.by, told.weights
        )?;
    }
    match &found.load {
        Some(report) => weights(&mut out, report)?,
        None => {
            for (dtype, tally) in &found.dtypes {
                writeln!(
                    out,
                    "{dtype}: {} tensors, {}",
                    tally.tensors,
                    size(tally.bytes as u64)
                )?;
            }
        }
    }
    if let Some(needed) = &found.memory {
        memory(&mut out, needed)?;
    }
    for problem in found.problems.iter().take(SHOWN) {
        writeln!(out, "problem: {problem}")?;
    }
    if found.problems.len() > SHOWN {
        say(format!(
            "and {} more problems (--json has all)",
            found.problems.len() - SHOWN
        ));
    }
    Ok(())
}

/// What the model is made of, and what loading would do with it.
fn weights(out: &mut impl Write, report: &LoadReport) -> io::Result<()> {
    writeln!(
        out,
        "\n{:<22} {:<22} {:<17} {:>7} {:>10} {:>10} {:>10}",
        "component", "format", "layout", "weights", "in file", "in use", "own memory"
    )?;
    for share in &report.components {
        let Share {
            component, format, ..
        } = share;
        let layout = share.layout.map_or("-", |layout| layout.name());
        let [stored, used, own] = [share.stored, share.bytes, share.own].map(|bytes| size(bytes as u64));
        let weights = share.weights;
        writeln!(
            out,
            "{component:<22} {format:<22} {layout:<17} {weights:>7} {stored:>10} {used:>10} {own:>10}"
        )?;
    }
    let sum = |of: fn(&Share) -> usize| size(report.components.iter().map(of).sum::<usize>() as u64);
    let (stored, used, own) = (
        sum(|share| share.stored),
        sum(|share| share.bytes),
        sum(|share| share.own),
    );
    let weights: usize = report.components.iter().map(|share| share.weights).sum();
    writeln!(
        out,
        "{:<22} {:<22} {:<17} {weights:>7} {stored:>10} {used:>10} {own:>10}\n",
        "in all", "", ""
    )?;
    if report.ignored > 0 {
        let bytes = size(report.ignored_bytes as u64);
        writeln!(
            out,
            "ignored: {} tensors of layers that predict several tokens, {bytes}",
            report.ignored
        )?;
    }
    if !report.unused.is_empty() {
        writeln!(
            out,
            "unknown: {} tensors that nothing asks for ({})",
            report.unused.len(),
            named(&report.unused)
        )?;
    }
    if !report.dangling.is_empty() {
        writeln!(
            out,
            "in no file: {} tensors that the index lists of layers that the model does not have, ignored ({})",
            report.dangling.len(),
            named(&report.dangling)
        )?;
    }
    supplied(out, &report.supplied)?;
    for own in &report.own {
        let bytes = size(own.bytes as u64);
        writeln!(
            out,
            "at load: {bytes} for {} weights: {}",
            own.weights, own.reason
        )?;
    }
    for warning in &report.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    let token = size(report.bytes_a_token);
    writeln!(out, "a decoded token reads {token} of weights")
}

/// A line a file of the base that tensors come from.
fn supplied(out: &mut impl Write, supplied: &[Supplied]) -> io::Result<()> {
    let mut files: BTreeMap<&Path, Vec<&str>> = BTreeMap::new();
    for Supplied { name, file } in supplied {
        files.entry(file).or_default().push(name);
    }
    for (file, names) in files {
        let (count, file) = (names.len(), file.display());
        writeln!(
            out,
            "from the base: {count} tensors that the checkpoint lacks, of {file} ({})",
            named(&names)
        )?;
    }
    Ok(())
}

fn memory(out: &mut impl Write, needed: &Needed) -> io::Result<()> {
    let available = needed.available.map_or(String::new(), |bytes| {
        format!(" ({} available here)", size(bytes))
    });
    writeln!(
        out,
        "memory: weights {} + cache {} ({} for {} tokens of {} bytes) = {}{available}",
        size(needed.weights),
        size(needed.cache),
        needed.kv_cache,
        needed.cache / needed.cache_a_token.max(1),
        needed.cache_a_token,
        size(needed.total)
    )
}

/// The first of some names.
fn named(names: &[impl AsRef<str>]) -> String {
    let mut first: Vec<_> = names.iter().take(NAMED).map(AsRef::as_ref).collect();
    if names.len() > NAMED {
        first.push("…");
    }
    first.join(", ")
}

fn plural(count: usize, word: &str) -> String {
    match count {
        1 => word.to_string(),
        _ => format!("{word}s"),
    }
}

/// Bytes as people read them, in powers of 1,000.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
