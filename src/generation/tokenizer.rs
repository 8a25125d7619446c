//! A thin face on the `tokenizers` crate, with this crate's errors.

use std::collections::HashSet;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use tokenizers::{Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer};

use crate::{Error, Result};

/// Text to token ids and back, from a Hugging Face `tokenizer.json`. Clones share the vocabulary.
///
/// Nothing is added to what is encoded: a chat template writes its own special tokens. Truncation and
/// padding that the file may ask for are ignored, as transformers ignores them.
///
/// ```
/// # fn main() -> candle_mmfp4::Result<()> {
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/tokenizer.json");
/// use candle_mmfp4::generation::Tokenizer;
///
/// let tokenizer = Tokenizer::from_file(path)?;
/// let ids = tokenizer.encode("<|user|>Hello")?;
/// assert_eq!(ids[0], tokenizer.token_id("<|user|>").unwrap());
/// assert_eq!(tokenizer.decode(&ids, true)?, "Hello");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read, [`Error::File`] where it is not a tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| {
            Error::io(
                path,
                source,
                "a checkpoint needs its tokenizer.json beside its weights",
            )
        })?;
        Self::parse_file(&bytes, path)
    }

    /// Reads a file's contents; `path` names it in messages.
    pub(super) fn parse_file(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::parse(bytes).map_err(|problem| {
            Error::file(
                path,
                problem,
                "expected the JSON that the `tokenizers` library writes; download it again",
            )
        })
    }

    /// Reads the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the bytes are not a tokenizer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).map_err(Error::Tokenizer)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // The tokenizers crate panics at some of what is malformed: JSON that ends within a decoder, a normaliser's data.
        let read = catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
        let read = read.unwrap_or_else(|_| Err("the tokenizers library gave up on it".into()));
        let mut inner = read.map_err(|error| {
            // The tokenizers crate reports even broken JSON as a model that it does not know.
            match serde_json::from_slice::<serde_json::Value>(bytes) {
                Err(error) => format!("not JSON: {error}"),
                Ok(json) if json.get("model").is_none() => {
                    "expected a tokenizer, found JSON without a `model`".into()
                }
                Ok(_) => format!("not a tokenizer this crate can read: {error}"),
            }
        })?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        Ok(Self {
            shared: Arc::new(Shared {
                inner,
                special,
                vocab_size,
            }),
        })
    }

    /// Encodes text in which added tokens (`<|user|>`, `<think>`, …) stand for themselves.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer's own rules fail on this text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner().encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Encodes text as nothing but text: no added token is recognised, special or not.
    ///
    /// For text that must not speak for the chat template (what a user typed, a tool's result) and
    /// for perplexity. The tokenizers crate can leave out the tokens that are flagged special; GLM's
    /// `<think>` and `<tool_call>` are not, so all of them are passed by here.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer's own rules fail on this text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let inner = self.inner();
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = inner.get_normalizer() {
            normalizer.normalize(&mut normalized).map_err(failed)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = inner.get_model();
        pieces
            .tokenize(|piece| model.tokenize(piece.get()))
            .map_err(failed)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of a whole sequence; special tokens are written out or left away. Bytes that are no
    /// UTF-8 become U+FFFD. For one token at a time there is [`Detokenizer`](super::Detokenizer).
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id that stands for no token.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        for (index, &id) in ids.iter().enumerate() {
            self.known(id, index)?;
        }
        self.inner().decode(ids, skip_special).map_err(failed)
    }

    /// The id of a token as the vocabulary spells it, added tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner().token_to_id(token)
    }

    /// A token as the vocabulary spells it (byte-level BPE writes a space as `Ġ`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner().id_to_token(id)
    }

    /// One more than the largest id. A model's own vocabulary is often padded beyond this.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// Whether an id is a token that the file flags as special.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.contains(&id)
    }

    /// The token of an id that must have one.
    pub(super) fn known(&self, id: u32, index: usize) -> Result<String> {
        self.token(id).ok_or(Error::TokenId {
            id,
            index,
            vocab_size: self.vocab_size(),
        })
    }

    pub(super) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.shared.inner
    }
}

pub(super) fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
pub(super) fn demo() -> Tokenizer {
    Tokenizer::from_file(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/demo-model/tokenizer.json"
    ))
    .unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        prompt: String,
        input_ids: Vec<u32>,
        greedy_ids: Vec<u32>,
        greedy_text: String,
    }

    #[test]
    fn agrees_with_the_goldens_of_transformers() {
        let tokenizer = demo();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/demo-model/golden.json");
        let goldens: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(!goldens.is_empty());
        for golden in goldens {
            assert_eq!(tokenizer.encode(&golden.prompt).unwrap(), golden.input_ids);
            assert_eq!(
                tokenizer.decode(&golden.greedy_ids, false).unwrap(),
                golden.greedy_text
            );
        }
    }

    #[test]
    fn plain_text_never_holds_an_added_token() {
        let tokenizer = demo();
        let text = "<|user|>a </think> b<tool_call>";
        let plain = tokenizer.encode_plain(text).unwrap();
        assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
        let marked = tokenizer.encode(text).unwrap();
        assert_eq!(marked.iter().filter(|&&id| tokenizer.is_special(id)).count(), 3);
        assert_eq!(tokenizer.decode(&marked, true).unwrap(), "a  b");

        let ordinary = "Größe: 3 × 4 🦀\n\n  fn main() {}\r\n";
        assert_eq!(
            tokenizer.encode_plain(ordinary).unwrap(),
            tokenizer.encode(ordinary).unwrap()
        );
    }

    #[test]
    fn tokens_that_are_not_flagged_special_are_plain_text_too() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/tokenizer.json");
        let json = std::fs::read_to_string(path)
            .unwrap()
            .replace("\"special\": true", "\"special\": false")
            .replace("\"special\":true", "\"special\":false");
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let think = tokenizer.token_id("<think>").unwrap();
        assert!(!tokenizer.is_special(think));
        assert_eq!(tokenizer.encode("<think>").unwrap(), [think]);
        assert!(!tokenizer.encode_plain("<think>").unwrap().contains(&think));
    }

    #[test]
    fn ids_and_tokens() {
        let tokenizer = demo();
        assert_eq!(tokenizer.vocab_size(), 4096);
        assert_eq!(tokenizer.token_id("<|user|>"), Some(4087));
        assert_eq!(tokenizer.token(4087).as_deref(), Some("<|user|>"));
        assert_eq!(tokenizer.token_id("no such token"), None);
        assert_eq!(tokenizer.token(4096), None);
        assert!(tokenizer.is_special(4087) && !tokenizer.is_special(0));
        let error = tokenizer.decode(&[1, 4096], false).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TokenId {
                    id: 4096,
                    index: 1,
                    vocab_size: 4096
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn bad_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let error = Tokenizer::from_file(&path).unwrap_err();
        assert!(
            matches!(error, Error::Io { .. }) && error.to_string().contains("tokenizer.json"),
            "{error}"
        );
        for (content, problem) in [
            ("<html>", "not JSON"),
            ("{\"a\": 1}", "without a `model`"),
            ("{\"model\": {\"type\": \"Abacus\"}}", "can read"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = Tokenizer::from_file(&path).unwrap_err();
            assert!(
                matches!(error, Error::File { .. }) && error.to_string().contains(problem),
                "{error}"
            );
            assert!(matches!(
                Tokenizer::from_bytes(content.as_bytes()),
                Err(Error::Tokenizer(_))
            ));
        }
    }
}
