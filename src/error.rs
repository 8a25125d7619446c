//! One error type for the library: what was expected, what was found, where, and what to do.

use crate::models::Site;
use crate::ops::ValueRange;
use std::path::PathBuf;

/// The library's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by the place where it is noticed.
///
/// Custom ops report through [`candle_core::Error`]; the conversion in both directions keeps the
/// message, so that `?` works in Candle code and in this crate's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of Candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// A file or folder could not be read or written.
    #[error("{}: {cause}{}", path.display(), remedy_suffix(remedy))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system answered. It is part of the message, and therefore no `source()` of this error:
        /// whoever prints the chain would print it twice.
        cause: std::io::Error,
        /// What to do about it; empty where the message says it all.
        remedy: String,
    },

    /// A file is there, but is not what it should be.
    #[error("{}: {problem}{}", path.display(), remedy_suffix(remedy))]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
        /// What to do about it.
        remedy: String,
    },

    /// A tensor of a checkpoint is missing or malformed.
    #[error("tensor `{name}`{}: {problem}", place_suffix(file))]
    Tensor {
        /// The tensor's name.
        name: String,
        /// The file that holds it, where there is one.
        file: Option<PathBuf>,
        /// What was expected and what was found.
        problem: String,
    },

    /// An argument of an op or a function is not usable.
    #[error("{op}: `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The op or function.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What it accepts.
        expected: String,
        /// What it was given.
        found: String,
    },

    /// A value that cannot be quantised: NaN or infinity.
    #[error(
        "tensor `{name}`{}: element {index} is {value}; only finite values can be quantised",
        place_suffix(file)
    )]
    NonFinite {
        /// The tensor's name.
        name: String,
        /// The file that holds it, where there is one.
        file: Option<PathBuf>,
        /// The flat index of the first such element, row-major.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },

    /// A field of a configuration holds a value that is not implemented or makes no sense.
    #[error("config.json: {field} = {value}: {problem}")]
    Config {
        /// The field's name.
        field: String,
        /// Its value, as written.
        value: String,
        /// Why it is refused, and what is accepted.
        problem: String,
    },

    /// A position that does not continue the cache.
    #[error(
        "position {position} does not continue a cache that holds {cached} tokens; pass {cached} to \
         continue, 0 to start a new sequence, or truncate the cache first"
    )]
    Position {
        /// The position that was asked for.
        position: usize,
        /// How many tokens the cache holds.
        cached: usize,
    },

    /// More tokens than the model's context.
    #[error(
        "{tokens} tokens do not fit the model's context of {limit}; shorten the prompt or ask for fewer tokens"
    )]
    ContextLength {
        /// The tokens that were to be held.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },

    /// A cache whose blocks do not suffice.
    #[error(
        "{needed} blocks of {tokens_per_block} tokens are needed, {free} of the cache's {total} are free; free a sequence, \
         shorten it, or make the cache larger (--kv-memory)"
    )]
    OutOfBlocks {
        /// The blocks that the tokens to be held take.
        needed: usize,
        /// The blocks that can be had, those with sequences of the past in them among them.
        free: usize,
        /// All blocks of the cache.
        total: usize,
        /// Tokens of a block.
        tokens_per_block: usize,
    },

    /// A token id outside the vocabulary.
    #[error(
        "token id {id} at index {index} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Where it stands in the input.
        index: usize,
        /// The model's vocabulary size.
        vocab_size: usize,
    },

    /// Nothing to run.
    #[error("the prompt is empty; give at least one token (a chat prompt has some of its own)")]
    EmptyPrompt,

    /// The tokenizer refused a file or a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// The chat template could not be parsed or rendered.
    #[error("chat template: {0}")]
    Template(String),

    /// A row of logits from which no token can be chosen.
    #[error("logits: {0}")]
    Logits(String),

    /// A repository of the hub could not be had.
    #[error("{repo}: {problem}{}", remedy_suffix(remedy))]
    Hub {
        /// The repository, as `org/name` or `org/name@revision`.
        repo: String,
        /// What happened.
        problem: String,
        /// What to do about it.
        remedy: String,
    },

    /// An op of a forward pass gave NaN or infinity; see [`check_finite`](crate::models::check_finite).
    #[error(
        "{site}: its output has NaN or infinity ({output}); its input is {input}; {}",
        non_finite_advice(input)
    )]
    NonFiniteOutput {
        /// The layer and the op, the first of the pass.
        site: Site,
        /// What it gave.
        output: ValueRange,
        /// What it was given.
        input: ValueRange,
    },

    /// A disk has too little room for what is to be written.
    #[error("{}: {needed} bytes are needed, {free} are free; free space or choose another disk", path.display())]
    DiskSpace {
        /// What was to be written.
        path: PathBuf,
        /// Its bytes.
        needed: u64,
        /// The bytes that are free.
        free: u64,
    },
}

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub(crate) fn argument(
        op: &'static str,
        argument: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Argument {
            op,
            argument,
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Shorthand for [`Error::Tensor`].
    pub(crate) fn tensor(name: impl Into<String>, file: Option<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Tensor {
            name: name.into(),
            file,
            problem: problem.into(),
        }
    }

    /// The same with the file of the tensor that it names, where it does not say that yet.
    pub(crate) fn in_file(mut self, path: Option<PathBuf>) -> Self {
        if let Self::Tensor { file, .. } | Self::NonFinite { file, .. } = &mut self
            && file.is_none()
        {
            *file = path;
        }
        self
    }

    /// Shorthand for [`Error::File`].
    pub(crate) fn file(
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::File {
            path: path.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    /// Shorthand for [`Error::Io`].
    pub(crate) fn io(path: impl Into<PathBuf>, cause: std::io::Error, remedy: impl Into<String>) -> Self {
        Self::Io {
            path: path.into(),
            cause,
            remedy: remedy.into(),
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// What a message shows of a value that a file has: what is wrong with it may be that it is a whole file.
pub(crate) fn shortened(mut text: String) -> String {
    const LONGEST: usize = 200;
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST));
        text.push('…');
    }
    text
}

fn remedy_suffix(remedy: &str) -> String {
    if remedy.is_empty() {
        String::new()
    } else {
        format!("; {remedy}")
    }
}

fn place_suffix(file: &Option<PathBuf>) -> String {
    file.as_ref()
        .map(|path| format!(" in {}", path.display()))
        .unwrap_or_default()
}

fn non_finite_advice(input: &ValueRange) -> &'static str {
    if input.is_finite() {
        "the input is finite, so look at this op's weights and at the input's magnitude"
    } else {
        "the input has them already: they come from before this op"
    }
}
