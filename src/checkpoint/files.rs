//! A model's files, wherever they are.

use super::safetensors::{INDEX, SINGLE};
use crate::fp4::Bytes;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// The files of a model by name: those of a folder, or some that a program holds in memory.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::checkpoint::ModelFiles;
/// use candle_mmfp4::fp4::Bytes;
/// use candle_mmfp4::generation::Pipeline;
///
/// // In a program of one's own: include_bytes!("my-model/config.json").
/// let config = Bytes::copy_from(br#"{"model_type": "llama"}"#)?;
/// let files = ModelFiles::in_memory("my model", [("config.json", config)]);
/// let error = Pipeline::from_files(&files, &Default::default(), &Device::Cpu).unwrap_err();
/// assert!(error.to_string().contains("model_type"));
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ModelFiles {
    root: PathBuf,
    /// The GGUF file that was asked for by its name.
    chosen: Option<String>,
    memory: Option<BTreeMap<String, Bytes>>,
}

impl ModelFiles {
    /// The files of a folder; of one with several models in GGUF, the path of a `.gguf` file tells which. Nothing is read
    /// yet.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let (root, chosen) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if is_gguf_file(&path) => {
                // Of a bare name the parent is empty.
                let here = parent.as_os_str().is_empty();
                let parent = if here { Path::new(".") } else { parent };
                (parent.to_path_buf(), name.to_str().map(str::to_string))
            }
            _ => (path, None),
        };
        Self {
            root,
            chosen,
            memory: None,
        }
    }

    /// Files in memory; messages call them `<name>/<file>`.
    pub fn in_memory<S: Into<String>>(name: &str, files: impl IntoIterator<Item = (S, Bytes)>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.into(), bytes));
        Self {
            root: name.into(),
            chosen: None,
            memory: Some(files.collect()),
        }
    }

    /// The folder, or the name of what is in memory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What messages call a file; its path, where this is a folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Whether there is such a file.
    pub fn contains(&self, name: &str) -> bool {
        match &self.memory {
            Some(files) => files.contains_key(name),
            None => self.path(name).exists(),
        }
    }

    /// The contents of a small file.
    ///
    /// # Errors
    /// [`Error::Io`] where it is not there or cannot be read, [`Error::File`] where it is no file.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        match &self.memory {
            Some(_) => Ok(self.map(name)?.to_vec()),
            None => {
                let path = self.path(name);
                check_ordinary(&path)?;
                std::fs::read(&path).map_err(|e| Error::io(path, e, format!("the model needs its {name}")))
            }
        }
    }

    /// The text of a small file that need not be there.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::File`] where it is not UTF-8.
    pub(crate) fn text_if_present(&self, name: &str) -> Result<Option<String>> {
        if !self.contains(name) {
            return Ok(None);
        }
        String::from_utf8(self.read(name)?)
            .map(Some)
            .map_err(|e| Error::file(self.path(name), format!("not UTF-8: {e}"), "fetch the file again"))
    }

    /// A file where it lies: mapped, or in the memory it is in.
    pub(super) fn map(&self, name: &str) -> Result<Bytes> {
        match &self.memory {
            Some(files) => files.get(name).cloned().ok_or_else(|| {
                let missing = io::Error::from(io::ErrorKind::NotFound);
                Error::io(self.path(name), missing, format!("the model needs its {name}"))
            }),
            None => {
                let path = self.path(name);
                check_ordinary(&path)?;
                Bytes::map_file(path)
            }
        }
    }

    /// Whether the weights are those of GGUF files.
    pub(crate) fn is_gguf(&self) -> bool {
        let safetensors = || [SINGLE, INDEX].iter().any(|name| self.contains(name));
        self.chosen.is_some() || !safetensors() && !self.names_ending(&[GGUF]).is_empty()
    }

    /// The names of the GGUF file, or of the parts of one, in their order.
    ///
    /// # Errors
    /// [`Error::File`] where there are several, and none was asked for, or where parts are missing.
    pub(super) fn gguf_files(&self) -> Result<Vec<String>> {
        let mut all = self.names_ending(&[GGUF]);
        all.sort();
        let first = match (&self.chosen, &all[..]) {
            (Some(chosen), _) => chosen,
            (None, [first]) => first,
            (None, [first, rest @ ..]) => {
                let of_one =
                    |first: Part<'_>| rest.iter().all(|name| Part::of(name).as_ref() == Some(&first));
                if !Part::of(first).is_some_and(of_one) {
                    let problem = format!("several GGUF files in it: {}", all.join(", "));
                    return Err(Error::file(&self.root, problem, "give the path of one"));
                }
                first
            }
            (None, []) => return Ok(Vec::new()),
        };
        let Some(part) = Part::of(first) else {
            return Ok(vec![first.clone()]);
        };
        let names = (1..=part.of).map(|number| part.name(number));
        names
            .map(|name| match self.contains(&name) {
                true => Ok(name),
                false => {
                    let problem = format!("one of the {} parts of the model, and it is not there", part.of);
                    Err(Error::file(self.path(&name), problem, "fetch it"))
                }
            })
            .collect()
    }

    /// The names that end in one of `endings`.
    pub(super) fn names_ending(&self, endings: &[&str]) -> Vec<String> {
        let names: Vec<String> = match &self.memory {
            Some(files) => files.keys().cloned().collect(),
            None => std::fs::read_dir(&self.root)
                .into_iter()
                .flatten()
                .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
                .collect(),
        };
        let ends = |name: &String| endings.iter().any(|end| name.ends_with(end));
        names.into_iter().filter(ends).collect()
    }

    /// Refuses a folder that is not there: better than what any one of its files would say.
    pub(crate) fn check(&self) -> Result<()> {
        if self.memory.is_some() || self.root.is_dir() {
            return Ok(());
        }
        Err(Error::file(
            &self.root,
            "no such folder",
            "give the path of a model folder",
        ))
    }
}

pub(super) const GGUF: &str = ".gguf";

/// Refuses what would be read for ever, a pipe or a device; what is not there, opening it tells.
fn check_ordinary(path: &Path) -> Result<()> {
    match path.metadata() {
        Ok(found) if !found.is_file() => {
            let problem = "no ordinary file, nor a link to one";
            Err(Error::file(path, problem, "put the model's own file there"))
        }
        _ => Ok(()),
    }
}

fn is_gguf_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf") && path.is_file()
}

/// The files that a large GGUF model is split into, by the name of one: `stem-00001-of-00003.gguf`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part<'a> {
    pub stem: &'a str,
    pub of: usize,
}

impl<'a> Part<'a> {
    /// What a file is a part of; `None` for one that is whole.
    pub fn of(name: &'a str) -> Option<Self> {
        let (rest, of) = name.strip_suffix(GGUF)?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let parse = |text: &str| (text.len() == 5).then(|| text.parse::<usize>().ok()).flatten();
        let (number, of) = (parse(number)?, parse(of)?);
        (1..=of).contains(&number).then_some(Self { stem, of })
    }

    /// The name of a part, counted from 1.
    pub fn name(&self, number: usize) -> String {
        format!("{}-{number:05}-of-{:05}{GGUF}", self.stem, self.of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_folder_answer_alike() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let on_disk = ModelFiles::folder(folder.path());
        let held = ModelFiles::in_memory("held", [("config.json", Bytes::copy_from(b"{}").unwrap())]);
        for files in [on_disk, held] {
            assert!(files.check().is_ok());
            assert!(files.contains("config.json") && !files.contains("tokenizer.json"));
            assert_eq!(files.read("config.json").unwrap(), b"{}");
            assert_eq!(&*files.map("config.json").unwrap(), b"{}");
            assert_eq!(files.text_if_present("tokenizer.json").unwrap(), None);
            assert_eq!(files.names_ending(&[".json", ".bin"]), ["config.json"]);
            let error = files.read("tokenizer.json").unwrap_err().to_string();
            let path = files.path("tokenizer.json").display().to_string();
            assert!(error.starts_with(&path), "{error}");
            assert!(error.ends_with("; the model needs its tokenizer.json"), "{error}");
        }
        assert!(ModelFiles::folder("no/such/folder").check().is_err());
    }

    #[test]
    fn gguf_files_are_found_and_parts_counted() {
        let held = |names: &[&str]| {
            let empty = |name: &&str| (name.to_string(), Bytes::copy_from(&[]).unwrap());
            ModelFiles::in_memory("held", names.iter().map(empty))
        };
        let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
        assert_eq!(held(&parts).gguf_files().unwrap(), parts);
        assert_eq!(held(&["b.gguf"]).gguf_files().unwrap(), ["b.gguf"]);
        assert!(held(&["b.gguf"]).is_gguf() && !held(&["b.gguf", SINGLE]).is_gguf());
        for (names, part) in [
            (&["a.gguf", "b.gguf"][..], "a.gguf, b.gguf"),
            (&[parts[0], "n-00001-of-00001.gguf"], "several"),
            (&parts[..1], parts[1]),
        ] {
            let error = held(names).gguf_files().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        // Of several, the one whose path was given, with the folder's other files.
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.gguf", "b.gguf", "tokenizer.json"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let files = ModelFiles::folder(folder.path().join("b.gguf"));
        assert!(files.check().is_ok() && files.is_gguf() && files.contains("tokenizer.json"));
        assert_eq!(files.gguf_files().unwrap(), ["b.gguf"]);
    }

    #[test]
    fn text_that_is_none() {
        let files = ModelFiles::in_memory("held", [("a.json", Bytes::copy_from(&[0xff]).unwrap())]);
        let error = files.text_if_present("a.json").unwrap_err().to_string();
        assert!(error.starts_with("held/a.json: not UTF-8"), "{error}");
    }
}
