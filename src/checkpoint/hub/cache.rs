//! One repository's part of the cache, in the layout that Python's huggingface_hub reads and writes.
//!
//! ```text
//! models--org--name/blobs/<etag>                      the files
//! models--org--name/snapshots/<commit>/<file>         links to them
//! models--org--name/refs/<revision>                   the commit that a branch or tag stood for
//! models--org--name/.no_exist/<commit>/<file>         files that the commit is known not to hold
//! .locks/models--org--name/<etag>.lock                one writer a blob
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{HubSettings, PlannedFile, Progress, RepoId, gguf};
use crate::checkpoint::files::GGUF;
use crate::checkpoint::surplus::is_beyond;
use crate::{Error, Result};

pub(super) const CONFIG: &str = "config.json";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const TOKENIZER: &str = "tokenizer.json";
/// Besides the weights, a model cannot do without these.
pub(super) const REQUIRED: [&str; 2] = [CONFIG, TOKENIZER];
/// A model may come without these.
pub(super) const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    // Metal Marlin's: whether weights were rotated, which no other file may tell.
    "quantization_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// What the cache holds of a model.
pub(super) enum Held {
    /// All there is.
    Complete(PathBuf),
    /// All that is needed; whether the repository has optional files besides is not known.
    Usable(PathBuf),
    /// Not enough: this is missing.
    Partial(String),
}

pub(super) struct LocalRepo {
    repo: RepoId,
    layout: hf_hub::Cache,
    folder_name: String,
}

impl LocalRepo {
    pub(super) fn new(repo: &RepoId, settings: &HubSettings) -> Self {
        Self {
            repo: repo.clone(),
            layout: hf_hub::Cache::new(settings.cache.clone()),
            folder_name: repo.at(repo.revision()).folder_name(),
        }
    }

    fn folder(&self) -> PathBuf {
        self.layout.path().join(&self.folder_name)
    }

    fn layout(&self) -> hf_hub::CacheRepo {
        self.layout.repo(self.repo.at(self.repo.revision()))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout().pointer_path(commit)
    }

    fn blob(&self, etag: &str) -> PathBuf {
        self.layout().blob_path(etag)
    }

    /// Where a download grows. The name is this crate's own: what other programs leave as `<etag>.incomplete` may have
    /// holes, as they fetch in parallel pieces, and could not be told from a beginning without hashing it.
    fn partial(&self, etag: &str) -> PathBuf {
        self.layout().blob_path(&format!("{etag}.mmfp4.incomplete"))
    }

    /// The commit that the revision stood for last, as far as the cache knows.
    fn commit(&self) -> Option<String> {
        if let Some(commit) = self.repo.pinned_commit() {
            return Some(commit.to_string());
        }
        let commit = fs::read_to_string(self.folder().join("refs").join(self.repo.revision())).ok()?;
        is_commit(commit.trim()).then(|| commit.trim().to_string())
    }

    /// What there is of the revision, without a request.
    pub(super) fn held(&self) -> Result<Held> {
        let Some(commit) = self.commit() else {
            return Ok(Held::Partial("it".to_string()));
        };
        let snapshot = self.snapshot(&commit);
        let absent = self.folder().join(".no_exist").join(&commit);
        let settled = |name: &str| snapshot.join(name).is_file() || absent.join(name).is_file();
        let complete = |model: &Path| match OPTIONAL.iter().all(|name| settled(name)) {
            true => Held::Complete(model.to_path_buf()),
            false => Held::Usable(model.to_path_buf()),
        };
        let is_gguf = [SINGLE, INDEX].iter().all(|name| absent.join(name).is_file());
        if self.repo.quant().is_some() || is_gguf {
            let files = gguf_files(&snapshot);
            return Ok(match gguf::choose(&self.repo, &files) {
                Ok(files) => complete(&snapshot.join(&files[0])),
                Err(_) => Held::Partial("the one GGUF file".to_string()),
            });
        }
        let needed = REQUIRED.map(String::from);
        let weights = match snapshot.join(SINGLE).is_file() || !snapshot.join(INDEX).is_file() {
            true => vec![SINGLE.to_string()],
            // What no repository holds is no gap.
            false => (shards(&snapshot.join(INDEX))?.into_iter())
                .filter(|name| !absent.join(name).is_file())
                .collect(),
        };
        let missing = |name: &&String| !snapshot.join(name).is_file();
        Ok(match needed.iter().chain(&weights).find(missing) {
            Some(missing) => Held::Partial(format!("`{missing}`")),
            None => complete(&snapshot),
        })
    }

    /// What there is of the files that hold some tensors, without a request.
    pub(super) fn held_tensors(&self, names: &[String]) -> Result<Held> {
        let Some(commit) = self.commit() else {
            return Ok(Held::Partial("it".to_string()));
        };
        let snapshot = self.snapshot(&commit);
        let index = snapshot.join(INDEX);
        let needed = match snapshot.join(SINGLE).is_file() || !index.is_file() {
            true => vec![SINGLE.to_string()],
            false => {
                let shards = shards_of(&index, names)?;
                if let Some((name, _)) = names.iter().zip(&shards).find(|(_, shard)| shard.is_none()) {
                    return Ok(Held::Partial(format!("the tensor `{name}`")));
                }
                shards.into_iter().flatten().collect()
            }
        };
        let missing = |name: &&String| !snapshot.join(name).is_file();
        Ok(match needed.iter().find(missing) {
            Some(missing) => Held::Partial(format!("`{missing}`")),
            None => Held::Complete(snapshot),
        })
    }

    /// How many bytes of a file are here already.
    pub(super) fn present(&self, commit: &str, file: &PlannedFile) -> u64 {
        let PlannedFile { name, size, etag, .. } = file;
        let has_size = |path: &Path| length(path) == Some(*size);
        if has_size(&self.snapshot(commit).join(name)) || has_size(&self.blob(etag)) {
            return *size;
        }
        length(&self.partial(etag))
            .filter(|held| held <= size)
            .unwrap_or(0)
    }

    /// Puts a file into the snapshot; `fetch` brings it to the path it is given, where it is not here yet.
    pub(super) fn place(
        &self,
        commit: &str,
        file: &PlannedFile,
        progress: &mut dyn Progress,
        fetch: impl FnOnce(&Path, &mut dyn Progress) -> Result<()>,
    ) -> Result<()> {
        let PlannedFile { name, size, etag, .. } = file;
        let (pointer, size) = (self.snapshot(commit).join(name), *size);
        if length(&pointer) == Some(size) {
            return Ok(());
        }
        let blob = self.blob(etag);
        for file in [&blob, &pointer] {
            make_folder_of(file)?;
        }
        let _lock = self.lock(name, etag, progress)?;
        if length(&pointer) == Some(size) {
            return Ok(());
        }
        if length(&blob) != Some(size) {
            let partial = self.partial(etag);
            fetch(&partial, progress)?;
            let renamed = fs::rename(&partial, &blob);
            // Without working locks another process may have been first; its blob is as good.
            if length(&blob) != Some(size) {
                renamed.map_err(writing(&blob))?;
                let problem = "the finished download has not the size it should have";
                return Err(Error::file(blob, problem, "run the command again"));
            }
        }
        link(&blob, &pointer, name)
    }

    /// Waits until no other process downloads the same file. The lock ends with the value.
    fn lock(&self, name: &str, etag: &str, progress: &mut dyn Progress) -> Result<Option<File>> {
        let locks = self.layout.path().join(".locks").join(&self.folder_name);
        let path = locks.join(format!("{etag}.lock"));
        make_folder_of(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(writing(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {
                progress.note(&format!(
                    "{name}: another process is downloading it; waiting for that"
                ));
                file.lock().map_err(writing(&path))?;
                Ok(Some(file))
            }
            // A file system without locks. `Client::download` writes so that two writers do no harm.
            Err(TryLockError::Error(_)) => Ok(None),
        }
    }

    /// Notes which commit the revision stands for. Last of all: until then the old snapshot stays in use.
    pub(super) fn write_ref(&self, commit: &str) -> Result<()> {
        if self.repo.revision() == commit {
            return Ok(());
        }
        let path = self.folder().join("refs").join(self.repo.revision());
        if fs::read_to_string(&path).is_ok_and(|held| held == commit) {
            return Ok(());
        }
        make_folder_of(&path)?;
        // Written whole, then moved: a reader never sees half a hash (hf-hub's `create_ref` writes in place).
        let temporary = aside(&path);
        fs::write(&temporary, commit)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(writing(&path))
    }

    /// Notes that the commit holds no such file, so that nobody needs to ask again.
    pub(super) fn mark_absent(&self, commit: &str, name: &str) -> Result<()> {
        let path = self.folder().join(".no_exist").join(commit).join(name);
        make_folder_of(&path)?;
        File::create(&path).map(drop).map_err(writing(&path))
    }
}

/// The shards that an index names, each once.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let names: BTreeSet<String> = weight_map(index)?.into_values().collect();
    Ok(names.into_iter().collect())
}

/// Of the shards that an index names those of nothing but layers that a model of so many does not have.
pub(super) fn surplus_shards(index: &Path, layers: u64) -> Result<BTreeSet<String>> {
    let (surplus, needed): (BTreeMap<_, _>, BTreeMap<_, _>) =
        (weight_map(index)?.into_iter()).partition(|(tensor, _)| is_beyond(tensor, layers));
    let needed: BTreeSet<_> = needed.into_values().collect();
    Ok(surplus
        .into_values()
        .filter(|name| !needed.contains(name))
        .collect())
}

/// The shard of each of these tensors, by the index; `None` where it names none.
pub(super) fn shards_of(index: &Path, tensors: &[String]) -> Result<Vec<Option<String>>> {
    let map = weight_map(index)?;
    Ok(tensors.iter().map(|tensor| map.get(tensor).cloned()).collect())
}

/// The file of each tensor that an index names.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = fs::read(index).map_err(|error| Error::io(index, error, ""))?;
    let remedy = "the repository is at fault; choose another revision";
    let Index { weight_map } = serde_json::from_slice(&bytes)
        .map_err(|error| Error::file(index, format!("not an index of shards: {error}"), remedy))?;
    if weight_map.is_empty() {
        return Err(Error::file(index, "names no shards", remedy));
    }
    let mut names = weight_map.values();
    if let Some(name) = names.find(|name| !is_inside(name) || !name.ends_with(".safetensors")) {
        let problem =
            format!("names the shard `{name}`, which is not a .safetensors file inside the repository");
        return Err(Error::file(index, problem, remedy));
    }
    Ok(weight_map)
}

/// The GGUF files of a snapshot, by their paths in it; files lie in it or in folders of it.
fn gguf_files(snapshot: &Path) -> BTreeSet<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect::<Vec<_>>()
    };
    let mut files = BTreeSet::new();
    for name in names(snapshot) {
        let path = snapshot.join(&name);
        if path.is_dir() {
            files.extend(names(&path).into_iter().map(|file| format!("{name}/{file}")));
        } else {
            files.insert(name);
        }
    }
    files.retain(|name| name.ends_with(GGUF) && snapshot.join(name).is_file());
    files
}

/// Whether a name from a repository stays inside the folder it is joined to, on every system.
pub(super) fn is_inside(name: &str) -> bool {
    let plain = |part: Component| matches!(part, Component::Normal(_));
    !name.contains(['\\', ':', '\0'])
        && !name.split('/').any(|part| part.is_empty() || part == ".")
        && Path::new(name).components().all(plain)
}

pub(super) fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

fn length(path: &Path) -> Option<u64> {
    fs::metadata(path)
        .ok()
        .filter(|held| held.is_file())
        .map(|held| held.len())
}

fn make_folder_of(file: &Path) -> Result<()> {
    let folder = file.parent().unwrap_or(file);
    fs::create_dir_all(folder).map_err(writing(folder))
}

fn writing(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| {
        Error::io(
            path,
            error,
            "check the permissions, or set HF_HOME to a folder of your own",
        )
    }
}

/// Points `pointer` to `blob`: by a relative link, so that the cache can be moved as a whole, and made aside and then
/// moved, so that a reader of an earlier link never finds none.
fn link(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    let temporary = aside(pointer);
    make_link(blob, &temporary, name)
        .and_then(|()| fs::rename(&temporary, pointer))
        .map_err(writing(pointer))
}

/// A path beside `path` that no other writer uses.
fn aside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut temporary = path.as_os_str().to_owned();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    temporary.push(format!(".{}-{count}.tmp", std::process::id()));
    PathBuf::from(temporary)
}

#[cfg(unix)]
fn make_link(blob: &Path, pointer: &Path, name: &str) -> std::io::Result<()> {
    let up = "../".repeat(1 + name.split('/').count());
    let etag = blob.file_name().unwrap_or_default();
    std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(etag), pointer)
}

/// Symbolic links need a privilege on Windows; Python falls back to a copy there as well.
#[cfg(not(unix))]
fn make_link(blob: &Path, pointer: &Path, _name: &str) -> std::io::Result<()> {
    fs::hard_link(blob, pointer).or_else(|_| fs::copy(blob, pointer).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        for name in ["a.safetensors", "sub/a.safetensors", "..a", "a b"] {
            assert!(is_inside(name), "{name}");
        }
        for name in [
            "",
            "..",
            "../a",
            "a/../../b",
            "/a",
            "a//b",
            "./a",
            "a/.",
            "a/",
            "..\\a",
            "c:a",
            "a\0b",
        ] {
            assert!(!is_inside(name), "{name:?}");
        }
    }
}
