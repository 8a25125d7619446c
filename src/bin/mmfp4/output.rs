//! What goes where: results to stdout, all else to stderr.

use std::fmt::Display;
use std::io::{self, Write};

/// A mistake on the command line that clap cannot see.
#[derive(Debug)]
pub struct Usage(pub String);

impl Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Writes a line to stderr; unlike `eprintln!` it does not panic where nobody listens.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes one JSON object, and nothing else, to stdout.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Whether stdout was closed by its reader.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Bytes as MiB, or what says that they are not known.
pub fn mib(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".into(), |b| format!("{:.0} MiB", b as f64 / 1_048_576.0))
}
