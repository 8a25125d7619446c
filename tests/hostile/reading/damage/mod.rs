//! Ways to damage a folder.

pub mod bytes;
pub mod config;
pub mod gguf;
pub mod header;
pub mod json;
pub mod tensors;

use super::folders::{Folder, INDEX};
use super::random::Random;
use super::values;
use serde_json::Value;

/// What was done.
#[derive(Debug, Default)]
pub struct Damage {
    pub what: String,
    /// What is at fault: an error names one of these. Empty where nothing in particular is.
    pub names: Vec<String>,
}

impl Damage {
    fn new(what: impl Into<String>, names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<_> = names.into_iter().collect();
        // Of a stack of experts that is not there the first expert is missed.
        let stacks = names.iter().filter(|name| name.contains(".switch_mlp."));
        let first: Vec<_> = stacks
            .map(|name| name.replace(".switch_mlp.", ".experts.0."))
            .collect();
        names.extend(first);
        Self {
            what: what.into(),
            names,
        }
    }
}

/// A module's name, of one of its tensors': which of them is at fault where two disagree, nobody can say.
pub fn module(tensor: &str) -> String {
    let module = match tensor.strip_suffix(".weight.scales") {
        Some(module) => module,
        None => tensor.rsplit_once('.').map_or(tensor, |(module, _)| module),
    };
    module.to_string()
}

/// Damages one of a folder's small files: its JSON where it is any, or its bytes.
pub fn small_file(folder: &mut Folder, name: &str, random: &mut Random<'_>) -> Damage {
    let bytes = folder.files.get_mut(name).expect("the folder has it");
    match serde_json::from_slice::<Value>(bytes) {
        Ok(mut json) if !random.once_in(4) => {
            let damage = json::anywhere(&mut json, random);
            *bytes = json.to_string().into_bytes();
            damage
        }
        _ => bytes::anywhere(bytes, 0..usize::MAX, random),
    }
}

/// Damages the index of a checkpoint in several files.
pub fn index(folder: &mut Folder, random: &mut Random<'_>) -> Damage {
    let bytes = folder.files.get_mut(INDEX).expect("it has an index");
    let mut index: Value = serde_json::from_slice(bytes).expect("it is whole");
    let map = index["weight_map"].as_object_mut().expect("an index has one");
    let name = map
        .keys()
        .nth(random.below(map.len()))
        .expect("it is not empty")
        .clone();
    let damage = match random.below(6) {
        0 => {
            map.shift_remove(&name);
            Damage::new(format!("no entry of {name}"), [])
        }
        1 => {
            let path = values::path(random);
            let what = format!("{name} in {path:?}");
            map.insert(name, path.into());
            Damage::new(what, [])
        }
        2 => {
            let path = values::path(random);
            let what = format!("all in {path:?}");
            map.values_mut().for_each(|file| *file = path.clone().into());
            Damage::new(what, [])
        }
        3 => {
            let other = values::text(random);
            map.insert(other.clone(), "model-00001-of-00002.safetensors".into());
            Damage::new(format!("an entry of {other:?}"), [])
        }
        4 => Damage::new(json::anywhere(&mut index, random).what, []),
        _ => return bytes::anywhere(bytes, 0..usize::MAX, random),
    };
    *bytes = index.to_string().into_bytes();
    damage
}
