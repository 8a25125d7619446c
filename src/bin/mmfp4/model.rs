//! Which model, and how it is loaded.

use crate::output::{mib, say};
use crate::progress::DownloadBar;
use crate::{cache, demo};
use candle_core::{DType, Device};
use candle_mmfp4::Place;
use candle_mmfp4::checkpoint::hub::{self, HubSettings, ModelSource};
use candle_mmfp4::checkpoint::{Layout, LoadOptions, ModelFiles};
use candle_mmfp4::cpu::{Arithmetic, Executor};
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::Pipeline;
use candle_mmfp4::memory;
use candle_mmfp4::models::glm4_moe_lite::Model;
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct Arguments {
    /// A model's folder, or a repository of the hub: `org/name` or `org/name@revision`, with `:Q4_K_M` or the like behind it
    /// for one of several GGUF files [default: the demo model].
    #[arg(short, long, value_name = "FOLDER|REPO")]
    model: Option<String>,
    /// Ask the hub whether a repository that is in the cache has moved on.
    #[arg(long)]
    refresh: bool,
    /// Where to compute.
    #[arg(long, value_name = "DEVICE", default_value = "auto", help = places("Where to compute"))]
    device: Place,
    /// What goes from op to op: f32, f16 or bf16 [default: f32 on the CPU, bf16 on a GPU].
    #[arg(long, value_name = "DTYPE", value_parser = activations)]
    activations: Option<DType>,
    #[command(flatten)]
    weights: Weights,
    /// Multiply with activations as they are, in f32, instead of rounding them to eight bits: slower (CPU).
    #[arg(long)]
    exact: bool,
    /// Threads to compute with [default: MMFP4_THREADS, or one a physical core].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    experts: Experts,
}

/// What becomes of the weights.
#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct Weights {
    /// Take tensors that the model lacks from this one, its original: a folder, or a repository, of which only the files that
    /// hold them are fetched.
    #[arg(long, value_name = "FOLDER|REPO")]
    base: Option<String>,
    /// Quantise a floating-point model while it loads: mmfp4, nvfp4 or mxfp4.
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Format>,
    /// The layout of its 4-bit weights, where their tensors leave it open, by the name that `mmfp4 inspect` prints; an error
    /// where they contradict it.
    #[arg(long, value_name = "NAME")]
    layout: Option<Layout>,
    /// Layers to leave in floating point when quantising, -1 being the last: `0,-1`.
    #[arg(
        long,
        value_name = "LAYERS",
        value_delimiter = ',',
        allow_hyphen_values = true,
        requires = "quantize"
    )]
    skip_layers: Vec<i64>,
    /// Weights to leave in floating point when quantising, by a part of their names, or all of it with `*`; may be
    /// given several times.
    #[arg(long, value_name = "PATTERN", requires = "quantize")]
    keep: Vec<String>,
    /// Round the output head to eight bits while loading: half of a BF16 one's bytes to read a token, for memory of this
    /// program's own.
    #[arg(long)]
    int8_head: bool,
}

impl Weights {
    /// The files of `--base`, of a repository those that hold what `files` lack, fetched first where they have to be.
    pub fn base(&self, files: &ModelFiles, refresh: bool) -> anyhow::Result<Option<ModelFiles>> {
        let Some(base) = &self.base else {
            return Ok(None);
        };
        let folder = match ModelSource::parse(base)? {
            ModelSource::Folder(folder) => folder,
            ModelSource::Repo(repo) => match Model::missing_tensors(files)? {
                missing if missing.is_empty() => {
                    say("note: --base has no effect: the model lacks no tensor");
                    return Ok(None);
                }
                missing => fetched(refresh, |settings, bar| {
                    hub::fetch_tensors(&repo, settings, &missing, bar)
                })?,
            },
        };
        Ok(Some(ModelFiles::folder(folder)))
    }

    /// The options that it is about but the base, all others as they are by default.
    pub fn options(&self) -> LoadOptions {
        LoadOptions {
            quantize: self.quantize,
            layout: self.layout,
            skip_layers: self.skip_layers.clone(),
            keep: self.keep.clone(),
            int8_head: self.int8_head,
            ..LoadOptions::default()
        }
    }
}

#[derive(Args)]
pub struct Experts {
    /// Run the experts that a token chooses one after the other: slower, and there to measure by how much.
    #[arg(long)]
    no_fused_moe: bool,
    /// Run them in one fused op, which is the default.
    #[arg(long = "use-fused-moe", conflicts_with = "no_fused_moe")]
    _use_fused_moe: bool,
}

impl Arguments {
    /// What messages call the model.
    pub fn name(&self) -> &str {
        self.model.as_deref().unwrap_or("demo model")
    }

    /// Fetches the model where it has to be, loads it, makes its cache, and says what the user should know; tells how long loading
    /// took, without the download.
    pub fn load(&self, cache: &cache::Arguments) -> anyhow::Result<(Pipeline, Duration)> {
        let mut options = self.load_options();
        cache.apply(&mut options)?;
        self.start()?;
        let device = self.device()?;
        let files = self.files()?;
        options.base = self.base(&files)?;
        let start = Instant::now();
        let (pipeline, report) = Pipeline::from_files(&files, &options, &device)?;
        let elapsed = start.elapsed();
        tracing::info!(
            model = self.name(),
            seconds = elapsed.as_secs_f32(),
            resident = mib(memory::resident()),
            "loaded {}",
            report.to_string().lines().next().unwrap_or_default()
        );
        if self.weights.quantize.is_some() && report.quantized.tensors == 0 {
            say(
                "note: --quantize found nothing to do: the weights are 4-bit already; give the floating-point original",
            );
        }
        // The first line counts tensors; the others say what stays in floating point, and warn.
        let report = report.to_string();
        report.lines().skip(1).for_each(say);
        Ok((pipeline, elapsed))
    }

    /// Starts the threads that were asked for.
    pub fn start(&self) -> anyhow::Result<Arc<Executor>> {
        Ok(Executor::start(self.threads)?)
    }

    fn arithmetic(&self) -> Arithmetic {
        match self.exact {
            true => Arithmetic::Exact,
            false => Arithmetic::W4A8,
        }
    }

    /// The model's files, fetched first where they have to be.
    pub fn files(&self) -> anyhow::Result<ModelFiles> {
        match &self.model {
            Some(model) => find(model, self.refresh),
            None => Ok(demo::files()?),
        }
    }

    /// The files of the base that was asked for, of a repository those that hold what `files` lack.
    pub fn base(&self, files: &ModelFiles) -> anyhow::Result<Option<ModelFiles>> {
        self.weights.base(files, self.refresh)
    }

    /// What was asked for but the base, which [`base`](Self::base) finds.
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            arithmetic: self.arithmetic(),
            separate_experts: self.experts.no_fused_moe,
            activations: self.activations,
            ..self.weights.options()
        }
    }

    pub fn device(&self) -> anyhow::Result<Device> {
        Ok(self.device.open()?)
    }
}

/// A help text with the names of places.
pub fn places(text: &str) -> String {
    format!("{text}: {}", Place::NAMES.join(", "))
}

fn activations(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

/// The files of a folder, or of a repository, which are fetched into the hub's cache first.
pub fn find(model: &str, refresh: bool) -> anyhow::Result<ModelFiles> {
    let folder = match ModelSource::parse(model)? {
        ModelSource::Folder(folder) => folder,
        ModelSource::Repo(repo) => fetched(refresh, |settings, bar| hub::fetch(&repo, settings, bar))?,
    };
    Ok(ModelFiles::folder(folder))
}

/// What `fetch` brings with the environment's settings, and a bar.
fn fetched(
    refresh: bool,
    fetch: impl FnOnce(&HubSettings, &mut DownloadBar) -> candle_mmfp4::Result<PathBuf>,
) -> anyhow::Result<PathBuf> {
    let mut settings = HubSettings::from_env()?;
    settings.refresh = refresh;
    let mut bar = DownloadBar::new(settings.progress_bars);
    Ok(fetch(&settings, &mut bar)?)
}
