//! What loading found.

use super::{Component, Layout};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// Tensors that a line names, of however many.
const NAMED: usize = 5;

/// A number of tensors and the bytes they take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Tensors.
    pub tensors: usize,
    /// Bytes, scales included.
    pub bytes: usize,
}

impl Tally {
    pub(super) fn add(&mut self, bytes: usize) {
        self.tensors += 1;
        self.bytes += bytes;
    }
}

/// A tensor that stays in floating point although quantising was asked for, or although others of the file are in integers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The tensor.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// A tensor that the checkpoint lacks, from [`LoadOptions::base`](super::LoadOptions::base).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Supplied {
    /// The tensor.
    pub name: String,
    /// The base's file that holds it.
    pub file: PathBuf,
}

/// An output head that was rounded to eight bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RoundedHead {
    /// Bytes it takes in the file.
    pub before: usize,
    /// Bytes it takes in this process's memory, scales included.
    pub after: usize,
}

/// What the weights of a component that are in one format take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Share {
    /// The part of the model.
    pub component: Component,
    /// What its weights are in while the model runs: MMFP4, NVFP4, BF16, Q4K …
    pub format: String,
    /// The layout of FP4 weights in the file.
    pub layout: Option<Layout>,
    /// How many there are; a vector is one, too.
    pub weights: usize,
    /// Bytes in the file, scales and factors included.
    pub stored: usize,
    /// Bytes while the model runs.
    pub bytes: usize,
    /// Those of them in memory of this process's own; the others are the file's map.
    pub own: usize,
}

/// Why weights lie in memory of the process's own, and not in the file's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OwnReason {
    /// The file has their codes in another order.
    Repacked,
    /// The file has their scales the other way round.
    ScalesTurned,
    /// Blocks at an odd address.
    Misaligned,
    /// An op wants its weights in one map, and they lie in several.
    Gathered,
    /// Quantised while loading, as was asked for.
    Quantized,
    /// The output head rounded to eight bits, as was asked for.
    HeadRounded,
    /// Norms and biases, which are used in F32.
    Decoded,
}

impl fmt::Display for OwnReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Repacked => "repacked, the file having their codes in another order",
            Self::ScalesTurned => "their scales turned, which lie the other way round in the file",
            Self::Misaligned => "copied, as they begin at an odd address",
            Self::Gathered => "copied together, as feed-forward layers want their weights in one file",
            Self::Quantized => "quantised, as was asked for",
            Self::HeadRounded => "the output head, rounded to eight bits as was asked for",
            Self::Decoded => "norms and biases, decoded to F32",
        })
    }
}

/// Memory of the process's own that loading fills.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OwnMemory {
    /// Why.
    pub reason: OwnReason,
    /// Weights that it is for.
    pub weights: usize,
    /// Its bytes, to the byte; the system gives whole pages.
    pub bytes: usize,
    /// The module of the first of them by name, of a vector its own name.
    pub first: String,
}

/// What loading a model found and did; `mmfp4 inspect` makes the same of the headers alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// What the model is made of, component by component.
    pub components: Vec<Share>,
    /// What lies in memory of this process's own.
    pub own: Vec<OwnMemory>,
    /// Bytes of weights that a decoded token reads: see
    /// [`Model::bytes_read`](crate::models::glm4_moe_lite::Model::bytes_read).
    pub bytes_a_token: u64,
    /// FP4 weights used where they lie in the file.
    pub fp4: Tally,
    /// The layouts that they are stored in.
    pub layouts: BTreeSet<Layout>,
    /// FP4 weights that the file holds in another order (GGUF's blocks): a copy in ours, in memory of this process.
    pub repacked: Tally,
    /// Weights quantised while loading.
    pub quantized: Tally,
    /// Weights in GGML's integer blocks (Q4_K, Q8_0, …), used where they lie.
    pub blocks: Tally,
    /// Weights in floating point, used where they lie.
    pub dense: Tally,
    /// The output head, where it was rounded to eight bits; it is not among the others then.
    pub int8_head: Option<RoundedHead>,
    /// Linear layers' weights that were not quantised although that was asked for: because of
    /// [`LoadOptions`](super::LoadOptions), or because they could not be; and those that a GGUF file of k-quants could not have
    /// in them.
    pub kept: Vec<Kept>,
    /// MLPs and mixtures of experts that had to be copied to lie together, and their bytes.
    pub copied: Vec<(String, usize)>,
    /// Tensors of layers that are not used (those that predict several tokens at once).
    pub ignored: usize,
    /// Their bytes.
    pub ignored_bytes: usize,
    /// Tensors that the index lists of layers that the model does not have, and no file holds: ignored.
    pub dangling: Vec<String>,
    /// Tensors that the checkpoint lacks, and that came from the base.
    pub supplied: Vec<Supplied>,
    /// Scales to quantise activations by, which checkpoints have for other kernels: not used here.
    pub input_scales: usize,
    /// Tensors that nothing asked for.
    pub unused: Vec<String>,
    /// What is known to cost quality, and options without effect: each once, with what to use instead.
    pub warnings: Vec<String>,
}

impl LoadReport {
    /// Notes what came from the base that was given.
    pub(crate) fn note_base(&mut self, supplied: Vec<Supplied>) {
        if supplied.is_empty() {
            self.warnings.push(
                "a base was given, and it has no effect: the checkpoint lacks no tensor; leave it out".into(),
            );
        }
        self.supplied = supplied;
    }

    /// Bytes of weights while the model runs.
    pub fn bytes(&self) -> usize {
        self.components.iter().map(|share| share.bytes).sum()
    }

    /// Bytes of them in memory of this process's own, with what keeps them aligned there.
    pub fn own_bytes(&self) -> usize {
        self.own.iter().map(|own| own.bytes).sum()
    }

    /// Bytes of weights that are used where they lie in the file.
    pub fn mapped_bytes(&self) -> usize {
        let mapped = self.components.iter().map(|share| share.bytes - share.own);
        mapped.sum()
    }
}

/// A line a reason why weights stay in floating point, with its first weight and the number of them.
pub(super) fn write_kept(f: &mut fmt::Formatter<'_>, kept: &[Kept]) -> fmt::Result {
    let mut reasons: Vec<(&Kept, usize)> = Vec::new();
    for kept in kept {
        match reasons.iter_mut().find(|(first, _)| first.reason == kept.reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((kept, 1)),
        }
    }
    for (first, count) in reasons {
        match count {
            1 => write!(f, "\n{} stays in floating point: {}", first.name, first.reason)?,
            _ => write!(
                f,
                "\n{count} weights stay in floating point, the first {}: {}",
                first.name, first.reason
            )?,
        }
    }
    Ok(())
}

/// A line a file that tensors came from.
fn write_supplied(f: &mut fmt::Formatter<'_>, supplied: &[Supplied]) -> fmt::Result {
    let mut files: BTreeMap<&Path, Vec<&str>> = BTreeMap::new();
    for Supplied { name, file } in supplied {
        files.entry(file).or_default().push(name);
    }
    for (file, names) in files {
        let (count, file) = (names.len(), file.display());
        let named = names[..count.min(NAMED)].join(", ");
        let rest = if count > NAMED { ", …" } else { "" };
        write!(f, "\n{count} missing tensors taken from {file}: {named}{rest}")?;
    }
    Ok(())
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        write!(
            f,
            "{} FP4 tensors ({:.1} MiB), {} floating-point ({:.1} MiB)",
            self.fp4.tensors + self.repacked.tensors + self.quantized.tensors,
            mib(self.fp4.bytes + self.repacked.bytes + self.quantized.bytes),
            self.dense.tensors,
            mib(self.dense.bytes)
        )?;
        if self.blocks.tensors > 0 {
            let bytes = mib(self.blocks.bytes);
            write!(f, ", {} in integer blocks ({bytes:.1} MiB)", self.blocks.tensors)?;
        }
        if self.repacked.tensors > 0 {
            write!(
                f,
                "; {} repacked while loading ({:.1} MiB)",
                self.repacked.tensors,
                mib(self.repacked.bytes)
            )?;
        }
        if self.quantized.tensors > 0 {
            write!(f, "; {} quantised while loading", self.quantized.tensors)?;
        }
        if let Some(RoundedHead { before, after }) = self.int8_head {
            write!(
                f,
                "; output head rounded to 8 bits ({:.1} MiB, {:.1} before)",
                mib(after),
                mib(before)
            )?;
        }
        if !self.copied.is_empty() {
            let bytes = self.copied.iter().map(|(_, bytes)| bytes).sum();
            write!(
                f,
                "; {} feed-forward layers copied together ({:.1} MiB)",
                self.copied.len(),
                mib(bytes)
            )?;
        }
        if self.ignored > 0 {
            write!(f, "; {} tensors of unused layers ignored", self.ignored)?;
        }
        if self.input_scales > 0 {
            let scales = self.input_scales;
            write!(
                f,
                "; {scales} scales of activations ignored (activations are not quantised by them here)"
            )?;
        }
        if !self.unused.is_empty() {
            let named = &self.unused[..self.unused.len().min(NAMED)];
            write!(f, "; {} unknown tensors ({}", self.unused.len(), named.join(", "))?;
            f.write_str(if named.len() < self.unused.len() {
                ", …)"
            } else {
                ")"
            })?;
        }
        write_kept(f, &self.kept)?;
        if let Some(first) = self.dangling.first() {
            let count = self.dangling.len();
            write!(
                f,
                "\n{count} tensors of layers that the model does not have are in the index and in no file (the first \
                 {first}): ignored"
            )?;
        }
        write_supplied(f, &self.supplied)?;
        for warning in &self.warnings {
            write!(f, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_told_once_a_reason() {
        let kept = |name: &str, reason: &str| Kept {
            name: name.into(),
            reason: reason.into(),
        };
        let report = LoadReport {
            kept: vec![kept("a", "layer 1"), kept("b", "odd"), kept("c", "layer 1")],
            warnings: vec!["take another".into()],
            ..LoadReport::default()
        };
        let text = report.to_string();
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "2 weights stay in floating point, the first a: layer 1",
                "b stays in floating point: odd",
                "warning: take another"
            ]
        );
    }
}
