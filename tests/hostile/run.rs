//! Reads damaged folders and judges what came of it.

use crate::names_a_file;
use crate::reading::damage::Damage;
use crate::reading::folders::Folder;
use crate::reading::random::Random;
use crate::reading::read;
use crate::watch::{Quiet, Seen, most_mapped, watch};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// What reading may take beside a multiple of the folder's size: threads' buffers, tokenizers' caches, a pass.
const MEMORY: usize = 1 << 20;
/// Bytes of memory for each byte of the folder: JSON that is parsed takes more than its text.
const MULTIPLE: usize = 4;
/// What may be asked for in one piece beside the folder's size: tables of tokenizers and of regular expressions.
const PIECE: usize = 512 << 10;
/// On a machine that is busy with other things: each takes a millisecond.
const TIME: Duration = Duration::from_secs(60);
/// What maps of memory may add to the process's address space in all; threads' stacks and heaps are among them.
const MAPPED: usize = 1 << 30;
/// Failures that are shown; one fault makes many.
const SHOWN: usize = 12;

/// A folder to be read.
pub struct Case {
    pub folder: Folder,
    pub damage: Damage,
    /// An error names one of these files.
    pub files: Vec<&'static str>,
    /// Whether all of the folder is read, or config and weights.
    pub whole: bool,
    /// Whether weights are quantised while loading.
    pub quantize: bool,
}

impl Case {
    /// Config and weights are read.
    pub fn weights(folder: Folder, damage: Damage, files: &[&'static str]) -> Self {
        Self {
            folder,
            damage,
            files: files.into(),
            whole: false,
            quantize: false,
        }
    }

    /// Reads it; the error says what should not have happened.
    pub fn check(&self) -> (Result<bool, String>, Seen) {
        let files = self.folder.in_memory();
        let (result, seen) = watch(|| match self.whole {
            true => read::all(&files),
            false => read::weights(&files, self.quantize),
        });
        let most = MEMORY + MULTIPLE * self.folder.size();
        let verdict = match result {
            Err(panic) => Err(format!("panic: {panic}")),
            Ok(_) if seen.peak > most || seen.largest > PIECE + self.folder.size() => {
                Err(format!("{} bytes of memory, {} at once", seen.peak, seen.largest))
            }
            Ok(_) if seen.time > TIME => Err(format!("{:?}", seen.time)),
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) if !names_a_file(&error, &self.files) => {
                Err(format!("names none of {:?}: {error}", self.files))
            }
            Ok(Err(error)) => {
                let (text, names) = (error.to_string(), &self.damage.names);
                match names.is_empty()
                    || names.iter().any(|name| text.contains(name))
                    || self.config_against(&text)
                {
                    true => Ok(false),
                    false => Err(format!("names none of {names:?}: {text}")),
                }
            }
        };
        (verdict, seen)
    }

    /// Whether a tensor is named because the config, which was damaged, says something else of it.
    fn config_against(&self, error: &str) -> bool {
        self.files.contains(&"config.json") && error.starts_with("tensor `")
    }
}

/// Tests of this program measure one after the other.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Reads so many folders that `make` damages, each by numbers that follow from the family's name and its own.
pub fn run(family: &'static str, count: usize, make: impl Fn(usize, &mut Random<'_>) -> Case) {
    let _alone = alone();
    let quiet = Quiet::new();
    // Threads and what they keep, each from its first task of a kind on.
    for seed in 0..64 {
        _ = make(0, &mut Random::of_seed(seed)).check();
    }
    let mapped = most_mapped();
    let (mut refused, mut most, mut failures) = (0, Seen::default(), Vec::new());
    for index in 0..count {
        let seed = seed(family, index);
        let case = make(index, &mut Random::of_seed(seed));
        let (verdict, seen) = case.check();
        most = most.max(seen);
        match verdict {
            Ok(loaded) => refused += usize::from(!loaded),
            Err(problem) => failures.push((index, case, problem)),
        }
    }
    drop(quiet);
    println!(
        "{family}: {count} read, {refused} refused; at most {} bytes of memory, {} at once, {:?}",
        most.peak, most.largest, most.time
    );
    assert!(failures.is_empty(), "{}", told(family, &failures));
    // Damage that goes unnoticed, nine times in ten, would be none.
    assert!(
        refused > count / 10 && refused < count,
        "{refused} of {count} refused"
    );
    if let Some((before, after)) = mapped.zip(most_mapped()) {
        assert!(after - before < MAPPED, "{} bytes mapped", after - before);
    }
}

/// FNV-1a of the name, and the number.
fn seed(family: &str, index: usize) -> u64 {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    family
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, hash)
        .wrapping_add(index as u64)
}

/// What failed, and where the folders are.
fn told(family: &str, failures: &[(usize, Case, String)]) -> String {
    let mut text = format!("{} of them failed:", failures.len());
    for (index, case, problem) in failures.iter().take(SHOWN) {
        let folder = kept(&format!("{family}-{index}"), &case.folder);
        let _ = write!(
            text,
            "\n{family} {index}, seed {}, {}, {}: {problem}\n  files: {}",
            seed(family, *index),
            case.folder.layout,
            case.damage.what,
            folder.display()
        );
    }
    text
}

/// Writes a folder where it can be looked at.
fn kept(name: &str, folder: &Folder) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile").join(name);
    // A test that fails says so, whether there is room for its files or not.
    _ = folder.write(&path);
    path
}
