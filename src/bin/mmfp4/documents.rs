//! Texts to read: plain ones, or lists of them.

use crate::output::Usage;
use crate::prompt;
use anyhow::Context;
use serde::Deserialize;
use std::path::Path;

/// A document of a JSON list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Text(String),
    Object { text: String },
}

/// The documents of a text file, or of a JSON list; `-` is standard input.
pub fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = match path.to_str() {
        Some("-") => prompt::read_stdin()?,
        _ => std::fs::read_to_string(path).with_context(|| {
            format!(
                "{} cannot be read; give a UTF-8 text or JSON file",
                path.display()
            )
        })?,
    };
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let documents: Vec<serde_json::Value> = match serde_json::from_str(&text) {
        Ok(documents) => documents,
        // A text may begin with a bracket.
        Err(_) if !is_json => return Ok(vec![text]),
        Err(error) => {
            let problem = format!(
                "{}: not a JSON list: {error}; name plain text .txt",
                path.display()
            );
            return Err(Usage(problem).into());
        }
    };
    let document = |(index, value)| match serde_json::from_value(value) {
        Ok(Document::Text(text) | Document::Object { text }) => Ok(text),
        Err(_) => Err(Usage(format!(
            "{}: item {index} of the list is neither a string nor an object with a string `text`",
            path.display()
        ))
        .into()),
    };
    documents.into_iter().enumerate().map(document).collect()
}
