//! docs/environment.md names this crate's environment variables, all of them and no others.

use std::collections::BTreeSet;
use std::path::Path;

/// What all of them begin with.
const PREFIX: &str = "MMFP4_";

fn read(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The variables that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let after = text.match_indices(PREFIX).map(|(start, _)| &text[start..]);
    let names = after.map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        rest[..end.unwrap_or(rest.len())].to_string()
    });
    names.filter(|name| name.len() > PREFIX.len()).collect()
}

fn add_folder(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_folder(&path, names);
        } else if path
            .extension()
            .is_some_and(|kind| ["rs", "py", "sh"].iter().any(|known| kind == *known))
        {
            names.extend(named(&read(&path)));
        }
    }
}

#[test]
fn all_variables_are_described_and_no_others() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut used = BTreeSet::new();
    for folder in ["src", "tests", "benches", "examples", "tools"] {
        add_folder(&root.join(folder), &mut used);
    }
    let page = read(&root.join("docs/environment.md"));
    let (ours, _) = page
        .split_once("## Of the Python original")
        .expect("the page's last part");
    assert!(used.len() >= 8, "{used:?}");
    assert_eq!(named(ours), used);
}
