//! Tensors that a checkpoint lacks, out of another of the same model.

use super::files::ModelFiles;
use super::report::Supplied;
use super::safetensors::Checkpoint;
use crate::{Error, Result};

impl Checkpoint {
    /// This checkpoint with the tensors that are `missing` in it, taken from `base`, and which those are. Of a base with an
    /// index only the files that hold them are opened. Shapes are checked when the tensors are read.
    ///
    /// # Errors
    /// Those of [`Checkpoint::from_files`] for the base; [`Error::Tensor`] for a tensor that is missing there too, or
    /// quantised: codes of one checkpoint do not belong to scales of another.
    pub(crate) fn completed(&self, base: &ModelFiles, missing: &[String]) -> Result<(Self, Vec<Supplied>)> {
        let held = Self::holding(base, missing)?;
        let (mut added, mut supplied) = (Vec::new(), Vec::new());
        for name in missing {
            let Some(stored) = held.find(name) else {
                let problem = format!(
                    "missing there, as in {}; give the original that the checkpoint was made from (--base)",
                    self.folder().display()
                );
                return Err(Error::tensor(name, Some(base.root().to_path_buf()), problem));
            };
            stored.float_kind(name)?;
            supplied.push(Supplied {
                name: name.clone(),
                file: stored.file.clone(),
            });
            added.push((name.clone(), stored.clone()));
        }
        Ok((self.with(added), supplied))
    }
}
