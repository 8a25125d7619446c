//! From text to tokens and back: everything about generation that does not need the model.
//!
//! A prompt passes through [`ChatTemplate`] and [`Tokenizer`]; a row of logits through [`Sampler`];
//! the ids that come out through [`Detokenizer`], [`StopStrings`] and [`OutputParser`], each of which
//! takes one piece at a time and gives the same result wherever the stream is cut.

mod chat;
mod config;
mod detokenize;
mod jinja;
mod output;
mod python;
mod random;
mod sampling;
mod softmax;
mod stop;
mod tokenizer;

pub use chat::{ChatTemplate, Content, FunctionCall, Message, RenderOptions, ToolCall};
pub use config::GenerationConfig;
pub use detokenize::Detokenizer;
pub use output::{OutputEvent, OutputParser};
pub use sampling::{History, Sampled, Sampler, Sampling};
pub use stop::{StopProgress, StopStrings};
pub use tokenizer::Tokenizer;
