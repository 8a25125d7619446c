//! A repository's files as far as their headers, to be looked at without a download.

use super::cache::{CONFIG, INDEX};
use super::client::Failure;
use super::{HubSettings, Plan, PlannedFile, RepoId, Session};
use crate::Result;
use crate::checkpoint::ModelFiles;
use crate::checkpoint::hub::cache::Held;
use crate::fp4::Bytes;

/// A model's files for [`Model::inspect`](crate::models::glm4_moe_lite::Model::inspect), of which no weights are fetched: those
/// of the cache where it holds the model; else config.json, the index, and of each file of weights the header, the
/// rest being zeros that take no memory. Such files load as well, as a model that is good for nothing.
///
/// # Errors
/// As for [`fetch`](super::fetch); [`Error::Hub`](crate::Error::Hub) for weights of another kind than safetensors.
pub fn headers(repo: &RepoId, settings: &HubSettings) -> Result<ModelFiles> {
    let session = Session::new(repo, settings);
    match session.local.held()? {
        Held::Complete(snapshot) | Held::Usable(snapshot) if !settings.refresh || settings.offline => {
            return Ok(ModelFiles::folder(snapshot));
        }
        Held::Partial(missing) if settings.offline => return Err(session.offline(&missing)),
        _ => {}
    }
    let files = session.plan().and_then(|plan| session.headers(&plan));
    files.map_err(|failure| session.client.give_up(failure))
}

impl Session<'_> {
    fn headers(&self, plan: &Plan) -> Result<ModelFiles, Failure> {
        let mut files = Vec::new();
        for file in &plan.files {
            let path = plan.snapshot.join(&file.name);
            let bytes = match file.name.as_str() {
                name if name.ends_with(".safetensors") && !path.is_file() => {
                    self.header(&plan.commit, file)?
                }
                name if name == CONFIG || name == INDEX || name.ends_with(".safetensors") => {
                    Bytes::map_file(path)?
                }
                _ => continue,
            };
            files.push((file.name.clone(), bytes));
        }
        Ok(ModelFiles::in_memory(&self.repo.to_string(), files))
    }

    /// A file of its size with nothing but the header in it.
    fn header(&self, commit: &str, file: &PlannedFile) -> Result<Bytes, Failure> {
        let beginning = self.client.header(commit, file)?;
        let too_large = || {
            let problem = format!("`{}` is said to have {} bytes", file.name, file.size);
            self.repo.error(problem, "check HF_ENDPOINT and the proxy")
        };
        let size = usize::try_from(file.size).map_err(|_| too_large())?;
        Ok(Bytes::beginning(&beginning, size)?)
    }
}
