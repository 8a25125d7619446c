//! Where a text comes from: the command line, or standard input.

use crate::output::Usage;
use anyhow::Context;
use std::io::{IsTerminal, Read};

/// All of standard input, as text.
pub fn read_stdin() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut bytes)
        .context("standard input cannot be read")?;
    String::from_utf8(bytes).map_err(|error| {
        let message = format!("standard input is not UTF-8 text ({error}); convert it first");
        anyhow::Error::new(Usage(message))
    })
}

/// The prompt: `given`, or standard input for `-` and where something is piped in; else `default`.
///
/// The line break at the end that `echo` writes does not belong to what is said.
pub fn prompt(given: Option<&str>, default: &str) -> anyhow::Result<String> {
    let piped = match given {
        Some("-") => read_stdin()?,
        Some(text) => return Ok(text.to_string()),
        None if std::io::stdin().is_terminal() => return Ok(default.to_string()),
        None => read_stdin()?,
    };
    let text = piped.strip_suffix('\n').unwrap_or(&piped);
    let text = text.strip_suffix('\r').unwrap_or(text);
    match (text.is_empty(), given) {
        (false, _) => Ok(text.to_string()),
        // No terminal and nothing to read, as under a service or in CI.
        (true, None) => Ok(default.to_string()),
        (true, Some(_)) => {
            Err(Usage("standard input is empty; pipe the prompt in, or give -p TEXT".into()).into())
        }
    }
}
