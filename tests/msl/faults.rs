//! Faults planted in the kernels, and in their plans' bindings: the tests that would miss one are worth nothing.

use crate::backend::available;
use crate::checks::{failure, strict};
use crate::{dense, linear, norm_rope};
use candle_mmfp4::metal::host::build::{self, Options, Sanitize};
use candle_mmfp4::metal::source;
use std::fmt::Write as _;
use std::path::Path;

/// A fault: what it is, the file, and the text that is replaced.
pub struct Fault {
    pub what: &'static str,
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// Which checks found it, in the order in which they ran.
struct Found {
    strict: Option<String>,
    plain: Option<String>,
    schedules: Option<String>,
    addresses: Option<String>,
    races: Option<String>,
}

/// The faults of every family of kernels.
fn all() -> impl Iterator<Item = &'static Fault> {
    let families = [
        linear::faults::FAULTS,
        norm_rope::faults::FAULTS,
        dense::faults::FAULTS,
    ];
    families.into_iter().flatten()
}

/// Those that every run of the tests plants: one for each kind of check.
const IN_CI: [&str; 5] = [
    "a barrier that one simdgroup does not reach",
    "a barrier that orders no memory",
    "outputs written past the last row of W",
    "sums in half",
    "the code 0.5 flushed to zero",
];

impl Fault {
    /// The kernels with this fault, in a folder of their own.
    fn planted(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in source::HEADERS.iter().chain(source::KERNELS) {
            let text = if file.name == self.file {
                assert!(
                    file.text.contains(self.from),
                    "{}: the text is not there",
                    self.what
                );
                file.text.replace(self.from, self.to)
            } else {
                file.text.to_string()
            };
            std::fs::write(folder.path().join(file.name), text).unwrap();
        }
        folder
    }

    /// Runs the checks; `all` of them, or up to the first that finds it.
    fn find(&self, all: bool) -> Found {
        let folder = self.planted();
        let run = |sanitize, seeds: std::ops::Range<u64>| -> Option<String> {
            let options = Options {
                sanitize,
                program: true,
                ..Options::default()
            };
            match build::library_of(folder.path(), &folder.path().join("build"), &options) {
                Err(error) => Some(format!("does not compile: {}", first_line(&error.to_string()))),
                Ok(program) => seeds
                    .into_iter()
                    .find_map(|seed| failure(&program, seed))
                    .map(|text| text.replace(&format!("{}/", folder.path().display()), "")),
            }
        };
        let strict = strict(folder.path()).map(|text| first_line(&text));
        let mut found = Found {
            strict,
            plain: None,
            schedules: None,
            addresses: None,
            races: None,
        };
        if all || !found.any() {
            found.plain = run(Sanitize::None, 0..1);
        }
        if all || !found.any() {
            found.schedules = run(Sanitize::None, 1..9);
        }
        if all || !found.any() {
            found.addresses = run(Sanitize::Addresses, 0..1);
        }
        if all || !found.any() {
            found.races = run(Sanitize::Threads, 0..1);
        }
        found
    }
}

impl Found {
    fn each(&self) -> [&Option<String>; 5] {
        [
            &self.strict,
            &self.plain,
            &self.schedules,
            &self.addresses,
            &self.races,
        ]
    }

    fn any(&self) -> bool {
        self.each().iter().any(|found| found.is_some())
    }
}

/// The first line that tells something, without folders.
fn first_line(text: &str) -> String {
    let telling = |line: &&str| line.contains("error") || line.contains("lint");
    let line = text
        .lines()
        .find(telling)
        .or_else(|| text.lines().next())
        .unwrap_or_default();
    let line = line.rsplit('/').next().unwrap_or(line);
    line.chars().take(70).collect()
}

#[test]
fn planted_faults_are_found() {
    if !available() {
        return;
    }
    for what in IN_CI {
        let fault = all().find(|fault| fault.what == what).unwrap();
        assert!(fault.find(false).any(), "nothing finds: {what}");
    }
}

/// All of them through all checks; writes docs/metal-faults.md.
#[test]
#[ignore = "many minutes: cargo test --release --features msl-host --test msl -- --ignored faults"]
fn faults() {
    assert!(available());
    let mut table = String::from(
        "# Faults planted in the Metal kernels\n\n\
         Each is one change of `metal/`, put through every check on Linux; a cell tells what the check said. Written by\n\
         `cargo test --release --features msl-host --test msl -- --ignored faults`, which fails where nothing finds one.\n\n\
         | fault | strict check | numbers, threads in order | eight other schedules | addresses, undefined behaviour | races |\n\
         |---|---|---|---|---|---|\n",
    );
    let mut missed = Vec::new();
    for fault in all() {
        let found = fault.find(true);
        let cells = found
            .each()
            .map(|cell| cell.as_deref().unwrap_or("").replace('|', "\\|"));
        writeln!(table, "| {} | {} |", fault.what, cells.join(" | ")).unwrap();
        eprintln!("{}: {cells:?}", fault.what);
        if !found.any() {
            missed.push(fault.what);
        }
    }
    std::fs::write(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metal-faults.md"),
        table,
    )
    .unwrap();
    assert!(missed.is_empty(), "nothing finds {missed:?}");
}
