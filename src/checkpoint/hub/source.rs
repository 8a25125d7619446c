//! What a user may name as a model: a folder, a GGUF file, or a repository of the hub.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The revision that is meant where none is given.
const DEFAULT_REVISION: &str = "main";

/// Where a model's files are to come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder of this machine, or a GGUF file in one.
    Folder(PathBuf),
    /// A repository of the hub.
    Repo(RepoId),
}

impl ModelSource {
    /// Reads what the user wrote: a folder that exists always wins over a repository of the same name.
    ///
    /// # Errors
    /// [`Error::Argument`] if `model` is neither a folder, nor a GGUF file, nor a repository id.
    pub fn parse(model: &str) -> Result<Self> {
        let refuse = |found: String| {
            Err(Error::argument(
                "model",
                "model",
                "a folder that holds config.json, or a repository of the hub as `org/name` or `org/name@revision`, with \
                 `:QUANT` behind it for one of several GGUF files",
                found,
            ))
        };
        let path = Path::new(model);
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        if path.is_dir() || is_gguf && path.is_file() {
            return Ok(Self::Folder(path.to_path_buf()));
        }
        if path.is_file() {
            return refuse(format!("`{model}`, a file; give the folder that holds it"));
        }
        let looks_like_a_path = model.starts_with(['/', '.', '~'])
            || model.contains('\\')
            || model
                .split('@')
                .next()
                .is_some_and(|name| name.matches('/').count() > 1);
        if looks_like_a_path {
            return refuse(format!("`{model}`, a folder that does not exist; check the path"));
        }
        match RepoId::check(model) {
            Ok(repo) => Ok(Self::Repo(repo)),
            Err(problem) => refuse(format!("`{model}`: no such folder here, and {problem}")),
        }
    }
}

/// A model repository of the hub at one revision: `org/name`, or `org/name@revision`; of one with several models in GGUF,
/// `org/name:Q4_K_M` or `org/name@revision:Q4_K_M` tells which, as with llama.cpp.
///
/// The revision is a branch, a tag, `refs/pr/1` or a commit hash; `main` where none is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    name: String,
    revision: String,
    quant: Option<String>,
}

impl RepoId {
    /// Reads `org/name` or `org/name@revision`, either with or without `:QUANT` behind it.
    ///
    /// # Errors
    /// [`Error::Argument`] for anything else. The rules are those of Python's huggingface_hub, except
    /// that the organisation is required.
    pub fn parse(text: &str) -> Result<Self> {
        Self::check(text).map_err(|problem| {
            Error::argument(
                "model",
                "repository",
                "`org/name` or `org/name@revision`",
                format!("`{text}`: {problem}"),
            )
        })
    }

    fn check(text: &str) -> Result<Self, String> {
        let (text, quant) = match text.split_once(':') {
            Some((text, quant)) => (text, Some(quant)),
            None => (text, None),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if let Some(quant) = quant.filter(|quant| quant.is_empty() || !quant.chars().all(plain)) {
            return Err(format!(
                "`{quant}` is not the name of a quantisation, such as Q4_K_M"
            ));
        }
        let (name, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() != 2 {
            return Err("a repository id is `org/name`, with one `/`".to_string());
        }
        for part in parts {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if part.is_empty() || !part.chars().all(allowed) {
                return Err(
                    "both halves of `org/name` consist of letters, digits, `-`, `_` and `.`".to_string(),
                );
            }
            if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) || part.ends_with(".git") {
                return Err(
                    "neither half of `org/name` begins or ends with `-` or `.`, or ends with `.git`"
                        .to_string(),
                );
            }
        }
        if name.len() > 96 || name.contains("--") || name.contains("..") {
            return Err(
                "a repository id has at most 96 characters, and neither `--` nor `..` among them".to_string(),
            );
        }
        // The revision becomes a path under refs/ and a part of a URL.
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+');
        let odd_part = |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with(".lock");
        if !revision.chars().all(allowed) || revision.contains("..") || revision.split('/').any(odd_part) {
            return Err(format!(
                "the revision `{revision}` is not the name of a branch, a tag or a commit"
            ));
        }
        Ok(Self {
            name: name.to_string(),
            revision: revision.to_string(),
            quant: quant.map(str::to_string),
        })
    }

    /// `org/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Which of several GGUF files is meant, by the end of its name.
    pub fn quant(&self) -> Option<&str> {
        self.quant.as_deref()
    }

    /// The commit, where the revision is a full commit hash and names it itself.
    pub(super) fn pinned_commit(&self) -> Option<&str> {
        let is_hash = self.revision.len() == 40 && self.revision.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then_some(self.revision.as_str())
    }

    /// The same repository in hf-hub's terms, for its URL parts and folder names.
    pub(super) fn at(&self, revision: &str) -> hf_hub::Repo {
        hf_hub::Repo::with_revision(self.name.clone(), hf_hub::RepoType::Model, revision.to_string())
    }

    /// An error about this repository.
    pub(super) fn error(&self, problem: impl Into<String>, remedy: impl Into<String>) -> Error {
        Error::Hub {
            repo: self.to_string(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        if let Some(quant) = &self.quant {
            write!(f, ":{quant}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_ids() {
        for (text, name, revision) in [
            ("org/name", "org/name", "main"),
            ("org/name@v1.0", "org/name", "v1.0"),
            ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
            ("zai-org/GLM-4.7-Flash", "zai-org/GLM-4.7-Flash", "main"),
        ] {
            let repo = RepoId::parse(text).unwrap();
            assert_eq!((repo.name(), repo.revision()), (name, revision), "{text}");
        }
        for text in [
            "",
            "name",
            "/name",
            "org/",
            "a/b/c",
            "org/na me",
            "org/na--me",
            "org/na..me",
            "-org/name",
            "org/name.",
            "org/name.git",
            "org/name@",
            "org/name@../x",
            "org/name@a//b",
            "org/name@/a",
            "org/name@a b",
            "org/name@.x",
            "org/name@a@b",
            "org/name@a%2Fb",
            "org/name:",
            "org/name:a/b",
            "org/name:a:b",
            "org:a/name",
            "örg/name",
        ] {
            let error = RepoId::parse(text).unwrap_err().to_string();
            assert!(error.contains("expected `org/name` or"), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(RepoId::parse(&format!("o/{}", "n".repeat(95))).is_err());
        for (text, revision, quant) in [
            ("o/n:Q4_K_M", "main", Some("Q4_K_M")),
            ("o/n@v1:UD-Q4_K_XL", "v1", Some("UD-Q4_K_XL")),
            ("o/n@v1", "v1", None),
        ] {
            let repo = RepoId::parse(text).unwrap();
            assert_eq!((repo.revision(), repo.quant()), (revision, quant), "{text}");
            assert_eq!(repo.to_string(), text);
        }
        assert_eq!(RepoId::parse("o/n@main").unwrap().to_string(), "o/n");
        assert_eq!(RepoId::parse("o/n@v1").unwrap().to_string(), "o/n@v1");
    }

    #[test]
    fn a_commit_hash_pins() {
        let hash = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(
            RepoId::parse(&format!("o/n@{hash}")).unwrap().pinned_commit(),
            Some(hash)
        );
        assert_eq!(RepoId::parse("o/n@0123456").unwrap().pinned_commit(), None);
    }

    #[test]
    fn what_is_neither_says_so() {
        for (text, expected) in [
            ("./nowhere", "a folder that does not exist"),
            ("/nowhere/at/all", "a folder that does not exist"),
            ("a/b/c", "a folder that does not exist"),
            (
                "nowhere",
                "no such folder here, and a repository id is `org/name`",
            ),
        ] {
            let error = ModelSource::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert_eq!(
            ModelSource::parse("org/name@v1").unwrap(),
            ModelSource::Repo(RepoId::parse("org/name@v1").unwrap())
        );
    }

    #[test]
    fn a_folder_wins() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().to_str().unwrap();
        assert_eq!(
            ModelSource::parse(text).unwrap(),
            ModelSource::Folder(folder.path().to_path_buf())
        );
        // Relative to the package's root, where tests run: `src/checkpoint` could be a repository id as well.
        assert_eq!(
            ModelSource::parse("src/checkpoint").unwrap(),
            ModelSource::Folder(PathBuf::from("src/checkpoint"))
        );
        let file = folder.path().join("config.json");
        std::fs::write(&file, "{}").unwrap();
        let error = ModelSource::parse(file.to_str().unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains("give the folder that holds it"), "{error}");
    }
}
