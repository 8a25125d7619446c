//! A model with all that it needs to speak: tokenizer, chat template, defaults.

use super::generate::{Generation, Options};
use super::session::{Session, SharedCache, lock};
use super::{ChatTemplate, GenerationConfig, Message, RenderOptions, Tokenizer};
use crate::checkpoint::{Checkpoint, LoadOptions, LoadReport, ModelFiles, gguf_tokenizer};
use crate::kv::BlockStatistics;
use crate::models::glm4_moe_lite::{Cache, Config, Model};
use crate::{Error, Result};
use candle_core::Device;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

const TOKENIZER: &str = "tokenizer.json";
const DEFAULTS: &str = "generation_config.json";

/// A model folder, loaded: text in, text out.
///
/// It has one cache, for all its sessions and whatever it generates: sequences of several threads take turns, pass by pass,
/// and those that begin alike share what is cached of it.
///
/// ```no_run
/// use candle_core::Device;
/// use candle_mmfp4::generation::{Event, Message, Pipeline};
///
/// let (pipeline, _) = Pipeline::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
/// let prompt = pipeline.chat_prompt(&[Message::new("user", "What does `Option::insert` do?")], &Default::default())?;
/// for event in pipeline.generate(&prompt, &pipeline.options())? {
///     match event? {
///         Event::Token { text, .. } => print!("{text}"),
///         Event::Finished { text, reason, .. } => println!("{text}\n({reason:?})"),
///         Event::Prefill { .. } => {}
///     }
/// }
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct Pipeline {
    model: Model,
    cache: SharedCache,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: GenerationConfig,
}

impl Pipeline {
    /// Loads a model folder: config, safetensors, `tokenizer.json`; `generation_config.json` and a chat
    /// template, where there are any. A GGUF file has all of these in it; a `tokenizer.json` or a template beside it comes
    /// first.
    ///
    /// # Errors
    /// Names the file or tensor that is missing or malformed.
    pub fn from_folder(
        folder: impl AsRef<Path>,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Self, LoadReport)> {
        Self::from_files(&ModelFiles::folder(folder.as_ref()), options, device)
    }

    /// As [`from_folder`](Self::from_folder), of files that may be in memory.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_files(
        files: &ModelFiles,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Self, LoadReport)> {
        files.check()?;
        // Small files first: what is wrong with them should not wait for gigabytes.
        let config = Config::from_files(files)?;
        let (tokenizer, path) = match files.is_gguf() && !files.contains(TOKENIZER) {
            true => gguf_tokenizer(files)?,
            false => (files.read(TOKENIZER)?, files.path(TOKENIZER)),
        };
        let tokenizer = Tokenizer::parse_file(&tokenizer, &path)?;
        let defaults = match files.contains(DEFAULTS) {
            true => GenerationConfig::parse_file(&files.read(DEFAULTS)?, &files.path(DEFAULTS))?,
            false => GenerationConfig::default(),
        };
        let template = ChatTemplate::find(files)?;
        let (model, report) = Model::load(config, &Checkpoint::from_files(files)?, options, device)?;
        let cache = model.new_kv_cache(options.kv_cache, options.kv_size)?;
        Ok((Self::new(model, cache, tokenizer, template, defaults), report))
    }

    /// From parts, the cache being one that the model made. Where `defaults` name no token that ends a text, the model's config does.
    pub fn new(
        model: Model,
        cache: Cache,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        mut defaults: GenerationConfig,
    ) -> Self {
        if defaults.eos_token_id.is_empty() {
            defaults.eos_token_id = model.config().eos_token_id.clone();
        }
        Self {
            model,
            cache: Arc::new(Mutex::new(cache)),
            tokenizer,
            template,
            defaults,
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The checkpoint's own advice on how to generate.
    pub fn defaults(&self) -> &GenerationConfig {
        &self.defaults
    }

    /// Options as the checkpoint advises.
    pub fn options(&self) -> Options {
        Options {
            sampling: self.defaults.sampling(),
            max_tokens: self.defaults.max_new_tokens,
            ..Options::default()
        }
    }

    /// The tokens of a conversation up to where the assistant's answer begins, by the checkpoint's chat
    /// template; `options.add_generation_prompt` is taken as set.
    ///
    /// # Errors
    /// [`Error::Template`] where there is none or it refuses the messages.
    pub fn chat_prompt(&self, messages: &[Message], options: &RenderOptions) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return Err(Error::Template(
                "this model has none; give a plain prompt instead".into(),
            ));
        };
        let options = RenderOptions {
            add_generation_prompt: true,
            ..options.clone()
        };
        self.tokenizer.encode(&template.render(messages, &options)?)
    }

    /// Continues `prompt`; yields events as they happen.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::ContextLength`], [`Error::TokenId`], or an option out of its range.
    /// What happens later comes as an item.
    pub fn generate<'a>(&'a self, prompt: &[u32], options: &Options) -> Result<Generation<'a>> {
        Generation::new(self, prompt, options, None)
    }

    /// As [`generate`](Self::generate) with a sequence that outlives the call: of `prompt`, which is the whole
    /// conversation, only what `session` does not hold already is computed. Edited history is recomputed from
    /// the first difference on.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); [`Error::Argument`] for another pipeline's session.
    pub fn generate_in<'a>(
        &'a self,
        session: &'a mut Session,
        prompt: &[u32],
        options: &Options,
    ) -> Result<Generation<'a>> {
        Generation::new(self, prompt, options, Some(session))
    }

    /// An empty session.
    pub fn new_session(&self) -> Session {
        Session::new(&self.cache)
    }

    /// How the cache's blocks are used, where it has any.
    pub fn cache_statistics(&self) -> Option<BlockStatistics> {
        self.cache().statistics()
    }

    /// The cache, once no pass uses it.
    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        lock(&self.cache)
    }

    /// Refuses another pipeline's session.
    pub(super) fn own<'a>(&self, session: &'a mut Session) -> Result<&'a mut Session> {
        match session.is_of(&self.cache) {
            true => Ok(session),
            false => Err(Error::argument(
                "generate",
                "session",
                "one that this pipeline made (Pipeline::new_session)",
                "another pipeline's",
            )),
        }
    }

    /// Tokens of a block, and how many of a prompt the cache has; `None` where sequences share nothing.
    pub(super) fn shared(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        match &*self.cache() {
            Cache::Paged(cache) => Some((cache.layout().block_tokens(), cache.cached(prompt))),
            Cache::Contiguous(_) => None,
        }
    }
}
