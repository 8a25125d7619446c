//! A model's files, wherever they are.

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
    memory: Option<BTreeMap<String, Bytes>>,
}

impl ModelFiles {
    /// The files of a folder. Nothing is read yet.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self {
            root: path.into(),
            memory: None,
        }
    }

    /// Files in memory; messages call them `<name>/<file>`.
    pub fn in_memory<S: Into<String>>(name: &str, files: impl IntoIterator<Item = (S, Bytes)>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.into(), bytes));
        Self {
            root: name.into(),
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
    /// [`Error::Io`] where it is not there or cannot be read.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        match &self.memory {
            Some(_) => Ok(self.map(name)?.to_vec()),
            None => {
                let path = self.path(name);
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
            None => Bytes::map_file(self.path(name)),
        }
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
    fn text_that_is_none() {
        let files = ModelFiles::in_memory("held", [("a.json", Bytes::copy_from(&[0xff]).unwrap())]);
        let error = files.text_if_present("a.json").unwrap_err().to_string();
        assert!(error.starts_with("held/a.json: not UTF-8"), "{error}");
    }
}
