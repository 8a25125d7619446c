//! `mmfp4 bench`: how fast a model is, beside how fast this machine can read it.

mod fit;
mod measure;
mod report;
mod row;
mod test;

use crate::output::{Usage, print_json, say};
use crate::{cache, model, progress};
use anyhow::Context;
use candle_mmfp4::checkpoint::{Checkpoint, ModelFiles, Synthetic};
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::models::glm4_moe_lite::Config;
use candle_mmfp4::nn::CacheSize;
use row::{Outcome, Row};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use test::Test;

/// Set by programs that run commands unattended, for whom minutes at full load are no use.
const TASK_MODE: &str = "ALPHAHENG_TASK_MODE";

const EXAMPLES: &str = "\
Rows:
  pp  prompt processing: all tokens of a prompt, in chunks of 512, behind DEPTH cached tokens.
  tg  text generation: one token after the other, behind DEPTH cached tokens. The depths of a cache take turns in one \
process, which fills it once.
  load, first_prompt, first_decode: loading, and then the first single token of a prompt and the first one after it, \
in a process that has computed nothing before; later_prompt, later_decode: the same again, as the median.

Each test runs in a process of its own, after its files have been read once. The median of the repetitions counts; the \
spread is the largest less the smallest, as a share of it. Bytes are those of the weights that the tokens read at \
least: each weight once a pass, of the experts as many as the tokens choose if no two choose alike; the cache is told \
apart. The bandwidth is that of plain loads of the same weights by the same threads, 256 MB at a time between \
repetitions. Where it spreads by more than 15 %, other programs disturbed the run, and the row is marked noisy.

Where depth 0 is among those of tg, a second table tells for the others their speed as a share of depth 0's, and how far \
they are from what the machine allows at best: the time at depth 0, and the larger of what the cache's bytes take at the \
bandwidth and attention's products at the peak of float products (of BF16 where there are instructions for them) measured \
between repetitions, too.

Examples:
  mmfp4 bench
  mmfp4 bench --synthetic slice -p 128,512 -n 64
  mmfp4 bench -m path/to/model -p 512 -n 32 -d 0,1024,4096 --json > speed.json
  mmfp4 bench --synthetic slice -p 0 -n 32 -d 0,1024,4096 --kv-cache bf16,fp8,fp4
  mmfp4 bench --synthetic slice -p 0 --no-fused-moe";

/// Measure speed: prompts, generation and latency, beside what this machine's memory allows.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Tokens of a prompt, a test each; 0 for none.
    #[arg(
        short,
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "128,512"
    )]
    prompt_tokens: Vec<usize>,
    /// Tokens to generate, a test each; 0 for none.
    #[arg(
        short = 'n',
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "64"
    )]
    generate_tokens: Vec<usize>,
    /// Tokens that the cache holds before each test.
    #[arg(
        short,
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "0"
    )]
    depth: Vec<usize>,
    /// How often each test is repeated; one more comes first and does not count.
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Print a JSON array of all rows.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// After the repetitions of pp and tg run one more, and tell where its time went, by op and by layer.
    #[arg(long, conflicts_with = "csv")]
    profile: bool,
    /// Print all rows as CSV.
    #[arg(long)]
    csv: bool,
    /// What the cache of keys and values stores, each test once with each: f16, bf16, fp8, fp4 (fp4-16, fp4-16-rotated,
    /// fp4-32, fp4-32-rotated) or contiguous.
    #[arg(long, value_name = "FORMAT", value_delimiter = ',', default_values_t = [CacheKind::default()])]
    kv_cache: Vec<CacheKind>,
    #[command(flatten)]
    memory: cache::Memory,
    #[command(flatten)]
    model: model::Arguments,
    /// A model of random weights, made where it is not there: glm-4.7-flash (16 GB), or slice, its first four layers
    /// with the whole vocabulary (2 GB). With -bf16-head after the name its output head is in BF16.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "quantize"], help_heading = "Model")]
    synthetic: Option<Synthetic>,
    /// Where the model of random weights lies [default: target/synthetic/NAME].
    #[arg(long, value_name = "FOLDER", requires = "synthetic", help_heading = "Model")]
    synthetic_dir: Option<PathBuf>,
    /// Which of the tests this process, started by another, measures.
    #[arg(long, hide = true)]
    one: Option<usize>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(index) = arguments.one {
        let tests = arguments.tests();
        let test = tests.get(index).context("no such test")?;
        return measure_here(arguments, test);
    }
    if std::env::var_os(TASK_MODE).is_some_and(|value| value == "1") {
        say(format!(
            "{TASK_MODE}=1: the benchmark is skipped, and nothing is loaded"
        ));
        return match arguments.json {
            true => print_json(&json!([])),
            false => Ok(()),
        };
    }
    let tests = arguments.tests();
    let files = arguments.files()?;
    let config = Config::from_files(&files)?;
    let weights = Checkpoint::from_files(&files)?;
    arguments.check(&tests, &config, &weights)?;
    let mut rows = Vec::new();
    for (index, test) in tests.iter().enumerate() {
        say(format!("{test} ({} of {})", index + 1, tests.len()));
        read_once(&weights)?;
        rows.extend(measure_elsewhere(index, test)?);
    }
    say(report::table(&rows));
    if let Some(table) = report::depths(&rows) {
        say(format!("\n{table}"));
    }
    for (row, profile) in rows.iter().filter_map(|row| Some((row, row.profile.as_ref()?))) {
        say(format!("\n{}\n{profile}", report::name(row)));
    }
    match (arguments.json, arguments.csv) {
        (true, _) => print_json(&rows),
        (_, true) => report::print_csv(&rows),
        _ => Ok(()),
    }
}

impl Arguments {
    fn tests(&self) -> Vec<Test> {
        test::plan(
            &self.kv_cache,
            &self.prompt_tokens,
            &self.generate_tokens,
            &self.depth,
        )
    }

    /// What rows call the model.
    fn name(&self) -> &str {
        match &self.synthetic {
            Some(synthetic) => synthetic.name(),
            None => self.model.name(),
        }
    }

    fn files(&self) -> anyhow::Result<ModelFiles> {
        let Some(synthetic) = &self.synthetic else {
            return self.model.files();
        };
        let folder = self.synthetic_dir.clone().unwrap_or_else(|| {
            let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
            target.join("synthetic").join(synthetic.name())
        });
        let bar = progress::writing(&format!("writing {}", folder.display()));
        synthetic.ensure(&folder, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        Ok(ModelFiles::folder(folder))
    }

    /// The cache of a test: as large as was said, or as the test needs.
    fn size(&self, test: &Test) -> anyhow::Result<CacheSize> {
        let said = self.memory.size(test.cache)?;
        Ok(said.unwrap_or(CacheSize::Tokens(test.room())))
    }

    /// Refuses what cannot run before anything does.
    fn check(&self, tests: &[Test], config: &Config, weights: &Checkpoint) -> anyhow::Result<()> {
        let stored = weights
            .tensors()
            .map(|(_, tensor)| tensor.bytes.len() as u64)
            .sum();
        let options = self.model.load_options();
        for test in tests {
            let needs = fit::Needs::of(config, stored, &options, test, self.size(test)?)?;
            let (longest, limit) = (test.longest(), config.max_position_embeddings);
            if longest > limit {
                let problem = format!("{test}: {longest} tokens do not fit the model's context of {limit}");
                return Err(Usage(problem).into());
            }
            needs.check(test, candle_mmfp4::memory::available())?;
        }
        Ok(())
    }
}

/// Reads the model's files, so that the process to come finds them in memory.
fn read_once(weights: &Checkpoint) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    // What is in memory is no file.
    for path in weights.files().iter().filter(|path| path.exists()) {
        let reading = || format!("{} cannot be read", path.display());
        let mut file = std::fs::File::open(path).with_context(reading)?;
        while file.read(&mut buffer).with_context(reading)? > 0 {}
    }
    Ok(())
}

/// Runs `test`, the one at `index`, in a process of its own, with this one's arguments.
fn measure_elsewhere(index: usize, test: &Test) -> anyhow::Result<Vec<Row>> {
    let program = std::env::current_exe().context("the program does not find itself")?;
    let output = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .args(["--one", &index.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{} cannot be started", Path::new(&program).display()))?;
    if !output.status.success() {
        anyhow::bail!("the process that measured {test} ended early: {}", output.status);
    }
    match serde_json::from_slice(&output.stdout)? {
        Outcome::Rows(rows) => Ok(rows),
        Outcome::Failed(problem) => anyhow::bail!("{test}: {problem}"),
    }
}

/// Measures `test` and hands the result, or the error, to the process that asked.
fn measure_here(arguments: &Arguments, test: &Test) -> anyhow::Result<()> {
    let outcome = match measure::measure(arguments, test) {
        Ok(rows) => Outcome::Rows(rows),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    print_json(&outcome)
}
