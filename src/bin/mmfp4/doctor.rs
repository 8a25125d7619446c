//! `mmfp4 doctor`: what this machine is, and whether the kernels compute here what they should.

use crate::model;
use crate::output::{print_json, say};
use candle_mmfp4::Place;
use candle_mmfp4::checkpoint::ModelFiles;
use candle_mmfp4::checkpoint::hub::{self, HubSettings, ModelSource, Plan, Progress};
use candle_mmfp4::doctor::requirements::{CONTEXTS, Needs};
use candle_mmfp4::doctor::{Check, Options, Status, examine};
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::models::glm4_moe_lite::Config;
use serde_json::Value;
use std::io::Write;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Each line is ok, a warning (it works, but worse than it could) or wrong; below it stands what to do. Where something \
is wrong the program ends with 1. Speeds are worth what the machine was idle.

Examples:
  mmfp4 doctor
  mmfp4 doctor --json > doctor.json
  mmfp4 doctor -m path/to/model --context 32768 --kv-cache fp8";

/// Examine this machine: what it is, which kernels it runs, whether they compute what they should, and how fast.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Whose kernels.
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        help = model::places("Whose kernels, auto being the CPU's and, on a Mac, the GPU's")
    )]
    device: Place,
    /// A model that is to fit in memory: a folder, or a repository, of which no weights are fetched [default:
    /// GLM-4.7-Flash in MMFP4].
    #[arg(short, long, value_name = "FOLDER|REPO")]
    model: Option<String>,
    /// Tokens that the model's cache is to hold.
    #[arg(long, value_name = "TOKENS", default_value_t = CONTEXTS[0])]
    context: usize,
    /// What that cache stores: f16, bf16, fp8, fp4 (fp4-16, fp4-16-rotated, fp4-32, fp4-32-rotated) or contiguous.
    #[arg(long, value_name = "FORMAT", default_value_t)]
    kv_cache: CacheKind,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Gives the exit code, too.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let model = match &arguments.model {
        Some(model) => Some(needs(model)?),
        None => None,
    };
    let options = Options {
        place: arguments.device,
        model,
        context: arguments.context,
        kv_cache: arguments.kv_cache,
    };
    let mut out = std::io::stdout();
    let mut written = Ok(());
    let report = examine(&options, |check| {
        // Nobody waits for a minute without a word.
        if !arguments.json && written.is_ok() {
            written = writeln!(out, "{}", line(check));
        }
    })?;
    written?;
    match arguments.json {
        true => print_json(&report)?,
        false => say(summary(&report.checks)),
    }
    Ok(match report.is_wrong() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// What a model takes. Of a repository that is not in the cache whole, the sizes that the hub states count: those of all
/// tensors in its files, also of layers that no one loads.
fn needs(model: &str) -> anyhow::Result<Needs> {
    let folder = match ModelSource::parse(model)? {
        ModelSource::Folder(folder) => folder,
        ModelSource::Repo(repo) => {
            let mut sizes = Sizes(None);
            let fetched = hub::fetch(&repo, &HubSettings::from_env()?, &mut sizes);
            match (sizes.0, fetched) {
                (Some((Value::Null, _)), _) => anyhow::bail!(
                    "{model}: a GGUF model's dimensions are in the file itself, which is not in the cache; fetch it first \
                     (mmfp4 generate -m {model})"
                ),
                (Some((config, weights)), _) => {
                    return Ok(Needs::new(model, &Config::from_json(&config)?, weights));
                }
                (None, fetched) => fetched?,
            }
        }
    };
    Ok(Needs::of_files(model, &ModelFiles::folder(folder))?)
}

/// Ends a download before it begins, when its sizes are known.
struct Sizes(Option<(Value, u64)>);

impl Progress for Sizes {
    fn start(&mut self, plan: &Plan) -> candle_mmfp4::Result<()> {
        self.0 = Some((plan.config().clone(), plan.weights()));
        Err(candle_mmfp4::Error::Hub {
            repo: plan.repo.to_string(),
            problem: "only its sizes were asked for".into(),
            remedy: String::new(),
        })
    }
}

/// The width of the names, of which the longest are kernels'.
const NAME: usize = 52;

fn line(check: &Check) -> String {
    let status = word(check.status);
    let mut text = format!("{status:<7}  {:<NAME$}  {}", check.name, check.found);
    if !check.advice.is_empty() {
        text += &format!("\n{:9}{}", "", check.advice);
    }
    text
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Warning => "warning",
        Status::Wrong => "wrong",
    }
}

fn summary(checks: &[Check]) -> String {
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    format!(
        "{} checks: {} ok, {} warnings, {} wrong",
        checks.len(),
        count(Status::Ok),
        count(Status::Warning),
        count(Status::Wrong)
    )
}
