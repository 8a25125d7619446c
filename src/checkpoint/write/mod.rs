//! Writing FP4 checkpoints.

mod calibrate;
mod config;
mod plan;
mod resume;
mod shard;

use super::disk;
use super::layout::{self, write_index, write_json};
use super::layouts::Layout;
use super::report::{Kept, Tally};
use super::safetensors::Checkpoint;
use crate::fp4::{Format, ScaleKind, ScaleRule};
use crate::{Error, Result};
use plan::Plan;
use resume::Partial;
use shard::Maker;
use std::fmt;
use std::path::Path;

pub use calibrate::{LayerInputs, Rounding};
pub(super) use plan::is_linear;

/// How to quantise a checkpoint, and how to lay it out.
#[derive(Debug, Clone)]
pub struct QuantizeOptions {
    /// What linear layers become, and whose layout the folder has: Marlin's for F16 scales (MMFP4), that of
    /// compressed-tensors, which vLLM and SGLang serve, for [`Format::nvfp4`] and [`Format::mxfp4`].
    pub format: Format,
    /// How scales are chosen.
    pub rule: ScaleRule,
    /// Decoder layers that stay in floating point, counted from 0 or, if negative, from the end.
    pub skip_layers: Vec<i64>,
    /// Weights that stay in floating point, as [`LoadOptions::keep`](super::LoadOptions::keep) names them.
    pub keep: Vec<String>,
    /// The most bytes of tensors in a file, whole layers aside: 2 GB. A file is also what is lost where a process is
    /// killed.
    pub shard_bytes: usize,
    /// What `config.json` calls the source; the name of its folder where there is none.
    pub source: Option<String>,
}

impl QuantizeOptions {
    /// To this format, with scales of least squared error, and nothing kept but what always is.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            rule: ScaleRule::default(),
            skip_layers: Vec::new(),
            keep: Vec::new(),
            shard_bytes: 2_000_000_000,
            source: None,
        }
    }

    fn layout(&self) -> Result<Layout> {
        self.format.check("quantize")?;
        match self.format {
            format if format.kind == ScaleKind::F16 => Ok(Layout::Marlin),
            format if format == Format::nvfp4() => Ok(Layout::CompressedNvfp4),
            format if format == Format::mxfp4() => Ok(Layout::CompressedMxfp4),
            Format { group, kind } => Err(Error::argument(
                "quantize",
                "format",
                "F16 scales (mmfp4), E4M3 ones every 16 (nvfp4) or E8M0 ones every 32 (mxfp4)",
                format!("{kind:?} every {group}"),
            )),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuantizeReport {
    /// Files of tensors.
    pub shards: usize,
    /// Those of them that an earlier, interrupted run had finished.
    pub resumed: usize,
    /// Weights in four bits.
    pub quantized: Tally,
    /// How many of them were rounded plainly in this run because the calibration's text has too few tokens for them, or because
    /// they belong to layers that it does not reach, which predict tokens after the next; none without calibration.
    pub uncalibrated: usize,
    /// Tensors that are as they were.
    pub copied: Tally,
    /// Linear layers' weights that are among these because of the options, or because they could not be quantised.
    pub kept: Vec<Kept>,
    /// Options without effect.
    pub warnings: Vec<String>,
}

impl fmt::Display for QuantizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        write!(
            f,
            "{} weights in 4 bits ({:.1} MB), {} tensors as they were ({:.1} MB), files: {}",
            self.quantized.tensors,
            megabytes(self.quantized.bytes),
            self.copied.tensors,
            megabytes(self.copied.bytes),
            self.shards
        )?;
        if self.resumed > 0 {
            write!(f, ", {} of which were finished before", self.resumed)?;
        }
        if self.uncalibrated > 0 {
            write!(
                f,
                "\n{} weights rounded without calibration: of their inputs the text tells too little",
                self.uncalibrated
            )?;
        }
        super::report::write_kept(f, &self.kept)?;
        for warning in &self.warnings {
            write!(f, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}

/// Quantises the linear layers of a `glm4_moe_lite` folder and writes a whole model folder: weights, index, tokenizer,
/// template, and a `config.json` whose `quantization_config` says what was done.
///
/// Embeddings, output head, routers, norms and biases stay as they are, as do weights whose K is not a multiple of
/// `options.format.group`. Where the layout is compressed-tensors', matrices that servers multiply as one (gate and up;
/// q_a and kv_a) share one factor, and have to be quantised both or neither, as the experts of a layer all or none.
///
/// Tensors go one by one from the source's map to the file: besides headers, the codes and scales of one matrix (12 MB for
/// the largest of GLM-4.7-Flash) and 64 KiB a thread are held in memory, whatever the size of the checkpoint. Layers lie
/// in the order of their numbers, each with its experts contiguous in one file; data begins at a multiple of 16 KiB and
/// tensors at 16 bytes. The result is the same byte for byte each time, whatever the number of threads.
///
/// `progress` is told the source's bytes that are done, and all of them.
///
/// The folder appears whole or not at all; until then its name ends in `.partial`. Where a process was interrupted after it
/// had finished files, the same call continues: a file is kept if it has the header that it should have and the hash that
/// was noted when it was finished, and if the source (its config, its files' sizes and times of change, and pages of each
/// tensor are compared) and the options are the same; all else that is there is removed.
///
/// # Errors
/// [`Error::Argument`] for a format without a layout and for options that make no sense; [`Error::File`] for a source that
/// is quantised already or has nothing to quantise, a target that is there, and a folder that another process is writing;
/// [`Error::DiskSpace`], [`Error::Io`]; [`Error::Tensor`] for a source that is malformed; those of
/// [`quantize_dense`](crate::fp4::quantize_dense). What was finished remains for the next call; where nothing was,
/// nothing does.
pub fn quantize_checkpoint(
    source: &Checkpoint,
    target: impl AsRef<Path>,
    options: &QuantizeOptions,
    progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    quantize(source, target.as_ref(), options, None, progress)
}

/// As [`quantize_checkpoint`], with rounding that makes up for its own errors
/// ([`quantize_compensated`](crate::fp4::quantize_compensated)): `inputs` knows what the layers read. Its note is in
/// `quantization_config`, and another note has an interrupted run begin anew.
///
/// Beside what [`quantize_checkpoint`] holds, `inputs` takes memory: see
/// [`Calibration`](crate::models::glm4_moe_lite::Calibration).
///
/// ```
/// use candle_mmfp4::checkpoint::{Checkpoint, QuantizeOptions, quantize_calibrated};
/// use candle_mmfp4::fp4::Format;
/// use candle_mmfp4::generation::{Tokenizer, calibration_windows};
/// use candle_mmfp4::models::glm4_moe_lite::{Calibration, Config};
///
/// # fn quantize(text: &str) -> candle_mmfp4::Result<()> {
/// let source = Checkpoint::open("path/to/GLM-4.7-Flash")?;
/// let config = Config::from_file("path/to/GLM-4.7-Flash/config.json")?;
/// let tokenizer = Tokenizer::from_file("path/to/GLM-4.7-Flash/tokenizer.json")?;
/// let windows = calibration_windows(&tokenizer, &[text], 512, 65_536)?;
/// let mut inputs = Calibration::new(&source, config, &windows, "a text")?;
/// let options = QuantizeOptions::new(Format::mmfp4());
/// let report = quantize_calibrated(&source, "path/to/new", &options, &mut inputs, |_, _| {})?;
/// println!("{report}");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`quantize_checkpoint`] and of `inputs`.
pub fn quantize_calibrated(
    source: &Checkpoint,
    target: impl AsRef<Path>,
    options: &QuantizeOptions,
    inputs: &mut dyn LayerInputs,
    progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    quantize(source, target.as_ref(), options, Some(inputs), progress)
}

fn quantize(
    source: &Checkpoint,
    target: &Path,
    options: &QuantizeOptions,
    inputs: Option<&mut dyn LayerInputs>,
    mut progress: impl FnMut(u64, u64),
) -> Result<QuantizeReport> {
    let layout = options.layout()?;
    let partial = layout::partial_name(target)?;
    let real = |path: &Path| path.canonicalize().ok();
    if partial.exists() && real(&partial) == real(source.folder()) {
        let problem = "the source, which has the name that the target has while it is written";
        return Err(Error::file(partial, problem, "choose another name"));
    }
    let config = config::read(source)?;
    let plan = Plan::new(source, &config, options, layout)?;
    let mut json = config::with_note(config, options, layout, &plan, source.folder());
    if let Some(inputs) = &inputs {
        json["quantization_config"]["producer"]["calibration"] = inputs.note();
    }
    let partial = Partial::open(&partial, source, &json, &plan)?;
    let written = write_files(source, &plan, &partial, inputs, &mut progress).and_then(|uncalibrated| {
        config::copy_side_files(source.folder(), partial.folder())?;
        write_json(&partial.folder().join("config.json"), &json)?;
        Ok(uncalibrated)
    });
    let resumed = partial.kept();
    let uncalibrated = match written {
        Ok(uncalibrated) => {
            partial.finish(target)?;
            uncalibrated
        }
        Err(error) => {
            partial.give_up();
            return Err(error);
        }
    };
    Ok(QuantizeReport {
        shards: plan.files.len(),
        resumed,
        quantized: plan.quantized,
        uncalibrated,
        copied: plan.copied,
        kept: plan.kept,
        warnings: plan.warnings,
    })
}

/// [`quantize_checkpoint`] in short.
///
/// # Errors
/// Those of [`quantize_checkpoint`].
pub fn quantize_folder(
    source: &Checkpoint,
    target: impl AsRef<Path>,
    format: Format,
    rule: ScaleRule,
) -> Result<()> {
    let options = QuantizeOptions {
        rule,
        ..QuantizeOptions::new(format)
    };
    quantize_checkpoint(source, target, &options, |_, _| {}).map(|_| ())
}

/// A value that cannot be quantised, with the file of the source that it stands in.
fn in_its_file(error: Error, source: &Checkpoint) -> Error {
    let file = match &error {
        Error::NonFinite { name, .. } => source.find(name).map(|stored| stored.file.clone()),
        _ => None,
    };
    error.in_file(file)
}

/// Writes what is missing. Answers how many weights were rounded plainly because `inputs` know too little of them.
fn write_files(
    source: &Checkpoint,
    plan: &Plan<'_>,
    partial: &Partial<'_>,
    inputs: Option<&mut dyn LayerInputs>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<usize> {
    let missing = || plan.files.iter().filter(|(name, _)| !partial.has(name));
    let needed = missing().map(|(_, file)| file.size() as u64).sum();
    disk::check_space(partial.folder(), needed, disk::free_space(partial.folder()))?;
    let total = source.size_without(&[]);
    let mut done = total - missing().map(|(_, file)| plan.source_bytes(file)).sum::<u64>();
    progress(done, total);
    let mut progress = |bytes| {
        done += bytes;
        progress(done, total);
    };
    let mut maker = Maker::new(plan, partial, inputs, &mut progress);
    for (name, file) in missing() {
        let written = partial.add(name, |path| maker.write(file, path));
        written.map_err(|error| in_its_file(error, source))?;
    }
    if plan.files.len() > 1 {
        write_index(partial.folder(), &plan.files)?;
    }
    Ok(maker.plain())
}
