//! Token by token to text, without ever showing half a character.

use std::collections::HashMap;
use std::sync::LazyLock;

use tokenizers::{DecoderWrapper, step_decode_stream};

use super::tokenizer::{Tokenizer, failed};
use crate::{Error, Result};

/// Turns token ids into text one at a time.
///
/// The pieces concatenated are [`Tokenizer::decode`] of all ids at once, at a cost that does not grow
/// with what came before. A character whose bytes are spread over several tokens is held back until
/// its last byte has come.
///
/// ```
/// # fn main() -> candle_mmfp4::Result<()> {
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/tokenizer.json");
/// use candle_mmfp4::generation::{Detokenizer, Tokenizer};
///
/// let tokenizer = Tokenizer::from_file(path)?;
/// let mut detokenizer = Detokenizer::new(&tokenizer);
/// let mut text = String::new();
/// for id in tokenizer.encode("a 🦀 walks")? {
///     if let Some(piece) = detokenizer.push(id)? {
///         text.push_str(&piece);
///     }
/// }
/// text.push_str(&detokenizer.finish()?);
/// assert_eq!(text, "a 🦀 walks");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    pushed: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Byte-level BPE: each token is a run of bytes on its own.
    Bytes(Utf8Stream),
    /// Any other decoder: the tokenizers crate's own window over the last few tokens.
    Window {
        ids: Vec<u32>,
        prefix: String,
        prefix_index: usize,
    },
}

impl Detokenizer {
    /// Starts a sequence. Special tokens are written out, so that a parser can see `</think>`.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let state = match tokenizer.inner().get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => State::Bytes(Utf8Stream::default()),
            _ => State::Window {
                ids: Vec::new(),
                prefix: String::new(),
                prefix_index: 0,
            },
        };
        Self {
            tokenizer: tokenizer.clone(),
            skip_special: false,
            pushed: 0,
            state,
        }
    }

    /// Whether special tokens are left away; they are not unless this says so.
    pub fn skip_special(mut self, skip: bool) -> Self {
        self.skip_special = skip;
        self
    }

    /// Takes the next id; gives the text that is complete by now, `None` where there is none.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id that stands for no token.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let token = self.tokenizer.known(id, self.pushed)?;
        self.pushed += 1;
        match &mut self.state {
            State::Bytes(stream) => {
                if self.skip_special && self.tokenizer.is_special(id) {
                    return Ok(None);
                }
                let text = stream.push(&token_bytes(&token));
                Ok((!text.is_empty()).then_some(text))
            }
            State::Window {
                ids,
                prefix,
                prefix_index,
            } => step_decode_stream(
                self.tokenizer.inner(),
                vec![id],
                self.skip_special,
                ids,
                prefix,
                prefix_index,
            )
            .map_err(failed),
        }
    }

    /// Ends the sequence: what was held back, with U+FFFD for bytes that never became a character.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer's own decoder fails, or rewrites text that was given out already;
    /// never with byte-level BPE, GLM's.
    pub fn finish(&mut self) -> Result<String> {
        match &mut self.state {
            State::Bytes(stream) => Ok(stream.finish()),
            State::Window { ids, prefix, .. } => {
                let text = self
                    .tokenizer
                    .inner()
                    .decode(&std::mem::take(ids), self.skip_special)
                    .map_err(failed)?;
                let prefix = std::mem::take(prefix);
                text.strip_prefix(&prefix).map(str::to_owned).ok_or_else(|| {
                    Error::Tokenizer(format!(
                        "the decoder rewrote text it had already given: {prefix:?} became {text:?}"
                    ))
                })
            }
        }
    }
}

/// Bytes in, whole characters out; `String::from_utf8_lossy` for a stream.
#[derive(Debug, Default)]
pub(super) struct Utf8Stream {
    /// The start of a character, three bytes at most.
    pending: Vec<u8>,
}

impl Utf8Stream {
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(bad) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    pub(super) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// The bytes of a byte-level token; a token with a character outside the alphabet is taken as it is
/// written, as the tokenizers crate does.
fn token_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(|c| BYTE_OF.get(&c).copied())
        .collect::<Option<_>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for the
/// characters from U+0100 on, in order.
static BYTE_OF: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => (char::from(byte), byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).unwrap_or_default(), byte)
            }
        })
        .collect()
});

#[cfg(test)]
mod tests {
    use super::super::tokenizer::demo;
    use super::*;
    use crate::random::Random;

    fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
        let mut detokenizer = Detokenizer::new(tokenizer).skip_special(skip);
        let mut text = String::new();
        for &id in ids {
            if let Some(piece) = detokenizer.push(id).unwrap() {
                assert!(!piece.is_empty());
                text.push_str(&piece);
            }
        }
        text + &detokenizer.finish().unwrap()
    }

    #[test]
    fn any_ids_decode_as_they_do_at_once() {
        let tokenizer = demo();
        let mut random = Random::new(1);
        for round in 0..2000 {
            let length = 1 + random.below(40);
            // Half of the rounds draw from the single bytes, where most sequences are no UTF-8.
            let below = if round % 2 == 0 {
                tokenizer.vocab_size()
            } else {
                256
            };
            let ids: Vec<u32> = (0..length).map(|_| random.below(below) as u32).collect();
            for skip in [false, true] {
                let whole = tokenizer.decode(&ids, skip).unwrap();
                assert_eq!(stream(&tokenizer, &ids, skip), whole, "{ids:?}");
            }
        }
    }

    #[test]
    fn text_in_many_scripts_comes_back_in_whole_characters() {
        let tokenizer = demo();
        let text = "Straße 東京 🦀👩‍👩‍👧‍👦 עברית \u{0}\u{7f}\u{ad} naïve <|user|> e\u{301} 𝔘";
        for text in [text.to_owned(), text.repeat(20)] {
            let ids = tokenizer.encode(&text).unwrap();
            assert!(ids.len() > 20);
            let mut detokenizer = Detokenizer::new(&tokenizer);
            let mut seen = String::new();
            let mut held = 0;
            for id in ids {
                match detokenizer.push(id).unwrap() {
                    Some(piece) => seen.push_str(&piece),
                    None => held += 1,
                }
                assert!(text.starts_with(&seen), "{seen:?}");
            }
            assert!(held > 3, "the text must split characters over tokens");
            assert_eq!(seen, text);
            assert_eq!(detokenizer.finish().unwrap(), "");
        }
    }

    #[test]
    fn half_a_character_at_the_end_is_shown_once() {
        let tokenizer = demo();
        let crab = tokenizer.encode("🦀").unwrap();
        assert!(crab.len() > 1);
        let half = &crab[..crab.len() - 1];
        assert_eq!(stream(&tokenizer, half, false), "\u{FFFD}");
        assert_eq!(tokenizer.decode(half, false).unwrap(), "\u{FFFD}");
    }

    #[test]
    fn every_byte_has_a_character() {
        assert_eq!(BYTE_OF.len(), 256);
        assert_eq!(token_bytes("Ġa"), b" a");
        assert_eq!(token_bytes("a b"), b"a b");
    }

    #[test]
    fn unknown_ids_are_refused() {
        let mut detokenizer = Detokenizer::new(&demo());
        detokenizer.push(5).unwrap();
        assert!(matches!(
            detokenizer.push(9999),
            Err(Error::TokenId {
                id: 9999,
                index: 1,
                ..
            })
        ));
    }

    #[test]
    fn other_decoders_stream_too() {
        let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "merges": [], "byte_fallback": true, "unk_token": null,
                "vocab": {"▁a": 0, "▁walk": 1, "<0xF0>": 2, "<0x9F>": 3, "<0xA6>": 4, "<0x80>": 5, "s": 6}}}"#;
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let ids = [0, 2, 3, 4, 5, 1, 6, 1, 0];
        assert_eq!(stream(&tokenizer, &ids, false), "a🦀 walks walk a");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a🦀 walks walk a");
        assert_eq!(stream(&tokenizer, &[0, 2, 3], false), "a\u{FFFD}\u{FFFD}");
    }
}
