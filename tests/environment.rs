//! docs/environment.md names every environment variable that is read here, and no other of this crate's own.

use std::collections::BTreeSet;
use std::path::Path;

/// What this crate's own begin with, but one.
const PREFIX: &str = "MMFP4_";

/// What reads a variable, by the kind of the file; its name follows.
const READERS: [(&str, &[&str]); 3] = [
    ("rs", &["env::var(", "env::var_os("]),
    ("py", &["os.environ[", "os.environ.get(", "os.getenv("]),
    ("sh", &["${"]),
];

fn read(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether this is how variables are called.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_uppercase())
        && text
            .chars()
            .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// The name that a text begins with; empty where it begins with none.
fn first_name(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    &text[..end.unwrap_or(text.len())]
}

/// All literals that look like names with several words.
fn literals(text: &str) -> impl Iterator<Item = &str> {
    let parts = text.split('"').skip(1);
    parts.filter(|part| is_name(part) && (part.contains('_') || *part == "HOME"))
}

/// The variables that a file reads: by a literal, by a constant that it defines, or, where it only passes a name on, all
/// that it holds.
fn read_by(text: &str, kind: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let readers = READERS.iter().find(|(known, _)| *known == kind);
    for reader in readers.map_or(&[][..], |(_, readers)| readers) {
        for (start, _) in text.match_indices(reader) {
            let argument = text[start + reader.len()..].trim_start();
            if kind == "sh" {
                // `${NAME:-default}`: a variable that need not be set is the environment's.
                let name = first_name(argument);
                names.extend(argument[name.len()..].starts_with(":-").then(|| name.to_string()));
            } else if let Some(literal) = argument.strip_prefix('"') {
                names.insert(first_name(literal).to_string());
            } else if !first_name(argument).is_empty() {
                let constant = format!("const {}: &str = \"", first_name(argument));
                let value = text.split_once(&constant).map(|(_, value)| first_name(value));
                names.insert(value.unwrap_or(first_name(argument)).to_string());
            } else if argument.starts_with("name") {
                names.extend(literals(text).map(String::from));
            }
        }
    }
    names.remove("");
    names
}

/// This crate's own variables that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let after = text
        .match_indices(PREFIX)
        .map(|(start, _)| first_name(&text[start..]));
    after
        .filter(|name| name.len() > PREFIX.len())
        .map(String::from)
        .collect()
}

/// Variables that are read, and this crate's own that are named.
#[derive(Default)]
struct Used {
    read: BTreeSet<String>,
    own: BTreeSet<String>,
}

fn add_folder(folder: &Path, used: &mut Used) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // This file has examples of names.
        if path.ends_with("tests/environment.rs") {
            continue;
        }
        if path.is_dir() {
            add_folder(&path, used);
            continue;
        }
        let kind = path
            .extension()
            .and_then(|kind| kind.to_str())
            .unwrap_or_default();
        if READERS.iter().any(|(known, _)| *known == kind) {
            let text = read(&path);
            used.read.extend(read_by(&text, kind));
            used.own.extend(named(&text));
        }
    }
}

#[test]
fn all_variables_are_described_and_no_others_of_our_own() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut used = Used::default();
    for folder in ["src", "tests", "benches", "examples", "tools"] {
        add_folder(&root.join(folder), &mut used);
    }
    let page = read(&root.join("docs/environment.md"));
    let (ours, _) = page
        .split_once("## Of the Python original")
        .expect("the page's last part");
    assert!(used.own.len() >= 8 && used.read.len() >= 25, "{:?}", used.read);
    assert_eq!(named(ours), used.own);
    let missing: Vec<_> = used
        .read
        .iter()
        .filter(|name| !ours.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "docs/environment.md lacks {missing:?}");
}

#[test]
fn all_ways_to_read_a_variable_are_found() {
    let found = |text: &str, kind: &str| read_by(text, kind).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(
        found(r#"std::env::var_os("A_B").or(env::var( "C"))"#, "rs"),
        "A_B C"
    );
    assert_eq!(found(r#"const X: &str = "A_B"; std::env::var(X)"#, "rs"), "A_B");
    assert_eq!(
        found(r#"look(|name| env::var(name)); variable("A_B"); "text""#, "rs"),
        "A_B"
    );
    assert_eq!(
        found(r#"os.environ["A"], os.environ.get("B", 1), os.getenv("C")"#, "py"),
        "A B C"
    );
    assert_eq!(found("${A_B:-1} ${LOCAL} $C", "sh"), "A_B");
}
