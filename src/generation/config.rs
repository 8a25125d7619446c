//! A checkpoint's own advice on how to generate: `generation_config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use super::Sampling;
use crate::error::shortened;
use crate::{Error, Result};

/// The fields of `generation_config.json` that this crate acts on; others are ignored. `None` where
/// the file says nothing or `null`.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Every token that ends a text. GLM has three; stopping at the first alone never ends a turn.
    pub eos_token_id: Vec<u32>,
    /// The token that fills a batch.
    pub pad_token_id: Option<u32>,
    /// The token that opens a text.
    pub bos_token_id: Option<u32>,
    /// Whether to sample; greedy unless it says `true`.
    pub do_sample: Option<bool>,
    /// See [`Sampling::temperature`].
    pub temperature: Option<f32>,
    /// See [`Sampling::top_k`].
    pub top_k: Option<usize>,
    /// See [`Sampling::top_p`].
    pub top_p: Option<f32>,
    /// See [`Sampling::min_p`].
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// The most tokens to generate, the prompt not counted.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads a `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read; [`Error::File`], which names the field, where it
    /// is not a JSON object or a value has the wrong type.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::io(path, source, ""))?;
        Self::parse_file(&bytes, path)
    }

    /// Reads a file's contents; `path` names it in messages.
    pub(super) fn parse_file(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::parse(bytes).map_err(|problem| {
            Error::file(
                path,
                problem,
                "correct the file, or delete it and say how to generate in the request",
            )
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let json: Value = serde_json::from_slice(bytes).map_err(|error| format!("not JSON: {error}"))?;
        let Value::Object(fields) = json else {
            let found = shortened(json.to_string());
            return Err(format!("expected a JSON object, found {found}"));
        };
        let fields = Fields(fields);
        Ok(Self {
            eos_token_id: fields
                .get("eos_token_id", "a token id or a list of them", token_ids)?
                .unwrap_or_default(),
            pad_token_id: fields.get("pad_token_id", "a token id", token_id)?,
            bos_token_id: fields.get("bos_token_id", "a token id", token_id)?,
            do_sample: fields.get("do_sample", "true or false", Value::as_bool)?,
            temperature: fields.number("temperature")?,
            top_k: fields.count("top_k")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            max_new_tokens: fields.count("max_new_tokens")?,
        })
    }

    /// How to sample where the user says nothing.
    ///
    /// Sampled where `do_sample` is true, or where it is absent and a temperature is written (vLLM takes the
    /// temperature too; transformers would be greedy then); a temperature of 1 where it is true and none is
    /// written; greedy else. The repetition penalty holds in all cases. Unlike transformers, an absent `top_k`
    /// cuts nothing (there it is 50).
    pub fn sampling(&self) -> Sampling {
        let greedy = Sampling {
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..Sampling::default()
        };
        if !self.do_sample.unwrap_or(self.temperature.is_some()) {
            return greedy;
        }
        Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(greedy.top_k),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            ..greedy
        }
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn get<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| {
                format!(
                    "`{name}`: expected {expected}, found {}",
                    shortened(value.to_string())
                )
            }),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f32>, String> {
        self.get(name, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    fn count(&self, name: &str) -> Result<Option<usize>, String> {
        self.get(name, "a whole number, 0 or more", |value| {
            value.as_u64().and_then(|count| count.try_into().ok())
        })
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| id.try_into().ok())
}

fn token_ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Array(ids) => ids.iter().map(token_id).collect(),
        _ => token_id(value).map(|id| vec![id]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> GenerationConfig {
        GenerationConfig::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn the_demo_models_file() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/examples/demo-model/generation_config.json"
        );
        let config = GenerationConfig::from_file(path).unwrap();
        assert_eq!(config.eos_token_id, [4080, 4087, 4089]);
        assert_eq!(config.pad_token_id, Some(4080));
        assert_eq!(config.sampling(), Sampling::default());
    }

    #[test]
    fn end_tokens_in_all_spellings() {
        assert_eq!(parse(r#"{"eos_token_id": 7}"#).eos_token_id, [7]);
        assert_eq!(parse(r#"{"eos_token_id": [7, 8]}"#).eos_token_id, [7, 8]);
        assert!(parse(r#"{"eos_token_id": null}"#).eos_token_id.is_empty());
        assert!(parse("{}").eos_token_id.is_empty());
    }

    #[test]
    fn sampling_only_where_the_file_says_so() {
        let written =
            r#""temperature": 0.7, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1"#;
        let greedy = Sampling {
            repetition_penalty: 1.1,
            ..Sampling::default()
        };
        assert_eq!(
            parse(r#"{"top_p": 0.95, "repetition_penalty": 1.1}"#).sampling(),
            greedy
        );
        let absent = parse(&format!("{{{written}}}")).sampling();
        assert_eq!(
            absent,
            parse(&format!("{{\"do_sample\": true, {written}}}")).sampling()
        );
        assert_eq!(
            parse(&format!("{{\"do_sample\": false, {written}}}")).sampling(),
            greedy
        );
        assert_eq!(
            parse(&format!("{{\"do_sample\": true, {written}}}")).sampling(),
            Sampling {
                temperature: 0.7,
                top_p: 0.95,
                top_k: 20,
                min_p: 0.01,
                ..greedy
            }
        );
        assert_eq!(
            parse(r#"{"do_sample": true}"#).sampling(),
            Sampling {
                temperature: 1.0,
                ..Sampling::default()
            }
        );
    }

    #[test]
    fn wrong_types_name_the_file_and_the_field() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        for (json, named) in [
            (r#"{"temperature": "hot"}"#, "`temperature`"),
            (r#"{"eos_token_id": -1}"#, "`eos_token_id`"),
            (r#"{"eos_token_id": [1, "two"]}"#, "`eos_token_id`"),
            (r#"{"eos_token_id": 4294967296}"#, "`eos_token_id`"),
            (r#"{"top_k": 1.5}"#, "`top_k`"),
            (r#"{"do_sample": 1}"#, "`do_sample`"),
            ("[]", "JSON object"),
            ("{", "not JSON"),
        ] {
            std::fs::write(&path, json).unwrap();
            let error = GenerationConfig::from_file(&path).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::File { .. }), "{message}");
            assert!(
                message.contains(named) && message.contains("generation_config.json"),
                "{message}"
            );
        }
        assert!(matches!(
            GenerationConfig::from_file(folder.path().join("absent")),
            Err(Error::Io { .. })
        ));
    }
}
