//! Damage to the header of a safetensors file: it no longer tells the truth about the data.

use super::{Damage, bytes, json, module};
use crate::reading::folders::{Folder, SINGLE};
use crate::reading::random::Random;
use crate::reading::values;
use serde_json::{Map, Value, json};

/// Every dtype that the format knows, and some that it does not.
pub const DTYPES: [&str; 25] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
    "",
    "bf16",
    "F8_E4M3FN",
    "MXFP4",
    "Q4_K",
];

/// Damages the header of the one file that a folder has.
pub fn damage(folder: &mut Folder, random: &mut Random<'_>) -> Damage {
    let file = folder.files.get_mut(SINGLE).expect("it has one file");
    let (mut header, mut data) = parsed(file);
    let name = header
        .keys()
        .nth(random.below(header.len()))
        .expect("it is not empty")
        .clone();
    let neighbours = around(&header, &name);
    let entry = |header: &mut Map<String, Value>, field: &str, value: Value| header[&name][field] = value;
    let only = || [module(&name)];
    let damage = match random.below(16) {
        0 => {
            let dtype = *random.pick(&DTYPES);
            entry(&mut header, "dtype", dtype.into());
            Damage::new(format!("{name} is {dtype}"), only())
        }
        1..=3 => {
            let shape = header[&name]["shape"].as_array_mut().expect("a shape is a list");
            match random.below(5) {
                0 => shape.push(values::size(1, random).into()),
                1 => _ = shape.pop(),
                2 => shape.resize(random.below(2000), json!(1)),
                3 => *shape = vec![values::value(random), values::value(random)],
                _ => {
                    let at = random.below(shape.len());
                    shape[at] = values::size(shape[at].as_u64().unwrap_or(0), random).into();
                }
            }
            let mut what = format!("{name} has shape {shape:?}");
            what.truncate(200);
            Damage::new(what, only())
        }
        4..=6 => {
            let offsets = header[&name]["data_offsets"]
                .as_array_mut()
                .expect("offsets are a list");
            match random.below(4) {
                0 => offsets.reverse(),
                1 => {
                    // Moved as a whole.
                    let by = random.below(1 << 20) as u64;
                    offsets
                        .iter_mut()
                        .for_each(|offset| *offset = (offset.as_u64().unwrap_or(0) + by).into());
                }
                2 => offsets.push(0.into()),
                _ => {
                    let at = random.below(offsets.len());
                    offsets[at] = values::size(offsets[at].as_u64().unwrap_or(0), random).into();
                }
            }
            let what = format!("{name} lies at {offsets:?}");
            Damage::new(what, neighbours.iter().map(|name| module(name)))
        }
        7 => {
            let other = header
                .keys()
                .nth(random.below(header.len()))
                .expect("it is not empty")
                .clone();
            let offsets = header[&other]["data_offsets"].clone();
            entry(&mut header, "data_offsets", offsets);
            let names = neighbours.into_iter().chain(around(&header, &other));
            Damage::new(
                format!("{name} lies where {other} lies"),
                names.map(|name| module(&name)),
            )
        }
        8 => {
            let found = header.shift_remove(&name).expect("it is there");
            let other = values::text(random);
            let mut what = format!("{name} is called {other:?}");
            what.truncate(what.floor_char_boundary(200));
            header.insert(other, found);
            Damage::new(what, only())
        }
        9 => {
            header.shift_remove(&name);
            Damage::new(
                format!("{name} is not there"),
                neighbours.iter().map(|name| module(name)),
            )
        }
        10 => {
            header[&name] = values::value(random);
            Damage::new(
                format!("{name} is {}", header[&name].to_string().len()),
                neighbours.iter().map(|name| module(name)),
            )
        }
        11 => {
            header.insert("__metadata__".into(), values::value(random));
            Damage::new("other metadata", [])
        }
        12 => {
            let mut root = Value::Object(header.clone());
            let mut damage = json::anywhere(&mut root, random);
            let near = damage.names.iter().flat_map(|name| around(&header, name));
            damage.names = near.map(|name| module(&name)).collect();
            write(file, root.to_string().as_bytes(), &data, None);
            return damage;
        }
        13 => {
            let mut text = Value::Object(header).to_string().into_bytes();
            let damage = bytes::anywhere(&mut text, 0..usize::MAX, random);
            write(file, &text, &data, None);
            return damage;
        }
        14 => {
            let text = Value::Object(header).to_string().into_bytes();
            let size = values::size(text.len() as u64, random);
            write(file, &text, &data, Some(size));
            return Damage::new(format!("a header of {size} bytes"), []);
        }
        _ => {
            match random.below(3) {
                0 => data.truncate(random.below(data.len())),
                1 => data.extend(vec![0; 1 + random.below(4096)]),
                _ => data.clear(),
            }
            Damage::new(format!("{} bytes of data", data.len()), [])
        }
    };
    write(file, Value::Object(header).to_string().as_bytes(), &data, None);
    damage
}

/// A file's header and data.
fn parsed(file: &[u8]) -> (Map<String, Value>, Vec<u8>) {
    let size = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header = serde_json::from_slice(&file[8..8 + size]).expect("it is whole");
    (header, file[8 + size..].to_vec())
}

/// Puts a file together, whose header says that it has `size` bytes.
fn write(file: &mut Vec<u8>, header: &[u8], data: &[u8], size: Option<u64>) {
    let size = size.unwrap_or(header.len() as u64).to_le_bytes();
    *file = [&size, header, data].concat();
}

/// A tensor and those that lie before and behind it.
fn around(header: &Map<String, Value>, name: &str) -> Vec<String> {
    let start = |value: &Value| value["data_offsets"][0].as_u64().unwrap_or(0);
    let mut order: Vec<_> = header.iter().map(|(name, value)| (start(value), name)).collect();
    order.sort();
    let at = order.iter().position(|(_, other)| *other == name).unwrap_or(0);
    let near = at.saturating_sub(1)..(at + 2).min(order.len());
    order[near].iter().map(|(_, name)| name.to_string()).collect()
}
