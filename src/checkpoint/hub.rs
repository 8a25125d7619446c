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
//! quantization_config.json, tokenizer_config.json and chat_template.jinja. Of a repository of GGUF files it is the path of
//! the one that was asked for, beside its other parts. A complete snapshot in the cache is used without a request; set
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
mod gguf;
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
use super::files::GGUF;
use super::surplus::layers_told;
use crate::{Error, Result};
use cache::{CONFIG, Held, INDEX, LocalRepo, OPTIONAL, REQUIRED, SINGLE, TOKENIZER};
use client::{Client, Failure};
use serde_json::Value;

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

/// Brings a model into the cache and returns the folder that holds it, or the GGUF file that it is in: what
/// [`ModelFiles::folder`](super::ModelFiles::folder) takes. A repository's GGUF files are taken where it has no safetensors
/// checkpoint, or where [`RepoId::quant`] asks for one.
///
/// Nothing is requested where the cache holds all there is. Otherwise the plan is made, the disk space checked, and each
/// missing file fetched: continued where an earlier run stopped, tried again when the connection breaks, checked for
/// size, and moved into place when it is whole. If the hub does not answer but the cache holds all that is needed, that
/// is used.
///
/// # Errors
/// [`Error::Hub`] for whatever the hub refuses, for a hub out of reach, for a file that breaks off or has the wrong
/// size, for a disk too small, and for several models in GGUF of which none was chosen; [`Error::Io`] for the cache;
/// [`Error::File`] for a config.json or an index that makes no sense; whatever [`Progress::start`] returns. Each is one line
/// that says what to do.
pub fn fetch(repo: &RepoId, settings: &HubSettings, progress: &mut dyn Progress) -> Result<PathBuf> {
    let session = Session::new(repo, settings);
    let held = session.local.held()?;
    session.obtain(held, Session::plan, progress)
}

/// As [`fetch`], of a safetensors checkpoint the index and those of its files only that hold the tensors `names`: what
/// [`LoadOptions::base`](super::LoadOptions::base) needs.
///
/// # Errors
/// As for [`fetch`]; and [`Error::Hub`] for a tensor that the index does not list.
pub fn fetch_tensors(
    repo: &RepoId,
    settings: &HubSettings,
    names: &[String],
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let session = Session::new(repo, settings);
    let held = session.local.held_tensors(names)?;
    session.obtain(held, |session| session.plan_tensors(names), progress)
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

/// Those of some names that a repository does not list.
fn absent(names: &[&str], listed: &BTreeSet<String>) -> Vec<String> {
    let names = names.iter().filter(|name| !listed.contains(**name));
    names.map(|name| name.to_string()).collect()
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

    /// Brings what is planned, unless the cache has it.
    fn obtain(
        &self,
        held: Held,
        plan: impl FnOnce(&Self) -> Result<Plan, Failure>,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf> {
        let settings = self.settings;
        let fallback = match held {
            Held::Complete(model) if !settings.refresh || settings.offline => return Ok(model),
            Held::Usable(model) if settings.offline => return Ok(model),
            Held::Partial(missing) if settings.offline => return Err(self.offline(&missing)),
            Held::Complete(model) | Held::Usable(model) => Some(model),
            Held::Partial(_) => None,
        };
        let plan = match (plan(self), fallback) {
            (Ok(plan), _) => plan,
            (Err(Failure::Transient { .. }), Some(model)) => return Ok(model),
            (Err(failure), _) => return Err(self.client.give_up(failure)),
        };
        plan.check_space(settings)?;
        progress.start(&plan)?;
        for file in &plan.files {
            self.fetch(&plan.commit, file, progress)?;
        }
        for name in &plan.absent {
            self.local.mark_absent(&plan.commit, name)?;
        }
        self.local.write_ref(&plan.commit)?;
        progress.done();
        Ok(plan.target())
    }

    /// The revision's commit, and the names of its files.
    fn listing(&self) -> Result<(String, BTreeSet<String>), Failure> {
        let info = self.client.info()?;
        if !cache::is_commit(&info.sha) {
            let problem = format!("its commit is said to be `{}`", info.sha.escape_debug());
            return Err(self.repo.error(problem, "check HF_ENDPOINT and the proxy").into());
        }
        Ok((
            info.sha,
            info.siblings.into_iter().map(|file| file.rfilename).collect(),
        ))
    }

    fn plan(&self) -> Result<Plan, Failure> {
        let (commit, listed) = self.listing()?;
        let has_safetensors = [SINGLE, INDEX].iter().any(|name| listed.contains(*name));
        if gguf::is_meant(self.repo, has_safetensors, &listed) {
            return self.plan_gguf(commit, &listed);
        }
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

        let mut absent = absent(&OPTIONAL, &listed);
        // One file goes before an index, as in transformers.
        let weights = if listed.contains(SINGLE) {
            vec![SINGLE.to_string()]
        } else {
            let path = self.index(&commit, &listed, &mut files)?;
            let mut shards = cache::shards(&path)?;
            if let Some(layers) = layers_told(&config) {
                let surplus = cache::surplus_shards(&path, layers)?;
                absent.extend(surplus.into_iter().filter(|name| !listed.contains(name)));
                shards.retain(|name| !absent.contains(name));
            }
            shards
        };
        if let Some(name) = weights.iter().find(|name| !listed.contains(*name)) {
            return Err(self.missing(name, &listed).into());
        }
        let others = REQUIRED.into_iter().filter(|&name| name != CONFIG);
        let optional = OPTIONAL.into_iter().filter(|&name| listed.contains(name));
        let others = others.chain(optional).chain(weights.iter().map(String::as_str));
        self.planned(commit, files, others, config, absent)
    }

    /// The plan for a model in GGUF, which needs nothing beside it; a tokenizer that lies there goes before its own.
    fn plan_gguf(&self, commit: String, listed: &BTreeSet<String>) -> Result<Plan, Failure> {
        let weights = gguf::choose(self.repo, listed)?;
        if let Some(name) = weights.iter().find(|name| !cache::is_inside(name)) {
            let problem = format!("it holds a file `{}`, outside of itself", name.escape_debug());
            return Err(self.repo.error(problem, "check HF_ENDPOINT and the proxy").into());
        }
        let beside = OPTIONAL
            .into_iter()
            .chain([TOKENIZER])
            .filter(|&name| listed.contains(name));
        let names = beside.chain(weights.iter().map(String::as_str));
        let mut absent = absent(&OPTIONAL, listed);
        if self.repo.quant().is_none() {
            // Next time the cache alone tells that a GGUF file is meant, and that it is the only one.
            absent.extend([SINGLE, INDEX].map(String::from));
        }
        self.planned(commit, Vec::new(), names, Value::Null, absent)
    }

    /// The plan for the files that hold some tensors.
    fn plan_tensors(&self, names: &[String]) -> Result<Plan, Failure> {
        let (commit, listed) = self.listing()?;
        let mut files = Vec::new();
        let weights = if listed.contains(SINGLE) {
            BTreeSet::from([SINGLE.to_string()])
        } else {
            let shards = cache::shards_of(&self.index(&commit, &listed, &mut files)?, names)?;
            if let Some((name, _)) = names.iter().zip(&shards).find(|(_, shard)| shard.is_none()) {
                let problem = format!("its index lists no tensor `{name}`");
                let remedy = "name the original that the checkpoint was made from";
                return Err(self.repo.error(problem, remedy).into());
            }
            shards.into_iter().flatten().collect()
        };
        if let Some(name) = weights.iter().find(|name| !listed.contains(*name)) {
            return Err(self.missing(name, &listed).into());
        }
        let names = weights.iter().map(String::as_str);
        self.planned(commit, files, names, Value::Null, Vec::new())
    }

    /// Fetches the index, which joins `files`, and gives its path.
    fn index(
        &self,
        commit: &str,
        listed: &BTreeSet<String>,
        files: &mut Vec<PlannedFile>,
    ) -> Result<PathBuf, Failure> {
        if !listed.contains(INDEX) {
            return Err(self.missing(SINGLE, listed).into());
        }
        let index = self.client.describe(commit, INDEX)?;
        self.fetch(commit, &index, &mut ())?;
        files.push(index);
        Ok(self.local.snapshot(commit).join(INDEX))
    }

    /// The plan of `files` and of those called `names`.
    fn planned<'n>(
        &self,
        commit: String,
        mut files: Vec<PlannedFile>,
        names: impl Iterator<Item = &'n str>,
        config: Value,
        absent: Vec<String>,
    ) -> Result<Plan, Failure> {
        for name in names {
            files.push(self.client.describe(&commit, name)?);
        }
        for file in &mut files {
            file.cached = self.local.present(&commit, file);
        }
        let free = self.settings.free_space;
        Ok(Plan {
            repo: self.repo.clone(),
            snapshot: self.local.snapshot(&commit),
            commit,
            files,
            free: free.or_else(|| disk::free_space(&self.settings.cache)),
            config,
            absent,
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
        let remedy = match listed.iter().any(|file| file.ends_with(GGUF)) {
            true => format!("it holds GGUF files too: `{}:QUANT` takes one", self.repo.name()),
            false => format!(
                "choose a repository or a revision with a whole safetensors checkpoint; its files: {page}/tree/main"
            ),
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
