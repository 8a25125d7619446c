//! A folder that is being written, and what an interrupted run left of it.

use super::plan::{Content, Plan};
use crate::checkpoint::layout::{File, write_json};
use crate::checkpoint::safetensors::Checkpoint;
use crate::fp4::Bytes;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Held by the process that writes.
const LOCK: &str = "quantize.lock";
/// What is finished, and of what.
const NOTES: &str = "quantize.json";

/// How long another process may hold the lock before it counts as one that writes: a killed one does until the system has
/// taken its maps apart.
const PATIENCE: Duration = Duration::from_secs(3);

/// A folder under its partial name.
pub struct Partial<'a> {
    folder: &'a Path,
    lock: fs::File,
    notes: RefCell<Notes>,
    kept: usize,
}

/// Hashes are of the standard library's hasher: another version of this program begins anew.
#[derive(Serialize, Deserialize)]
struct Notes {
    /// Of source and options.
    of: String,
    /// The hash of each finished file.
    files: BTreeMap<String, String>,
}

impl<'a> Partial<'a> {
    /// Makes the folder or, if it is there, keeps of it the files of this plan that are whole, and removes the rest.
    ///
    /// # Errors
    /// [`Error::File`] where another process is writing it; [`Error::Io`].
    pub fn open(folder: &'a Path, source: &Checkpoint, config: &Value, plan: &Plan<'_>) -> Result<Self> {
        let io = |e| Error::io(folder, e, "");
        fs::create_dir_all(folder).map_err(io)?;
        let lock = fs::File::create(folder.join(LOCK)).map_err(io)?;
        take(&lock, folder)?;
        let of = identity(source, config)?;
        let found = fs::read(folder.join(NOTES)).ok();
        let found = found.and_then(|text| serde_json::from_slice::<Notes>(&text).ok());
        let mut files = match found {
            Some(notes) if notes.of == of => notes.files,
            _ => BTreeMap::new(),
        };
        files.retain(|name, hash| {
            let planned = plan.files.iter().find(|(planned, _)| planned == name);
            planned.is_some_and(|(_, file)| is_whole(&folder.join(name), file, hash))
        });
        for entry in fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name == LOCK || files.contains_key(&*name) {
                continue;
            }
            let removed = match path.is_dir() && !path.is_symlink() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.map_err(|e| Error::io(&path, e, "remove it"))?;
        }
        let partial = Self {
            folder,
            lock,
            kept: files.len(),
            notes: RefCell::new(Notes { of, files }),
        };
        partial.note()?;
        Ok(partial)
    }

    pub fn folder(&self) -> &Path {
        self.folder
    }

    /// How many files were there.
    pub fn kept(&self) -> usize {
        self.kept
    }

    pub fn has(&self, name: &str) -> bool {
        self.notes.borrow().files.contains_key(name)
    }

    /// Lets `write` write a file under another name, which it loses when it is whole and on the disk.
    pub fn add(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (aside, path) = (
            self.folder.join(format!("{name}.incomplete")),
            self.folder.join(name),
        );
        write(&aside)?;
        let hash = hash_of(&Bytes::map_file(&aside)?);
        fs::rename(&aside, &path).map_err(|e| Error::io(&path, e, ""))?;
        self.notes.borrow_mut().files.insert(name.to_string(), hash);
        self.note()
    }

    fn note(&self) -> Result<()> {
        let aside = self.folder.join(format!("{NOTES}.incomplete"));
        write_json(&aside, &json!(*self.notes.borrow()))?;
        fs::rename(&aside, self.folder.join(NOTES)).map_err(|e| Error::io(&aside, e, ""))
    }

    /// Gives the folder its name.
    pub fn finish(self, target: &Path) -> Result<()> {
        let remove = |name: &str| {
            let path = self.folder.join(name);
            fs::remove_file(&path).map_err(|e| Error::io(path, e, "remove it"))
        };
        remove(NOTES)?;
        drop(self.lock);
        remove(LOCK)?;
        fs::rename(self.folder, target).map_err(|e| Error::io(target, e, ""))
    }

    /// After an error: keeps the folder where there is something to continue with.
    pub fn give_up(self) {
        if self.notes.borrow().files.is_empty() {
            drop(self.lock);
            // The error that led here is the one to report.
            let _ = fs::remove_dir_all(self.folder);
        }
    }
}

/// Whether a file is the planned one, by its header, its size and the hash of its bytes.
fn is_whole(path: &Path, file: &File<Content<'_>>, hash: &str) -> bool {
    // Not where it leads elsewhere, or is empty and cannot be mapped.
    let is_file = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() > 0);
    let Some(bytes) = is_file.then(|| Bytes::map_file(path).ok()).flatten() else {
        return false;
    };
    let preamble = file.preamble();
    bytes.len() == preamble.len() + file.data_size()
        && bytes.starts_with(&preamble)
        && hash_of(&bytes) == hash
}

fn hash_of(bytes: &[u8]) -> String {
    let pieces = bytes.par_chunks(1 << 20).map(|piece| {
        let mut hasher = DefaultHasher::new();
        hasher.write(piece);
        hasher.finish()
    });
    let mut all = DefaultHasher::new();
    pieces.collect::<Vec<_>>().hash(&mut all);
    format!("{:016x}", all.finish())
}

/// Locks a folder for this process.
fn take(lock: &fs::File, folder: &Path) -> Result<()> {
    let since = Instant::now();
    loop {
        match lock.try_lock() {
            // A file system without locks: two at a time are the user's to avoid.
            Ok(()) | Err(fs::TryLockError::Error(_)) => return Ok(()),
            Err(fs::TryLockError::WouldBlock) if since.elapsed() < PATIENCE => {
                std::thread::sleep(PATIENCE / 30);
            }
            Err(fs::TryLockError::WouldBlock) => {
                let remedy = "wait for it, or choose another name";
                return Err(Error::file(folder, "another process is writing it", remedy));
            }
        }
    }
}

/// What tells sources and options apart: the new `config.json`, which holds the options; the source's files, their sizes
/// and times of change; its tensors, their shapes, and three pages of each.
fn identity(source: &Checkpoint, config: &Value) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    config.to_string().hash(&mut hasher);
    for path in source.files() {
        let found = fs::metadata(path).map_err(|e| Error::io(path, e, ""))?;
        let changed = found.modified().ok();
        (name_of(path), found.len(), changed).hash(&mut hasher);
    }
    let tensors: Vec<_> = source.tensors().collect();
    let hashes = tensors.par_iter().map(|(name, stored)| {
        let mut hasher = DefaultHasher::new();
        (name, format!("{:?}", stored.dtype), &stored.shape).hash(&mut hasher);
        let page = |start: usize| {
            let start = start.min(stored.bytes.len());
            &stored.bytes[start..stored.bytes.len().min(start + 4096)]
        };
        let len = stored.bytes.len();
        for start in [0, len / 2, len.saturating_sub(4096)] {
            hasher.write(page(start));
        }
        hasher.finish()
    });
    hashes.collect::<Vec<_>>().hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

fn name_of(path: &Path) -> PathBuf {
    path.file_name().map(PathBuf::from).unwrap_or_default()
}
