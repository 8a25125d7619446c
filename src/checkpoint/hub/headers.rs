//! A repository's files as far as their headers, to be looked at without a download.

use super::cache::{CONFIG, INDEX};
use super::client::Failure;
use super::{HubSettings, Plan, PlannedFile, RepoId, Session};
use crate::Result;
use crate::checkpoint::ModelFiles;
use crate::checkpoint::files::GGUF;
use crate::checkpoint::hub::cache::Held;
use crate::fp4::Bytes;

/// Small files that say how weights are read.
const READ: [&str; 3] = [CONFIG, INDEX, "quantization_config.json"];

/// A model's files for [`Model::inspect`](crate::models::glm4_moe_lite::Model::inspect), of which no weights are fetched: those
/// of the cache where it holds the model; else config.json, the index, and of each file of weights the header (of a GGUF file,
/// which does not say how long its header is, a MiB, and twice as much again until it ends in it), the rest being zeros that
/// take no memory. Such files load as well, as a model that is good for nothing.
///
/// # Errors
/// As for [`fetch`](super::fetch); and [`Error::Hub`](crate::Error::Hub) for a header of more than 256 MiB.
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
            let (name, path) = (file.name.as_str(), plan.snapshot.join(&file.name));
            let of_weights = [".safetensors", GGUF].iter().any(|end| name.ends_with(end));
            if of_weights && !path.is_file() {
                files.push((file.name.clone(), self.beginning(&plan.commit, file)?));
            } else if of_weights || READ.contains(&name) {
                self.fetch(&plan.commit, file, &mut ())?;
                files.push((file.name.clone(), Bytes::map_file(path)?));
            }
        }
        Ok(ModelFiles::in_memory(&self.repo.to_string(), files))
    }

    /// A file of its size with nothing but its beginning in it.
    fn beginning(&self, commit: &str, file: &PlannedFile) -> Result<Bytes, Failure> {
        let beginning = self.client.beginning(commit, file)?;
        let too_large = || {
            let problem = format!("`{}` is said to have {} bytes", file.name, file.size);
            self.repo.error(problem, "check HF_ENDPOINT and the proxy")
        };
        let size = usize::try_from(file.size).map_err(|_| too_large())?;
        Ok(Bytes::beginning(&beginning, size)?)
    }
}
