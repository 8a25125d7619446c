//! A GGUF file's header (version 2 or 3, little-endian): metadata, and where each tensor lies. Nothing is taken at its word:
//! counts, lengths, offsets and sizes are checked against the file.

use super::cursor::Cursor;
use super::metadata::Metadata;
use super::types::{self, Known};
use crate::fp4::Bytes;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

const AGAIN: &str = "it may be truncated; fetch it again";
/// GGML's tensors have no more.
const MOST_DIMENSIONS: u32 = 4;

/// A tensor as the file has it.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub name: String,
    /// Slowest dimension first, the other way round than in the file.
    pub shape: Vec<usize>,
    pub kind: Known,
    pub bytes: Bytes,
}

/// A file's metadata and tensors.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads the header of a mapped file; `path` names it in messages.
    ///
    /// # Errors
    /// [`Error::File`] where the file is not a whole GGUF file that this crate can read, [`Error::Tensor`] where a tensor's
    /// description is wrong.
    pub fn read(path: &Path, file: &Bytes) -> Result<Self> {
        let refuse = |problem: String| Error::file(path, problem, AGAIN);
        let mut cursor = Cursor::new(file);
        let (metadata, infos, alignment) = Self::described(path, &mut cursor)?;
        let data =
            (cursor.at().checked_next_multiple_of(alignment)).and_then(|start| file.slice(start..file.len()));
        let data = data.ok_or_else(|| refuse("it ends before its tensors' data".into()))?;
        check_overlaps(path, &infos)?;
        let tensors = infos.into_iter().map(|info| info.placed(path, &data));
        Ok(Self {
            metadata,
            tensors: tensors.collect::<Result<_>>()?,
        })
    }

    /// How far the header goes of a file that begins so: further than these bytes where they do not hold all of it, and then at
    /// least so far. What else is wrong with it, reading it tells.
    #[cfg(feature = "hub")]
    pub fn reach(beginning: &[u8]) -> usize {
        let mut cursor = Cursor::new(beginning);
        _ = Self::described(Path::new(""), &mut cursor);
        cursor.furthest()
    }

    /// Metadata, tensors, and what their offsets are multiples of.
    fn described(path: &Path, cursor: &mut Cursor<'_>) -> Result<(Metadata, Vec<Description>, usize)> {
        let refuse = |problem: String| Error::file(path, problem, AGAIN);
        let magic: Option<[u8; 4]> = cursor.array();
        if magic != Some(*b"GGUF") {
            return Err(refuse("not a GGUF file".into()));
        }
        match cursor.u32() {
            Some(2 | 3) => {}
            Some(version) if matches!(version.swap_bytes(), 1..=3) => {
                let remedy = "take one for little-endian machines";
                return Err(Error::file(path, "a big-endian GGUF file", remedy));
            }
            version => {
                let problem = format!("GGUF version {}; expected 2 or 3", version.unwrap_or(0));
                return Err(refuse(problem));
            }
        }
        let counts = cursor.size().zip(cursor.size());
        let (tensors, values) = counts.ok_or_else(|| refuse("it ends within its header".into()))?;
        let metadata = Metadata::read(values, cursor).map_err(refuse)?;
        let alignment = alignment(&metadata).map_err(refuse)?;
        let infos = Description::read_all(path, (tensors, alignment), cursor)?;
        Ok((metadata, infos, alignment))
    }
}

/// What the offsets of tensors are multiples of.
fn alignment(metadata: &Metadata) -> Result<usize, String> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else {
        return Ok(32);
    };
    let alignment = metadata
        .integer(KEY)
        .and_then(|value| usize::try_from(value).ok());
    match alignment {
        // As llama.cpp has it, a power of two, and as the format has it, a multiple of 8.
        Some(alignment @ 8..=0x10_0000) if alignment.is_power_of_two() => Ok(alignment),
        _ => Err(format!("{KEY} = {value:?}; expected a power of two from 8 on")),
    }
}

/// A tensor's description, checked but for the place of its data.
struct Description {
    name: String,
    shape: Vec<usize>,
    kind: Known,
    offset: usize,
    size: usize,
}

impl Description {
    fn read_all(
        path: &Path,
        (count, alignment): (usize, usize),
        cursor: &mut Cursor<'_>,
    ) -> Result<Vec<Self>> {
        let refuse = |problem: String| Error::file(path, problem, AGAIN);
        let mut all = Vec::new();
        let mut names = BTreeSet::new();
        for index in 0..count {
            let name = cursor.text().map(|name| String::from_utf8(name.to_vec()));
            let Some(Ok(name)) = name else {
                return Err(refuse(format!(
                    "the name of tensor {index} of {count} cannot be read"
                )));
            };
            let info = Self::read(&name, alignment, cursor)
                .map_err(|problem| Error::tensor(&name, Some(path.into()), problem))?;
            if !names.insert(name.clone()) {
                return Err(Error::tensor(name, Some(path.into()), "the file has it twice"));
            }
            all.push(info);
        }
        Ok(all)
    }

    fn read(name: &str, alignment: usize, cursor: &mut Cursor<'_>) -> Result<Self, String> {
        const SHORT: &str = "the file ends within its description";
        let rank = cursor.u32().ok_or(SHORT)?;
        if !(1..=MOST_DIMENSIONS).contains(&rank) {
            return Err(format!("{rank} dimensions; expected 1 to {MOST_DIMENSIONS}"));
        }
        let dimensions = (0..rank).map(|_| cursor.size());
        let mut shape = dimensions.collect::<Option<Vec<_>>>().ok_or(SHORT)?;
        // The fastest comes first in the file.
        shape.reverse();
        let id = cursor.u32().ok_or(SHORT)?;
        let offset = cursor.size().ok_or(SHORT)?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "its data begins at {offset}; expected a multiple of {alignment}"
            ));
        }
        let kind = types::of_id(id).ok_or_else(|| format!("type {id}, which is not known"))?;
        let columns = shape[shape.len() - 1];
        if shape.contains(&0) || !columns.is_multiple_of(kind.block) {
            return Err(format!(
                "shape {shape:?}; {} is in blocks of {}, and no dimension may be 0",
                kind.name, kind.block
            ));
        }
        let rows = shape[..shape.len() - 1]
            .iter()
            .try_fold(1, |n: usize, d| n.checked_mul(*d));
        let row = (columns / kind.block).checked_mul(kind.size);
        let size = rows.zip(row).and_then(|(rows, row)| rows.checked_mul(row));
        Ok(Self {
            name: name.to_string(),
            kind,
            offset,
            size: size.ok_or_else(|| format!("shape {shape:?} is larger than memory"))?,
            shape,
        })
    }

    /// The tensor with its part of the file's data.
    fn placed(self, path: &Path, data: &Bytes) -> Result<TensorInfo> {
        let refuse = |problem: String| Err(Error::tensor(&self.name, Some(path.into()), problem));
        let end = self.offset.checked_add(self.size);
        let Some(bytes) = end.and_then(|end| data.slice(self.offset..end)) else {
            let (offset, size, all) = (self.offset, self.size, data.len());
            return refuse(format!(
                "its {size} bytes at {offset} lie outside the file's {all} bytes of data; {AGAIN}"
            ));
        };
        Ok(TensorInfo {
            name: self.name,
            shape: self.shape,
            kind: self.kind,
            bytes,
        })
    }
}

fn check_overlaps(path: &Path, infos: &[Description]) -> Result<()> {
    let mut order: Vec<_> = infos.iter().collect();
    order.sort_by_key(|info| info.offset);
    for pair in order.windows(2) {
        if pair[1].offset - pair[0].offset < pair[0].size {
            let problem = format!("its data overlaps that of `{}`", pair[0].name);
            return Err(Error::tensor(&pair[1].name, Some(path.into()), problem));
        }
    }
    Ok(())
}
