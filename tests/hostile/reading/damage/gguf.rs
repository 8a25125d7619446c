//! Damage to GGUF files.

use super::{Damage, bytes};
use crate::common::gguf::{self, Gguf};
use crate::reading::folders::{Folder, GGUF};
use crate::reading::random::Random;
use crate::reading::values;

/// Damages the file that a folder has.
pub fn damage(folder: &mut Folder, random: &mut Random<'_>) -> Damage {
    let mut file = folder.gguf.clone().expect("it has one");
    let damage = match random.below(10) {
        0..=3 => metadata(&mut file, random),
        4..=6 => {
            let index = random.below(file.tensors.len());
            let theirs = file.tensors[index].name.clone();
            let names = [theirs.clone(), folder.ours[&theirs].clone()];
            let (what, bytes) = tensor(&mut file, index, random);
            folder.files.insert(GGUF.into(), bytes);
            return Damage::new(format!("{theirs}: {what}"), names);
        }
        // Anything in the header; what it means, chance decides.
        _ => {
            let mut bytes = file.bytes();
            let data: usize = file.tensors.iter().map(|stored| stored.bytes.len()).sum();
            let end = bytes.len() - data.min(bytes.len() - 1);
            let damage = bytes::anywhere(&mut bytes, 0..end, random);
            folder.files.insert(GGUF.into(), bytes);
            return damage;
        }
    };
    folder.files.insert(GGUF.into(), file.bytes());
    damage
}

/// One value: another type, bytes, key, or none.
fn metadata(file: &mut Gguf, random: &mut Random<'_>) -> Damage {
    let index = random.below(file.metadata.len());
    let key = file.metadata[index].0.clone();
    let (kind, value) = &mut file.metadata[index].1;
    let what = match random.below(10) {
        0 => {
            *kind = random.below(15) as u32;
            format!("type {kind}")
        }
        1..=3 => {
            let number = values::size(u64::from(value[0]), random);
            let size = value.len().min(8);
            value[..size].copy_from_slice(&number.to_le_bytes()[..size]);
            format!("{number}")
        }
        4 => {
            *kind = 10;
            *value = random.pick(&values::SIZES).to_le_bytes().into();
            format!("of 64 bits, {value:?}")
        }
        5 => {
            let number = *random.pick(&[f32::NAN, f32::INFINITY, -1.0, 0.0, f32::MAX]);
            (*kind, *value) = gguf::f32_value(number);
            format!("{number}")
        }
        6 => {
            let text = values::text(random);
            (*kind, *value) = gguf::text_value(&text);
            "a text".to_string()
        }
        7 => {
            // An array that claims more than it has, or of arrays.
            let elements = *random.pick(&[0u32, 4, 7, 8, 9, 12, 13]);
            *kind = 9;
            *value = [
                &elements.to_le_bytes()[..],
                &random.pick(&values::SIZES).to_le_bytes(),
            ]
            .concat();
            format!("an array of {elements}")
        }
        8 => {
            file.metadata.remove(index);
            "not there".to_string()
        }
        _ => {
            let again = file.metadata[index].clone();
            file.metadata.push(again);
            "there twice".to_string()
        }
    };
    Damage::new(format!("{key}: {what}"), [])
}

/// One tensor's description or data; gives the file's bytes.
fn tensor(file: &mut Gguf, index: usize, random: &mut Random<'_>) -> (String, Vec<u8>) {
    let stored = &mut file.tensors[index];
    let what = match random.below(8) {
        0 => {
            stored.kind = random.below(44) as u32;
            format!("type {}", stored.kind)
        }
        1..=2 => {
            let at = random.below(stored.shape.len());
            stored.shape[at] = values::size(stored.shape[at] as u64, random) as usize;
            format!("shape {:?}", stored.shape)
        }
        3 => {
            match random.below(3) {
                0 => stored.shape.push(random.below(3)),
                1 => _ = stored.shape.pop(),
                _ => stored.shape.reverse(),
            }
            format!("shape {:?}", stored.shape)
        }
        4 => {
            let byte = *random.pick(&[0x80, 0xff, 0x7f]);
            stored.bytes.fill(byte);
            format!("all {byte:#x}")
        }
        5 => {
            file.tensors.remove(index);
            return ("not there".to_string(), file.bytes());
        }
        6 => {
            let again = stored.clone();
            file.tensors.push(again);
            "there twice".to_string()
        }
        _ => {
            // Rank or offset, which `bytes` would write as they are.
            let (name, rank) = (stored.name.clone(), stored.shape.len());
            let mut bytes = file.bytes();
            let described = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
            let at = bytes
                .windows(described.len())
                .position(|window| window == described);
            let at = at.expect("the header has the name") + described.len();
            let what = match random.once_in(3) {
                true => {
                    let rank = *random.pick(&[0u32, 5, 1 << 31, u32::MAX]);
                    bytes[at..at + 4].copy_from_slice(&rank.to_le_bytes());
                    format!("rank {rank}")
                }
                false => {
                    let at = at + 4 + 8 * rank + 4;
                    let offset = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
                    let offset = match random.once_in(2) {
                        true => values::size(offset, random),
                        false => offset.wrapping_add(32 * (1 + random.below(1 << 16) as u64)),
                    };
                    bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
                    format!("offset {offset}")
                }
            };
            return (what, bytes);
        }
    };
    (what, file.bytes())
}
