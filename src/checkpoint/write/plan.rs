//! What a quantised checkpoint consists of: which weights become four bits, and which file holds what.

use super::QuantizeOptions;
use crate::checkpoint::keep::Keep;
use crate::checkpoint::layout::{Entry, File};
use crate::checkpoint::layouts::Layout;
use crate::checkpoint::report::{Kept, Tally};
use crate::checkpoint::safetensors::{Checkpoint, StoredTensor};
use crate::checkpoint::{LoadOptions, layouts};
use crate::fp4::{DenseTensor, Format, ScaleRule};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a tensor of a new file is made of.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    Copy(&'a StoredTensor),
    /// Of the linear layer with this index in [`Plan::linears`].
    Codes(usize),
    Scales(usize),
    /// What divides the scales: the factor's reciprocal.
    Divisor(usize),
}

/// A weight to be quantised.
pub struct Linear<'a> {
    pub name: &'a str,
    pub matrix: DenseTensor,
    /// Its index among [`Plan::fused`].
    pub fused: usize,
}

pub struct Plan<'a> {
    pub format: Format,
    pub rule: ScaleRule,
    /// By name.
    pub files: Vec<(String, File<Content<'a>>)>,
    /// By name.
    pub linears: Vec<Linear<'a>>,
    /// Linear layers that share a factor; most are alone.
    pub fused: Vec<Vec<usize>>,
    /// The modules of linear layers that stay as they are.
    pub ignored: Vec<String>,
    pub quantized: Tally,
    pub copied: Tally,
    pub kept: Vec<Kept>,
    pub warnings: Vec<String>,
}

impl<'a> Plan<'a> {
    pub fn new(
        source: &'a Checkpoint,
        config: &Map<String, Value>,
        options: &QuantizeOptions,
        layout: Layout,
    ) -> Result<Self> {
        let mut plan = Self {
            format: options.format,
            rule: options.rule,
            files: Vec::new(),
            linears: Vec::new(),
            fused: Vec::new(),
            ignored: Vec::new(),
            quantized: Tally::default(),
            copied: Tally::default(),
            kept: Vec::new(),
            warnings: Vec::new(),
        };
        let load = LoadOptions {
            quantize: Some(options.format),
            skip_layers: options.skip_layers.clone(),
            keep: options.keep.clone(),
            ..LoadOptions::default()
        };
        let keep = Keep::new(&load, layers(source, config))?;
        let indices = plan.choose(source, &keep)?;
        plan.warnings = keep.warnings();
        if plan.linears.is_empty() {
            let problem = format!(
                "no linear layer in it that could be quantised in groups of {}{}",
                options.format.group,
                plan.kept
                    .first()
                    .map_or(String::new(), |kept| format!(" ({}: {})", kept.name, kept.reason))
            );
            let remedy = "give a glm4_moe_lite checkpoint in floating point, and keep less of it";
            return Err(Error::file(source.folder(), problem, remedy));
        }
        if layout != Layout::Marlin {
            plan.check_uniform(source, &indices)?;
        }
        plan.fuse(&indices);
        plan.lay_out(source, &indices, options, layout)?;
        Ok(plan)
    }

    /// The decoder layer that the weight with this index in [`linears`](Self::linears) belongs to.
    pub fn layer(&self, index: usize) -> Option<usize> {
        match Unit::of(self.linears[index].name) {
            Unit::Layer(layer) => Some(layer),
            Unit::Before | Unit::After => None,
        }
    }

    /// The index in [`linears`](Self::linears) of a linear layer's weight; `None` where it stays as it is.
    pub fn index(&self, module: &str) -> Option<usize> {
        let name = format!("{module}.weight");
        let found = self.linears.binary_search_by(|linear| linear.name.cmp(&name));
        found.ok()
    }

    /// The bytes of the source that a file is made of.
    pub fn source_bytes(&self, file: &File<Content<'_>>) -> u64 {
        let bytes = |entry: &Entry<Content<'_>>| match entry.content {
            Content::Copy(stored) => stored.bytes.len(),
            Content::Codes(index) => self.linears[index].matrix.bytes().len(),
            Content::Scales(_) | Content::Divisor(_) => 0,
        };
        file.entries().iter().map(bytes).sum::<usize>() as u64
    }

    /// Finds the weights to be quantised; gives their indices by module.
    fn choose(&mut self, source: &'a Checkpoint, keep: &Keep<'_>) -> Result<BTreeMap<&'a str, usize>> {
        let mut indices = BTreeMap::new();
        for (name, stored) in source.tensors() {
            let quantised = layouts::is_packed(stored) || stored.dtype.bitsize() < 16;
            if quantised {
                let problem = format!("{name} is {:?}: its weights are quantised already", stored.dtype);
                return Err(Error::file(
                    &stored.file,
                    problem,
                    "give the floating-point original",
                ));
            }
            if stored.shape.len() > 2 && name.contains(".experts.") {
                let problem = format!(
                    "shape {:?}, all experts in one; expected a tensor [N, K] an expert",
                    stored.shape
                );
                return Err(stored.problem(name, problem));
            }
            let (Some(module), [n, k]) = (name.strip_suffix(".weight"), &stored.shape[..]) else {
                continue;
            };
            if !is_linear(module) {
                if !module.ends_with("embed_tokens") {
                    self.ignored.push(module.to_string());
                }
                continue;
            }
            let group = self.format.group;
            let odd = || format!("K = {k} is not a multiple of the group of {group}");
            let reason = keep.reason(name);
            if let Some(reason) = reason.or_else(|| (!k.is_multiple_of(group)).then(odd)) {
                self.ignored.push(module.to_string());
                let name = name.to_string();
                self.kept.push(Kept { name, reason });
                continue;
            }
            indices.insert(module, self.linears.len());
            self.linears.push(Linear {
                name,
                matrix: stored.matrix(name, *n, *k)?,
                fused: 0,
            });
        }
        Ok(indices)
    }

    /// Requires of what servers make one matrix of that all of it is quantised or none.
    fn check_uniform(&self, source: &Checkpoint, indices: &BTreeMap<&str, usize>) -> Result<()> {
        let mut sets: BTreeMap<String, [Option<&str>; 2]> = BTreeMap::new();
        for (name, _) in source.tensors() {
            let Some(module) = name.strip_suffix(".weight").filter(|module| is_linear(module)) else {
                continue;
            };
            let set = match module.split_once(".experts.") {
                Some((layer, _)) => layer.to_string(),
                None => first_of_fused(module),
            };
            let kept = usize::from(!indices.contains_key(module));
            sets.entry(set).or_default()[kept].get_or_insert(module);
        }
        for found in sets.into_values() {
            if let [Some(quantised), Some(kept)] = found {
                return Err(Error::argument(
                    "quantize",
                    "keep",
                    "all or none of what servers of this layout run as one matrix: the experts of a layer; gate_proj and \
                     up_proj; q_a_proj and kv_a_proj_with_mqa",
                    format!("{kept} to be kept, and {quantised} not"),
                ));
            }
        }
        Ok(())
    }

    /// Brings together what shares a factor.
    fn fuse(&mut self, indices: &BTreeMap<&str, usize>) {
        let mut sets: BTreeMap<String, usize> = BTreeMap::new();
        for (module, index) in indices {
            let set = *sets.entry(first_of_fused(module)).or_insert_with(|| {
                self.fused.push(Vec::new());
                self.fused.len() - 1
            });
            self.fused[set].push(*index);
            self.linears[*index].fused = set;
        }
    }

    /// Distributes all tensors over files.
    fn lay_out(
        &mut self,
        source: &'a Checkpoint,
        indices: &BTreeMap<&str, usize>,
        options: &QuantizeOptions,
        layout: Layout,
    ) -> Result<()> {
        let mut units: BTreeMap<Unit, Vec<Entry<Content<'a>>>> = BTreeMap::new();
        for (name, stored) in source.tensors() {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let entries = match indices.get(module).filter(|_| name.ends_with(".weight")) {
                None => {
                    self.copied.add(stored.bytes.len());
                    let (shape, size) = (stored.shape.clone(), stored.bytes.len());
                    let content = Content::Copy(stored);
                    vec![Entry::new(name.to_string(), stored.dtype, shape, size, content)]
                }
                Some(&index) => {
                    let shape = self.linears[index].matrix.shape();
                    let contents = [
                        Content::Codes(index),
                        Content::Scales(index),
                        Content::Divisor(index),
                    ];
                    let entries = match layout {
                        Layout::Marlin => {
                            Entry::mmfp4(module, shape, options.format, contents[0], contents[1]).into()
                        }
                        _ => Entry::compressed(module, shape, options.format, contents),
                    };
                    self.quantized.add(entries.iter().map(|entry| entry.size).sum());
                    entries
                }
            };
            for entry in &entries {
                if entry.name != name && source.find(&entry.name).is_some() {
                    // Two tensors of one name would make a file that nobody can read.
                    let problem = format!("there already, but {name} is in floating point");
                    return Err(stored.problem(&entry.name, problem));
                }
            }
            units.entry(Unit::of(name)).or_default().extend(entries);
        }
        let mut shards: Vec<Vec<Entry<Content<'a>>>> = Vec::new();
        let size = |entries: &[Entry<_>]| entries.iter().map(|entry| entry.size).sum::<usize>();
        for (unit, entries) in units {
            match shards.last_mut() {
                Some(last) if unit == Unit::After || size(last) + size(&entries) <= options.shard_bytes => {
                    last.extend(entries);
                }
                _ => shards.push(entries),
            }
        }
        let count = shards.len();
        let format = match layout {
            Layout::Marlin => "mmfp4",
            // What transformers knows.
            _ => "pt",
        };
        let files = shards.into_iter().enumerate().map(|(index, entries)| {
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            (name, File::new(entries).with_format(format))
        });
        self.files = files.collect();
        Ok(())
    }
}

/// What lies together, in the order of the files.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    /// Embeddings, output head.
    Before,
    Layer(usize),
    /// The last norm: too little for a file of its own.
    After,
}

impl Unit {
    fn of(name: &str) -> Self {
        let layer = name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.')?.0.parse().ok());
        match layer {
            Some(layer) => Self::Layer(layer),
            None if name.starts_with("model.norm.") => Self::After,
            None => Self::Before,
        }
    }
}

/// The decoder's layers, as `config.json` has it or, where it has not, as there are tensors.
fn layers(source: &Checkpoint, config: &Map<String, Value>) -> usize {
    let told = config.get("num_hidden_layers").and_then(Value::as_u64);
    let found = || {
        let numbers = source.tensors().filter_map(|(name, _)| match Unit::of(name) {
            // A name may have any number.
            Unit::Layer(layer) => Some(layer.saturating_add(1)),
            _ => None,
        });
        numbers.max().unwrap_or(0)
    };
    told.and_then(|told| usize::try_from(told).ok())
        .unwrap_or_else(found)
}

/// The linear layers of the decoder; everything else is small or sensitive. The one that joins two inputs in a layer
/// that predicts several tokens (`eh_proj`) is left to be as other programs expect it.
pub fn is_linear(module: &str) -> bool {
    let projects = module.ends_with("_proj") && !module.ends_with(".eh_proj");
    module.starts_with("model.layers.") && (projects || module.ends_with(".kv_a_proj_with_mqa"))
}

/// Of linear layers that servers multiply as one matrix, the first; of all others, the layer itself.
fn first_of_fused(module: &str) -> String {
    for (last, first) in [(".up_proj", ".gate_proj"), (".kv_a_proj_with_mqa", ".q_a_proj")] {
        if let Some(parent) = module.strip_suffix(last) {
            return format!("{parent}{first}");
        }
    }
    module.to_string()
}
