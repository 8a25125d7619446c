//! `mmfp4 generate`: text from a prompt.

use crate::output::{Usage, mib, print_json, say};
use crate::trace::{self, Spans};
use crate::{FORMATS, cache, demo, model, prompt};
use candle_mmfp4::Error;
use candle_mmfp4::generation::{
    Event, FinishReason, Message, Options, OutputEvent, OutputParser, Pipeline, RenderOptions, Sampling,
    Statistics,
};
use candle_mmfp4::memory::{self, MemoryLog};
use candle_mmfp4::models::{Phase, Profile, ProfileReport};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::io::Write;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  mmfp4 generate -p \"What does `Vec::push` do?\"
  mmfp4 generate -m path/to/model --temperature 0.7 --top-p 0.95 --seed 1 -p \"Tell me a story.\"
  mmfp4 generate -m zai-org/GLM-4.7-Flash --quantize mmfp4 --thinking -p \"Is 91 a prime number?\"
  cat notes.txt | mmfp4 generate --system \"Summarise.\"
  mmfp4 generate --raw -p \"fn main() {\" --max-tokens 40
  mmfp4 generate --json --logprobs 3 | jq .text";

/// Generate text: it goes to stdout as it comes, a line of statistics to stderr.
#[derive(clap::Args)]
#[command(after_help = format!("{FORMATS}\n\n{EXAMPLES}"))]
pub struct Arguments {
    /// What to say to the model; `-`, or something piped in and no --prompt, is standard input
    /// [default: a question for the demo model].
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Continue the prompt as it is, instead of answering it as a turn of a chat.
    #[arg(long, conflicts_with_all = ["system", "thinking"])]
    raw: bool,
    /// What the model is told before the prompt.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Let the model think before it answers.
    #[arg(long)]
    thinking: bool,
    /// Print one JSON object at the end: text, tokens, why it ended, statistics, reasoning, tool calls.
    #[arg(long)]
    json: bool,
    /// The most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// End at this text, which is not printed; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    model: model::Arguments,
    #[command(flatten)]
    cache: cache::Arguments,
    /// Compute everything anew for each token: slow, with the same text.
    #[arg(long, help_heading = "Diagnosis")]
    no_cache: bool,
    /// Search every op's output for NaN and infinity, and end with the first layer and op that has one.
    #[arg(long, help_heading = "Diagnosis")]
    check_nan: bool,
    /// Tell where the time went: a table of ops and one of layers; with --json as `profile`.
    #[arg(long, help_heading = "Diagnosis")]
    profile: bool,
    /// Tell how much memory is taken at the start, after loading, after the prompt and at the end.
    #[arg(long, help_heading = "Diagnosis")]
    log_memory: bool,
}

/// Where nothing is given, the model's generation_config.json decides.
#[derive(clap::Args)]
#[command(next_help_heading = "Sampling (defaults are the model's own)")]
struct SamplingArguments {
    /// 0 always takes the most probable token.
    #[arg(short, long, value_name = "T")]
    temperature: Option<f32>,
    /// Choose among the K most probable tokens; 0 among all.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the fewest tokens whose probabilities sum to P.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among tokens at least P times as probable as the most probable one.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Make what stands in the prompt or the text less probable; 1 is off.
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Subtract from the logits of tokens that stand in the text.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtract from the logits of tokens for each time they stand in the text.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Report each token's log-probability, and those of the N most probable ones.
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
}

impl SamplingArguments {
    fn apply(&self, sampling: &mut Sampling) -> anyhow::Result<()> {
        fn set<T: Copy>(field: &mut T, given: Option<T>) {
            *field = given.unwrap_or(*field);
        }
        set(&mut sampling.temperature, self.temperature);
        set(&mut sampling.top_k, self.top_k);
        set(&mut sampling.top_p, self.top_p);
        set(&mut sampling.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, self.repetition_penalty);
        set(&mut sampling.presence_penalty, self.presence_penalty);
        set(&mut sampling.frequency_penalty, self.frequency_penalty);
        set(&mut sampling.top_logprobs, self.logprobs);
        sampling.seed = self.seed;
        sampling.validate().map_err(|error| Usage(error.to_string()))?;
        let narrows = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        if narrows && sampling.temperature == 0.0 {
            say("note: --top-k, --top-p and --min-p do nothing at temperature 0; add --temperature 1");
        }
        Ok(())
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // What is wrong with the command line should not wait for a model.
    arguments.sampling.apply(&mut Sampling::default())?;
    arguments.cache.check()?;
    let text = prompt::prompt(arguments.prompt.as_deref(), demo::QUESTION)?;
    let mut log = MemoryLog::new(&arguments.model.device()?);
    log.record("start");
    let (pipeline, load) = arguments.model.load(&arguments.cache)?;
    log.record("model loaded");

    let prompt = tokens(arguments, &pipeline, &text)?;
    let mut options = pipeline.options();
    options.max_tokens = Some(arguments.max_tokens);
    options.stop = arguments.stop.clone();
    options.use_cache = !arguments.no_cache;
    options.check_finite = arguments.check_nan;
    arguments.sampling.apply(&mut options.sampling)?;
    let profile = arguments
        .profile
        .then(|| RefCell::new(Profile::new(pipeline.model().device())));
    let mut finished = generate(
        arguments,
        &pipeline,
        &prompt,
        &options,
        &mut log,
        profile.as_ref(),
    )?;
    finished.profile = profile.map(|profile| profile.into_inner().report());

    let statistics = finished.statistics;
    say(format!(
        "loaded in {:.2} s; prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s; peak memory {}",
        load.as_secs_f64(),
        statistics.prompt_tokens,
        statistics.prefill_rate(),
        statistics.generated_tokens,
        statistics.decode_rate(),
        mib(memory::peak_resident()),
    ));
    if arguments.log_memory {
        say(&log);
    }
    if let Some(profile) = finished.profile.as_ref().filter(|_| !arguments.json) {
        say(profile);
    }
    if arguments.json {
        let opened = pipeline.tokenizer().token_id("<think>");
        let thinks = opened.is_some() && prompt.last().copied() == opened;
        return print_json(&finished.to_json(arguments, load, thinks));
    }
    Ok(())
}

fn tokens(arguments: &Arguments, pipeline: &Pipeline, text: &str) -> anyhow::Result<Vec<u32>> {
    if arguments.raw {
        return Ok(pipeline.tokenizer().encode(text)?);
    }
    let system = arguments
        .system
        .iter()
        .map(|text| Message::new("system", text.as_str()));
    let messages: Vec<_> = system.chain([Message::new("user", text)]).collect();
    let render = RenderOptions {
        enable_thinking: Some(arguments.thinking),
        ..RenderOptions::default()
    };
    pipeline
        .chat_prompt(&messages, &render)
        .map_err(|error| match error {
            Error::Template(_) => anyhow::anyhow!("{error} (--raw does without a template)"),
            other => other.into(),
        })
}

/// All that a generation gave.
struct Finished {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<Value>,
    reason: FinishReason,
    statistics: Statistics,
    profile: Option<ProfileReport>,
}

fn generate(
    arguments: &Arguments,
    pipeline: &Pipeline,
    prompt: &[u32],
    options: &Options,
    log: &mut MemoryLog,
    profile: Option<&RefCell<Profile>>,
) -> anyhow::Result<Finished> {
    let mut out = std::io::stdout().lock();
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    let mut write = |piece: &str| -> std::io::Result<()> {
        text.push_str(piece);
        if arguments.json {
            return Ok(());
        }
        out.write_all(piece.as_bytes())?;
        out.flush()
    };
    let mut events = pipeline.generate(prompt, options)?;
    if trace::is_wanted() || profile.is_some() {
        let mut spans = trace::is_wanted().then(Spans::default);
        events = events.observe(move |site, _, output| {
            if let Some(profile) = profile {
                profile.borrow_mut().see(site)?;
            }
            if let Some(spans) = &mut spans {
                spans.see(site, output);
            }
            Ok(())
        });
    }
    loop {
        if let Some(profile) = profile {
            // All passes until the first token are the prompt's.
            let phase = match tokens.is_empty() {
                true => Phase::Prompt,
                false => Phase::Generation,
            };
            profile.borrow_mut().begin(phase);
        }
        let Some(event) = events.next() else { break };
        match event? {
            Event::Prefill { done, total } => tracing::info!(done, total, "prefill"),
            Event::Token {
                id,
                text,
                logprob,
                top,
            } => {
                write(&text)?;
                if arguments.sampling.logprobs.is_some() {
                    let entry = |id: u32, logprob: f32| -> anyhow::Result<Value> {
                        let token = pipeline.tokenizer().decode(&[id], false)?;
                        Ok(json!({ "id": id, "token": token, "logprob": logprob }))
                    };
                    let mut value = entry(id, logprob)?;
                    let top = top.iter().map(|&(id, logprob)| entry(id, logprob));
                    value["top"] = top.collect::<anyhow::Result<_>>()?;
                    logprobs.push(value);
                }
                if tokens.is_empty() {
                    log.record("prompt computed");
                }
                tokens.push(id);
            }
            Event::Finished {
                reason,
                text: rest,
                statistics,
            } => {
                write(&rest)?;
                log.record("finished");
                if !arguments.json {
                    writeln!(out)?;
                }
                return Ok(Finished {
                    text,
                    tokens,
                    logprobs,
                    reason,
                    statistics,
                    profile: None,
                });
            }
        }
    }
    anyhow::bail!("the generation ended without a reason")
}

impl Finished {
    fn to_json(&self, arguments: &Arguments, load: Duration, thinks: bool) -> Value {
        let mut parser = OutputParser::new(thinks, None);
        let mut said = parser.push(&self.text);
        said.extend(parser.finish());
        let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        for event in said {
            match event {
                OutputEvent::Reasoning(text) => reasoning.push_str(&text),
                OutputEvent::Content(text) => content.push_str(&text),
                OutputEvent::ToolCall { name, arguments } => {
                    calls.push(json!({ "name": name, "arguments": arguments }));
                }
            }
        }
        let statistics = &self.statistics;
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| object.insert(name.into(), value);
        put("model", arguments.model.name().into());
        put("text", self.text.as_str().into());
        put("reasoning", reasoning.into());
        put("content", content.into());
        put("tool_calls", calls.into());
        put("tokens", self.tokens.as_slice().into());
        if arguments.sampling.logprobs.is_some() {
            put("logprobs", self.logprobs.as_slice().into());
        }
        let reason = match self.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        };
        put("reason", reason.into());
        put(
            "statistics",
            json!({
                "load_seconds": load.as_secs_f64(),
                "prompt_tokens": statistics.prompt_tokens,
                "prefill_seconds": statistics.prefill.as_secs_f64(),
                "prefill_tokens_per_second": statistics.prefill_rate(),
                "generated_tokens": statistics.generated_tokens,
                "decode_seconds": statistics.decode.as_secs_f64(),
                "decode_tokens_per_second": statistics.decode_rate(),
                "peak_memory_bytes": memory::peak_resident(),
            }),
        );
        if let Some(profile) = &self.profile {
            put("profile", json!(profile));
        }
        Value::Object(object)
    }
}
