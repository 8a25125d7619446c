//! What loading a model would find and do, told by its files' headers.

mod walk;

use super::cache::{cache_bytes, cache_bytes_per_token};
use super::config::Config;
use super::decoder::{Model, weights_needed};
use super::tensors::completed;
use crate::checkpoint::{Checkpoint, Layout, LoadOptions, LoadReport, ModelFiles, Tally};
use crate::{Result, memory};
use candle_core::Device;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What a checkpoint is, and what loading it would do: see [`Model::inspect`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The files of its tensors.
    pub files: Vec<FileSize>,
    /// All its tensors, by dtype.
    pub dtypes: BTreeMap<String, Tally>,
    /// The layouts of its FP4 weights, and what tells them.
    pub layouts: Vec<Told>,
    /// What [`Model::load`] would report; `None` where the configuration is refused, which is among the problems then.
    pub load: Option<LoadReport>,
    /// The memory that it takes; `None` as for `load`, and where the options make no sense for the model.
    pub memory: Option<Needed>,
    /// Why it would not load: configuration and tensors that are missing, malformed or not implemented.
    pub problems: Vec<String>,
}

/// A file and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileSize {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of its tensors.
    pub bytes: u64,
}

/// A layout that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Which.
    pub layout: Layout,
    /// Who writes it.
    pub writer: String,
    /// What of a weight's tensors tells.
    pub by: &'static str,
    /// Weights in it.
    pub weights: usize,
    /// Their bytes in the file.
    pub stored: usize,
}

/// The memory that a model takes, as [`Model::load`] counts it before it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Needed {
    /// Bytes of weights.
    pub weights: u64,
    /// What the cache stores.
    pub kv_cache: String,
    /// Bytes of the cache a token.
    pub cache_a_token: u64,
    /// Bytes of the cache.
    pub cache: u64,
    /// Bytes of both.
    pub total: u64,
    /// Bytes that a program can still take here; `None` where the system does not tell.
    pub available: Option<u64>,
}

impl Model {
    /// What loading these files on the CPU with these options would find and do. Headers are read and, for
    /// [warnings](LoadReport::warnings), a few pages of weights: it takes as long for a large model as for a small one of as
    /// many tensors.
    ///
    /// ```
    /// use candle_mmfp4::checkpoint::{Layout, ModelFiles};
    /// use candle_mmfp4::models::glm4_moe_lite::Model;
    ///
    /// let files = ModelFiles::folder("examples/demo-model");
    /// let found = Model::inspect(&files, &Default::default())?;
    /// assert_eq!(found.layouts[0].layout, Layout::Marlin);
    /// assert!(found.problems.is_empty());
    /// println!("{} bytes a token", found.load.unwrap().bytes_a_token);
    /// # Ok::<(), candle_mmfp4::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Checkpoint::from_files`], and [`Error::Argument`](crate::Error::Argument) for options that make no sense
    /// whatever the model. What is wrong with the model is among [`Inspection::problems`].
    pub fn inspect(files: &ModelFiles, options: &LoadOptions) -> Result<Inspection> {
        files.check()?;
        // As loading reads them: what is wrong with both is told of the config.
        let config = Config::from_files(files);
        let checkpoint = match Checkpoint::from_files(files) {
            Ok(checkpoint) => checkpoint,
            Err(error) => return Err(config.err().unwrap_or(error)),
        };
        let mut found = Inspection::of_tensors(&checkpoint);
        match config {
            Ok(config) => {
                let completed = completed(&config, &checkpoint, options).unwrap_or_else(|error| {
                    found.problems.push(error.to_string());
                    None
                });
                let checkpoint = completed.as_ref().map_or(&checkpoint, |(whole, _)| whole);
                let (mut report, problems) = walk::report(&config, checkpoint, options)?;
                if let Some((_, supplied)) = &completed {
                    report.note_base(supplied.clone());
                }
                found.layouts = told(&report);
                found.problems.extend(problems);
                match needed(&config, checkpoint, options) {
                    Ok(needed) => found.memory = Some(needed),
                    Err(error) => found.problems.push(error.to_string()),
                }
                found.load = Some(report);
            }
            Err(error) => found.problems.push(error.to_string()),
        }
        Ok(found)
    }
}

impl Inspection {
    /// What a checkpoint's tensors are, whatever the model.
    fn of_tensors(checkpoint: &Checkpoint) -> Self {
        let mut files: BTreeMap<PathBuf, u64> = BTreeMap::new();
        let mut dtypes: BTreeMap<String, Tally> = BTreeMap::new();
        for (_, tensor) in checkpoint.tensors() {
            let bytes = tensor.bytes.len();
            *files.entry(tensor.file.clone()).or_default() += bytes as u64;
            let tally = dtypes.entry(format!("{:?}", tensor.dtype)).or_default();
            tally.tensors += 1;
            tally.bytes += bytes;
        }
        let files = files.into_iter();
        Self {
            files: files.map(|(path, bytes)| FileSize { path, bytes }).collect(),
            dtypes,
            layouts: Vec::new(),
            load: None,
            memory: None,
            problems: Vec::new(),
        }
    }
}

fn told(report: &LoadReport) -> Vec<Told> {
    let of = |layout: Layout| {
        let shares = report
            .components
            .iter()
            .filter(|share| share.layout == Some(layout));
        Told {
            layout,
            writer: layout.to_string(),
            by: layout.told_by(),
            weights: shares.clone().map(|share| share.weights).sum(),
            stored: shares.map(|share| share.stored).sum(),
        }
    };
    report.layouts.iter().copied().map(of).collect()
}

fn needed(config: &Config, checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Needed> {
    let activations = options.activations_on(&Device::Cpu)?;
    let cache = cache_bytes(config, options, activations)?;
    let weights = weights_needed(config, checkpoint, options);
    Ok(Needed {
        weights,
        kv_cache: options.kv_cache.to_string(),
        cache_a_token: cache_bytes_per_token(config, options.kv_cache, activations)?,
        cache,
        total: weights.saturating_add(cache),
        available: memory::available(),
    })
}
