//! Models by repository name: the hub's files, in the cache that every Hugging Face program shares.
//!
//! ```no_run
//! use candle_mmfp4::checkpoint::hub::{self, HubSettings, ModelSource};
//!
//! # fn main() -> candle_mmfp4::Result<()> {
//! let folder = match ModelSource::parse("zai-org/GLM-4.7-Flash@main")? {
//!     ModelSource::Folder(folder) => folder,
//!     ModelSource::Repo(repo) => hub::fetch(&repo, &HubSettings::from_env()?, &mut ())?,
//! };
//! # Ok(())
//! # }
//! ```
//!
//! The folder that [`fetch`] gives holds config.json, tokenizer.json, the weights (model.safetensors, or the index and
//! the shards that it names, and no others) and, where the repository has them, generation_config.json,
//! tokenizer_config.json and chat_template.jinja. A complete snapshot in the cache is used without a request; set
//! [`HubSettings::refresh`] to ask whether a branch has moved.
//!
//! # What hf-hub does, and what is done here
//!
//! hf-hub 0.5 gives the cache's layout ([`hf_hub::Cache`]), the parts of the URLs ([`hf_hub::Repo`]) and the shape of
//! the hub's description of a repository. Its own download (`Api::repo(..).download`) is not used, because it
//! - never compares the size of what it has with what the hub stated;
//! - resumes by appending whatever comes, also when the server answers a range with the whole file, and after a failed
//!   first attempt asks for byte 0 again and appends that;
//! - has no timeouts, waits five seconds for another process and then fails, and writes refs in place;
//! - turns `X-Error-Code` (gated, no such revision, no such file) into a bare status number;
//! - knows neither `HF_HUB_CACHE`, `HF_TOKEN` nor `HF_HUB_OFFLINE` (see [`HubSettings`]).
//!
//! So requests, redirects, retries, resumption, the size check and locks are here, on the same `ureq`. Sizes are
//! checked, hashes are not. Partial files end in `.mmfp4.incomplete`: those of other programs are left alone, as they may
//! have holes; current versions of huggingface_hub leave none that could be resumed.

mod cache;
mod client;
mod headers;
mod plan;
mod settings;
mod source;

use std::collections::BTreeSet;
use std::path::PathBuf;

pub use headers::headers;
pub use plan::{Plan, PlannedFile, machine_memory};
pub use settings::HubSettings;
pub use source::{ModelSource, RepoId};

use super::disk;
use crate::{Error, Result};
use cache::{CONFIG, Held, INDEX, LocalRepo, OPTIONAL, REQUIRED, SINGLE};
use client::{Client, Failure};

/// Watches a download. Every method has a default that does nothing; `()` watches nothing.
pub trait Progress {
    /// The plan is made and nothing of it fetched yet but config.json and the index: the place to say
    /// [`Plan::advice`], or to ask the user.
    ///
    /// # Errors
    /// An error ends the download before it begins; [`fetch`] returns it.
    fn start(&mut self, plan: &Plan) -> Result<()> {
        let _ = plan;
        Ok(())
    }

    /// A file begins: its name, its size and the bytes that are here already. It may begin again, with fewer bytes, if
    /// the server cannot continue it.
    fn file(&mut self, name: &str, size: u64, present: u64) {
        let _ = (name, size, present);
    }

    /// This many more bytes of the current file have arrived.
    fn advance(&mut self, bytes: u64) {
        let _ = bytes;
    }

    /// A line about what is going on: a broken connection that is tried again, a wait for another process.
    fn note(&mut self, message: &str) {
        let _ = message;
    }

    /// All files are in place.
    fn done(&mut self) {}
}

impl Progress for () {}

/// Brings a model into the cache and returns the folder that holds it.
///
/// Nothing is requested where the cache holds all there is. Otherwise the plan is made, the disk space checked, and each
/// missing file fetched: continued where an earlier run stopped, tried again when the connection breaks, checked for
/// size, and moved into place when it is whole. If the hub does not answer but the cache holds all that is needed, that
/// is used.
///
/// # Errors
/// [`Error::Hub`] for whatever the hub refuses, for a hub out of reach, for a file that breaks off or has the wrong
/// size, and for a disk too small; [`Error::Io`] for the cache; [`Error::File`] for a config.json or an index that makes
/// no sense; whatever [`Progress::start`] returns. Each is one line that says what to do.
pub fn fetch(repo: &RepoId, settings: &HubSettings, progress: &mut dyn Progress) -> Result<PathBuf> {
    let session = Session::new(repo, settings);
    let held = session.local.held()?;
    let fallback = match held {
        Held::Complete(snapshot) if !settings.refresh || settings.offline => return Ok(snapshot),
        Held::Usable(snapshot) if settings.offline => return Ok(snapshot),
        Held::Partial(missing) if settings.offline => return Err(session.offline(&missing)),
        Held::Complete(snapshot) | Held::Usable(snapshot) => Some(snapshot),
        Held::Partial(_) => None,
    };
    let plan = match (session.plan(), fallback) {
        (Ok(plan), _) => plan,
        (Err(Failure::Transient { .. }), Some(snapshot)) => return Ok(snapshot),
        (Err(failure), _) => return Err(session.client.give_up(failure)),
    };
    plan.check_space(settings)?;
    progress.start(&plan)?;
    for file in &plan.files {
        session.fetch(&plan.commit, file, progress)?;
    }
    for name in OPTIONAL {
        if !plan.files.iter().any(|file| file.name == name) {
            session.local.mark_absent(&plan.commit, name)?;
        }
    }
    session.local.write_ref(&plan.commit)?;
    progress.done();
    Ok(plan.snapshot)
}

/// What [`fetch`] would do. Of the files only config.json and the index are fetched, since they say which others are
/// needed.
///
/// # Errors
/// As for [`fetch`], except that the disk space is reported and not checked. Offline there is nothing to plan from.
pub fn plan(repo: &RepoId, settings: &HubSettings) -> Result<Plan> {
    let session = Session::new(repo, settings);
    if settings.offline {
        return Err(session.offline("a list of its files"));
    }
    session.plan().map_err(|failure| session.client.give_up(failure))
}

struct Session<'a> {
    repo: &'a RepoId,
    settings: &'a HubSettings,
    local: LocalRepo,
    client: Client<'a>,
}

impl<'a> Session<'a> {
    fn new(repo: &'a RepoId, settings: &'a HubSettings) -> Self {
        Self {
            repo,
            settings,
            local: LocalRepo::new(repo, settings),
            client: Client::new(repo, settings),
        }
    }

    fn plan(&self) -> Result<Plan, Failure> {
        let info = self.client.info()?;
        if !cache::is_commit(&info.sha) {
            let problem = format!("its commit is said to be `{}`", info.sha.escape_debug());
            return Err(self.repo.error(problem, "check HF_ENDPOINT and the proxy").into());
        }
        let commit = info.sha;
        let listed: BTreeSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        for name in REQUIRED {
            if !listed.contains(name) {
                return Err(self.missing(name, &listed).into());
            }
        }
        let snapshot = self.local.snapshot(&commit);
        let mut files = vec![self.client.describe(&commit, CONFIG)?];
        self.fetch(&commit, &files[0], &mut ())?;
        let config = snapshot.join(CONFIG);
        let text = std::fs::read(&config).map_err(|error| Error::io(&config, error, ""))?;
        let config = serde_json::from_slice(&text).map_err(|error| {
            let remedy = "the repository is at fault; choose another revision";
            Error::file(config, format!("not JSON: {error}"), remedy)
        })?;

        // One file goes before an index, as in transformers.
        let weights = if listed.contains(SINGLE) {
            vec![SINGLE.to_string()]
        } else if listed.contains(INDEX) {
            let index = self.client.describe(&commit, INDEX)?;
            self.fetch(&commit, &index, &mut ())?;
            files.push(index);
            cache::shards(&snapshot.join(INDEX))?
        } else {
            return Err(self.missing(SINGLE, &listed).into());
        };
        if let Some(name) = weights.iter().find(|name| !listed.contains(*name)) {
            return Err(self.missing(name, &listed).into());
        }

        let others = REQUIRED.into_iter().filter(|&name| name != CONFIG);
        let optional = OPTIONAL.into_iter().filter(|&name| listed.contains(name));
        for name in others.chain(optional).chain(weights.iter().map(String::as_str)) {
            files.push(self.client.describe(&commit, name)?);
        }
        for file in &mut files {
            file.cached = self.local.present(&commit, file);
        }
        let free = self.settings.free_space;
        Ok(Plan {
            repo: self.repo.clone(),
            commit,
            snapshot,
            files,
            free: free.or_else(|| disk::free_space(&self.settings.cache)),
            config,
        })
    }

    fn fetch(&self, commit: &str, file: &PlannedFile, progress: &mut dyn Progress) -> Result<()> {
        self.local.place(commit, file, progress, |partial, progress| {
            self.client
                .download(commit, &file.name, file.size, partial, progress)
        })
    }

    fn missing(&self, name: &str, listed: &BTreeSet<String>) -> Error {
        let page = format!("{}/{}", self.settings.endpoint, self.repo.name());
        let remedy = if listed.iter().any(|file| file.ends_with(".gguf")) {
            "it holds GGUF files, which are not read here; choose the safetensors repository of the same model"
                .to_string()
        } else {
            format!(
                "choose a repository or a revision with a whole safetensors checkpoint; its files: {page}/tree/main"
            )
        };
        self.repo.error(
            format!("the repository holds no `{name}`, which the model needs"),
            remedy,
        )
    }

    fn offline(&self, missing: &str) -> Error {
        self.repo.error(
            format!(
                "{missing} is not in the cache ({}), and HF_HUB_OFFLINE forbids to fetch it",
                self.settings.cache.display()
            ),
            "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) and run the command once online",
        )
    }
}
