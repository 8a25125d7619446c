//! The tokenizer that a GGUF file carries, as the `tokenizer.json` that it was made from.

use super::metadata::Metadata;
use crate::error::shortened;
use crate::fp4::Bytes;
use crate::{Error, Result};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::path::Path;

const INSTEAD: &str = "put the tokenizer.json of the original model beside it";
/// What llama.cpp calls byte-level BPE, and GLM-4's rules of where words end.
const MODEL: &str = "gpt2";
const RULES: &str = "glm4";
/// Those rules, as GLM-4's `tokenizer.json` has them.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's numbers for tokens that stand for themselves, and are special, or not; and for those that are no tokens.
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const UNUSED: i128 = 5;

/// The text of a `tokenizer.json`.
///
/// # Errors
/// [`Error::File`] for another kind of tokenizer, or parts that are missing or do not fit each other.
pub(super) fn from_metadata(metadata: &Metadata, file: &Bytes, path: &Path) -> Result<Vec<u8>> {
    let refuse = |problem: String| Error::file(path, problem, INSTEAD);
    for (key, expected) in [("model", MODEL), ("pre", RULES)] {
        let key = format!("tokenizer.ggml.{key}");
        let found = metadata.text(&key).unwrap_or("missing");
        if found != expected {
            let found = shortened(found.to_string());
            return Err(refuse(format!("{key} = {found}; only {expected} is implemented")));
        }
    }
    let missing = |key: &str| refuse(format!("its metadata lack {key}, or it is of another type"));
    let texts = |key: &str| metadata.texts(key, file).ok_or_else(|| missing(key));
    let tokens = texts("tokenizer.ggml.tokens")?;
    let merges = texts("tokenizer.ggml.merges")?;
    let kinds = "tokenizer.ggml.token_type";
    let kinds = metadata.integers(kinds, file).ok_or_else(|| missing(kinds))?;
    if kinds.len() != tokens.len() {
        let problem = format!("{} tokens, and types of {}", tokens.len(), kinds.len());
        return Err(refuse(problem));
    }
    let (mut vocabulary, mut added) = (Vec::new(), Vec::new());
    for (id, (token, kind)) in tokens.into_iter().zip(kinds).enumerate() {
        match kind {
            UNUSED => {}
            CONTROL | USER_DEFINED => added.push(Added {
                id,
                content: token,
                special: kind == CONTROL,
                ..Added::default()
            }),
            _ => vocabulary.push((token, id)),
        }
    }
    let tokenizer = File {
        version: "1.0",
        added_tokens: added,
        pre_tokenizer: json!({
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ],
        }),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: Model {
            kind: "BPE",
            vocab: Vocabulary(vocabulary),
            merges,
        },
    };
    serde_json::to_vec(&tokenizer).map_err(|error| refuse(error.to_string()))
}

/// A `tokenizer.json`. It is written from the texts where they lie: as JSON values they would take hundreds of bytes each.
#[derive(Serialize)]
struct File<'a> {
    version: &'static str,
    added_tokens: Vec<Added<'a>>,
    pre_tokenizer: Value,
    decoder: Value,
    model: Model<'a>,
}

#[derive(Default, Serialize)]
struct Added<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    vocab: Vocabulary<'a>,
    merges: Vec<&'a str>,
}

/// An object of tokens and their ids.
struct Vocabulary<'a>(Vec<(&'a str, usize)>);

impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}
