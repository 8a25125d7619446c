//! From text to text.
//!
//! [`Pipeline`] holds a model and all it needs to speak; [`Generation`] is an iterator over what happens. On
//! the way a prompt passes through [`ChatTemplate`] and [`Tokenizer`]; a row of logits through [`Sampler`];
//! the ids that come out through [`Detokenizer`], [`StopStrings`] and [`OutputParser`], each of which
//! takes one piece at a time and gives the same result wherever the stream is cut.

mod calibration;
mod chat;
mod config;
mod detokenize;
mod generate;
mod jinja;
mod output;
mod perplexity;
mod pipeline;
mod python;
mod sampling;
mod session;
mod softmax;
mod stop;
mod tokenizer;

pub use calibration::calibration_windows;
pub use chat::{ChatTemplate, Content, FunctionCall, Message, RenderOptions, ToolCall};
pub use config::GenerationConfig;
pub use detokenize::Detokenizer;
pub use generate::{Cancel, Event, FinishReason, Generation, Options, Output, Statistics};
pub use output::{OutputEvent, OutputParser};
pub use perplexity::{Perplexity, Windows};
pub use pipeline::Pipeline;
pub use sampling::{History, Sampled, Sampler, Sampling};
pub use session::Session;
pub use stop::{StopProgress, StopStrings};
pub use tokenizer::Tokenizer;
