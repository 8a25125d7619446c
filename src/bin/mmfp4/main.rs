//! `mmfp4`: generate text with 4-bit models, make them, and measure their speed and what 4 bits cost.

mod bench;
mod cache;
mod demo;
mod doctor;
mod documents;
mod generate;
mod inspect;
mod model;
mod output;
mod perplexity;
mod progress;
mod prompt;
mod quantize;
mod trace;
mod validate;

use clap::{ArgAction, Parser, Subcommand};
use std::process::ExitCode;

const FORMATS: &str = "\
Formats (to quantise to; a checkpoint that is in one of them already needs none):
  mmfp4  4.125 bits a weight. The one to choose: the smallest, and as exact as nvfp4.
  nvfp4  4.5 bits a weight. As exact; for comparison with NVIDIA's checkpoints.
  mxfp4  4.25 bits a weight. Loses about four times as much: only for what exists in it already.";

const EXAMPLES: &str = "\
Examples:
  mmfp4 generate
  mmfp4 generate -m zai-org/GLM-4.7-Flash --quantize mmfp4 -p \"Why is the sky blue?\"
  git diff | mmfp4 generate --system \"Write a commit message.\" --max-tokens 100
  mmfp4 bench --synthetic slice
  mmfp4 perplexity book.txt -m path/to/model
  mmfp4 validate path/to/bf16-model mmfp4
  mmfp4 quantize zai-org/GLM-4.7-Flash GLM-4.7-Flash-MMFP4
  mmfp4 inspect path/to/model
  mmfp4 doctor

Without --model all of it runs on a small demo model that is part of this program and answers questions about Rust.
`mmfp4 help COMMAND` tells more.";

/// 4-bit floating-point (FP4) models: make them, generate text, measure speed and quality.
#[derive(Parser)]
#[command(version, after_help = format!("{FORMATS}\n\n{EXAMPLES}"), max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Say how long each layer takes (-vv: each op) and how much memory; RUST_LOG chooses otherwise.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    Generate(Box<generate::Arguments>),
    Bench(Box<bench::Arguments>),
    Perplexity(perplexity::Arguments),
    Validate(validate::Arguments),
    Quantize(quantize::Arguments),
    Inspect(inspect::Arguments),
    Doctor(doctor::Arguments),
}

fn succeed((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = trace::init(arguments.verbose).and_then(|()| match arguments.command {
        Command::Generate(arguments) => generate::run(&arguments).map(succeed),
        Command::Bench(arguments) => bench::run(&arguments).map(succeed),
        Command::Perplexity(arguments) => perplexity::run(&arguments).map(succeed),
        Command::Validate(arguments) => validate::run(&arguments).map(succeed),
        Command::Quantize(arguments) => quantize::run(&arguments).map(succeed),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
    });
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    if output::is_closed_pipe(&error) {
        // Whoever read has read enough (`| head`).
        return ExitCode::SUCCESS;
    }
    output::say(format!("error: {error:#}"));
    match error.is::<output::Usage>() {
        true => ExitCode::from(2),
        false => ExitCode::FAILURE,
    }
}
