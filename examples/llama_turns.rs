//! A conversation on candle-transformers' llama, turn by turn, with its cache used in three ways:
//!
//! - `new cache`: made anew each turn, the whole conversation recomputed (the usual workaround);
//! - `continued`: the cache kept, only what it lacks computed, at its offset;
//! - `from 0`: the cache kept, but the conversation so far passed as a new one, at position 0. The released
//!   crate (0.11.1) fails with `cannot broadcast ...`; with the patches in patches/ it is right.
//!
//! ```text
//! cargo run --release --features candle-transformers --example llama_turns [-- FOLDER]
//! ```
//!
//! Then, in a small model of one's own, this crate's masks and cache: the same conversation whole, in chunks and
//! turn by turn gives the same numbers, and position 0 begins anew.
//!
//! FOLDER holds a llama checkpoint (config.json, *.safetensors, tokenizer.json); without it the weights and
//! the questions are random. All of it runs on the CPU in F32, and builds on both crates.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_mmfp4::nn::{Mask, TokenCache};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig, LlamaEosToks};
use tokenizers::Tokenizer;

const ANSWER_TOKENS: usize = 24;
const QUESTIONS: [&str; 4] = [
    "User: Name three rivers of Europe that are longer than a thousand kilometres.\nAssistant:",
    "\nUser: Which of them is the longest, and which countries does it cross?\nAssistant:",
    "\nUser: Where does it end?\nAssistant:",
    "\nUser: Tell me about the towns on its banks that a traveller should know.\nAssistant:",
];

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1);
    candle_transformers_llama(folder.as_deref().map(Path::new))?;
    own_model()
}

/// The three ways side by side.
fn candle_transformers_llama(folder: Option<&Path>) -> Result<()> {
    let model = match folder {
        Some(folder) => Model::open(folder)?,
        None => Model::random()?,
    };
    let mut conversations = [
        Conversation::new(&model, Way::NewCache)?,
        Conversation::new(&model, Way::Continued)?,
        Conversation::new(&model, Way::FromZero)?,
    ];
    println!("turn  cache      tokens run before the answer     time  per token  answer");
    for (turn, text) in QUESTIONS.iter().enumerate() {
        let question = model.tokens(text, turn)?;
        let mut answers: Vec<Vec<u32>> = vec![];
        for conversation in &mut conversations {
            print!("{:>4}  {:<9}  ", turn + 1, conversation.way.name());
            match conversation.turn(&question) {
                Err(error) => {
                    let error = error.to_string();
                    println!("failed: {}", error.lines().next().unwrap_or_default());
                }
                Ok(turn) => {
                    let agrees = match answers.first() {
                        None => "",
                        Some(first) if *first == turn.answer => "the same",
                        Some(_) => "DIFFERS",
                    };
                    let (before, of) = (turn.run, turn.conversation);
                    let (first, next) = (turn.to_first, turn.per_token);
                    println!("{before:>8} of {of:<8} {first:>16.1} ms  {next:>6.2} ms  {agrees}");
                    answers.push(turn.answer);
                }
            }
        }
        if let (Some(tokenizer), Some(answer)) = (&model.tokenizer, answers.first()) {
            let answer = tokenizer
                .decode(answer, true)
                .map_err(anyhow::Error::from_boxed)?;
            println!("{}{answer}\n", text.trim_start());
        }
    }
    Ok(())
}

/// How the cache is used from turn to turn.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    NewCache,
    Continued,
    FromZero,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::NewCache => "new cache",
            Self::Continued => "continued",
            Self::FromZero => "from 0",
        }
    }
}

/// One conversation, with its cache.
struct Conversation<'a> {
    model: &'a Model,
    way: Way,
    tokens: Vec<u32>,
    cache: Cache,
    /// How many of the tokens the cache holds: all but the last of an answer.
    cached: usize,
    /// The released crate cannot go on after an error: the layers' caches differ.
    broken: bool,
}

/// What a turn took, in tokens and milliseconds.
struct Turn {
    answer: Vec<u32>,
    run: usize,
    conversation: usize,
    to_first: f64,
    per_token: f64,
}

impl<'a> Conversation<'a> {
    fn new(model: &'a Model, way: Way) -> Result<Self> {
        Ok(Self {
            model,
            way,
            tokens: vec![],
            cache: model.cache()?,
            cached: 0,
            broken: false,
        })
    }

    fn turn(&mut self, question: &[u32]) -> Result<Turn> {
        ensure!(!self.broken, "given up");
        self.broken = true;
        self.tokens.extend(question);
        let start = Instant::now();
        match self.way {
            Way::NewCache => (self.cache, self.cached) = (self.model.cache()?, 0),
            Way::Continued => (),
            Way::FromZero => self.cached = 0,
        }
        let (conversation, run) = (self.tokens.len(), self.tokens.len() - self.cached);
        self.step()?;
        let to_first = start.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        while self.tokens.len() < conversation + ANSWER_TOKENS && !self.model.is_end(self.tokens.last()) {
            self.step()?;
        }
        let answer = self.tokens[conversation..].to_vec();
        let steps = (answer.len() - 1).max(1) as f64;
        let per_token = start.elapsed().as_secs_f64() * 1e3 / steps;
        self.broken = false;
        Ok(Turn {
            answer,
            run,
            conversation,
            to_first,
            per_token,
        })
    }

    /// Runs what the cache lacks and adds the most likely next token.
    fn step(&mut self) -> Result<()> {
        let input = Tensor::new(&self.tokens[self.cached..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.llama.forward(&input, self.cached, &mut self.cache)?;
        self.cached = self.tokens.len();
        self.tokens.push(logits.i(0)?.argmax(0)?.to_scalar()?);
        Ok(())
    }
}

struct Model {
    llama: Llama,
    config: Config,
    tokenizer: Option<Tokenizer>,
}

impl Model {
    fn open(folder: &Path) -> Result<Self> {
        let config = folder.join("config.json");
        let config = std::fs::read(&config).with_context(|| config.display().to_string())?;
        let config = serde_json::from_slice::<LlamaConfig>(&config)?.into_config(false);
        let mut tensors = HashMap::new();
        for file in std::fs::read_dir(folder)? {
            let file = file?.path();
            if file
                .extension()
                .is_some_and(|extension| extension == "safetensors")
            {
                tensors.extend(candle_core::safetensors::load(file, &Device::Cpu)?);
            }
        }
        ensure!(!tensors.is_empty(), "{}: no *.safetensors", folder.display());
        let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"));
        let tokenizer = tokenizer.map_err(anyhow::Error::from_boxed)?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(Self {
            llama: Llama::load(vb, &config)?,
            config,
            tokenizer: Some(tokenizer),
        })
    }

    fn random() -> Result<Self> {
        let config = Config {
            hidden_size: 512,
            intermediate_size: 1408,
            vocab_size: 4096,
            num_hidden_layers: 8,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            max_position_embeddings: 1024,
            bos_token_id: None,
            eos_token_id: None,
            ..Config::config_7b_v2(false)
        };
        let weights = VarMap::new();
        let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
        Ok(Self {
            llama: Llama::load(vb, &config)?,
            config,
            tokenizer: None,
        })
    }

    fn cache(&self) -> Result<Cache> {
        Ok(Cache::new(true, DType::F32, &self.config, &Device::Cpu)?)
    }

    /// The tokens of a question; without a tokenizer any, as many as it has letters.
    fn tokens(&self, text: &str, turn: usize) -> Result<Vec<u32>> {
        let Some(tokenizer) = &self.tokenizer else {
            let any = |i| (i * i * 31 + i * 7 + turn * 131) % self.config.vocab_size;
            return Ok((0..text.len()).map(|i| any(i) as u32).collect());
        };
        let encoding = tokenizer
            .encode(text, turn == 0)
            .map_err(anyhow::Error::from_boxed)?;
        Ok(encoding.get_ids().to_vec())
    }

    fn is_end(&self, token: Option<&u32>) -> bool {
        match (&self.config.eos_token_id, token) {
            (Some(LlamaEosToks::Single(end)), Some(token)) => token == end,
            (Some(LlamaEosToks::Multiple(ends)), Some(token)) => ends.contains(token),
            _ => false,
        }
    }
}

/// One's own model with this crate's mask and cache: one layer of attention over random embeddings, with a
/// sliding window.
fn own_model() -> Result<()> {
    let model = OwnModel::random()?;
    let tokens: Vec<u32> = (0..40).map(|i| i * i % 97).collect();
    let whole = model.run(&tokens, 0, &mut model.cache())?;

    println!("\nthis crate's mask and cache, largest difference from the whole conversation at once:");
    let mut cache = model.cache();
    for (what, chunk) in [
        ("in chunks of 7", 7),
        ("token by token", 1),
        ("in turns of 10", 10),
    ] {
        let mut parts = vec![];
        for (i, chunk_tokens) in tokens.chunks(chunk).enumerate() {
            // At position 0 the cache forgets the conversation before.
            parts.push(model.run(chunk_tokens, i * chunk, &mut cache)?);
        }
        let difference = (Tensor::cat(&parts, 0)? - &whole)?.abs()?.max_all()?;
        println!("{what}, on the same cache: {:e}", difference.to_scalar::<f32>()?);
    }
    if let Err(error) = model.run(&tokens[..5], 7, &mut cache) {
        println!("at position 7: {error}");
    }
    Ok(())
}

const WIDTH: usize = 64;

struct OwnModel {
    embedding: Tensor,
    query_key_value: Tensor,
}

impl OwnModel {
    fn random() -> Result<Self> {
        Ok(Self {
            embedding: Tensor::randn(0f32, 1., (97, WIDTH), &Device::Cpu)?,
            query_key_value: Tensor::randn(0f32, 0.1, (WIDTH, 3 * WIDTH), &Device::Cpu)?,
        })
    }

    /// Keys and values side by side, one layer, 256 tokens at most.
    fn cache(&self) -> TokenCache {
        TokenCache::new(1, 2 * WIDTH, 256, DType::F32, &Device::Cpu)
    }

    fn run(&self, tokens: &[u32], position: usize, cache: &mut TokenCache) -> Result<Tensor> {
        let x = self
            .embedding
            .index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        let projected = x.matmul(&self.query_key_value)?;
        let query = projected.narrow(1, 0, WIDTH)?.contiguous()?;

        cache.begin(position, tokens.len())?;
        let cached = cache.append(0, &projected.narrow(1, WIDTH, 2 * WIDTH)?)?;
        cache.commit();
        let (key, value) = (
            cached.narrow(1, 0, WIDTH)?,
            cached.narrow(1, WIDTH, WIDTH)?.contiguous()?,
        );

        let total = position + tokens.len();
        let mask = Mask::sliding_window(16).tensor(position..total, 0..total, DType::F32, &Device::Cpu)?;
        let scores =
            (query.matmul(&key.contiguous()?.t()?)? / (WIDTH as f64).sqrt())?.broadcast_add(&mask)?;
        Ok(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&value)?)
    }
}
