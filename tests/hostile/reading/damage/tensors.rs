//! Tensors that a file describes truly, and that are wrong for what they are called.

use super::{Damage, module};
use crate::reading::folders::{Folder, Stored};
use crate::reading::random::Random;
use safetensors::Dtype;

const DTYPES: [Dtype; 20] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3,
    Dtype::F8_E8M0,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I32,
    Dtype::U32,
    Dtype::F32,
    Dtype::C64,
    Dtype::F64,
    Dtype::I64,
    Dtype::U64,
    Dtype::F16,
    Dtype::U32,
];

/// What some quantiser writes beside a weight, or llama.cpp's blocks under the names that they are read by.
const FOREIGN: [&str; 25] = [
    "weight",
    "qweight",
    "packed_weight",
    "weight_packed",
    "scales",
    "weight.scales",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "scale",
    "biases",
    "g_idx",
    "qzeros",
    "weight_zero_point",
    "weight_shape",
    "weight.absmax",
    "weight_scale_inv",
    "hadamard_block_size",
    "weight.hadamard_block_size",
    "group_size",
    "weight.mxfp4",
    "weight.nvfp4",
    "weight.q8_0",
    "weight.q6_k",
    "bias",
];

/// Damages one of a folder's tensors, or puts another beside it.
pub fn damage(folder: &mut Folder, random: &mut Random<'_>) -> Damage {
    let index = random.below(folder.tensors.len());
    let stored = &mut folder.tensors[index];
    let name = stored.name.clone();
    let what = match random.below(11) {
        0..=1 => {
            stored.dtype = *random.pick(&DTYPES);
            fit(stored);
            "another dtype".to_string()
        }
        2..=3 => {
            reshape(stored, random);
            fit(stored);
            "another shape".to_string()
        }
        4 => {
            // As many elements, otherwise arranged.
            stored.shape.reverse();
            "a shape turned".to_string()
        }
        5..=6 => {
            let byte = *random.pick(&[0, 0x7f, 0x80, 0xff, 0x7c, 0xfe]);
            // What has been damaged before may have none.
            let from = random.below(stored.bytes.len().max(1));
            let until = (from + 1 + random.below(8)).min(stored.bytes.len());
            stored.bytes[from..until].fill(byte);
            format!("bytes {byte:#x} from {from}")
        }
        7 => {
            let value = *random.pick(&[
                f32::NAN,
                f32::INFINITY,
                -1.0,
                0.0,
                f32::MAX,
                f32::MIN_POSITIVE,
                1e-45,
            ]);
            let element = value.to_le_bytes();
            let whole = stored.bytes.len() / 4 * 4;
            stored.bytes[..whole]
                .chunks_exact_mut(4)
                .for_each(|bytes| bytes.copy_from_slice(&element));
            format!("{value} everywhere")
        }
        8 => {
            folder.tensors.remove(index);
            "not there".to_string()
        }
        9 => {
            let mut other = folder.tensors[random.below(folder.tensors.len())].clone();
            let suffix = random.pick(&FOREIGN);
            other.name = format!("{}.{suffix}", module(&name));
            if folder.tensors.iter().all(|stored| stored.name != other.name) {
                folder.tensors.push(other);
            }
            format!("{suffix} beside it")
        }
        _ => {
            let other = random.below(folder.tensors.len());
            let names = [&name, &folder.tensors[other].name].map(|name| module(name));
            let what = format!("{name} and {} in each other's place", folder.tensors[other].name);
            let (first, second) = (folder.tensors[index].clone(), folder.tensors[other].clone());
            folder.tensors[index].name = second.name;
            folder.tensors[other].name = first.name;
            folder.write_tensors();
            return Damage::new(what, names);
        }
    };
    folder.write_tensors();
    Damage::new(format!("{name}: {what}"), [module(&name)])
}

fn reshape(stored: &mut Stored, random: &mut Random<'_>) {
    let shape = &mut stored.shape;
    match random.below(5) {
        0 => shape.push(random.below(3)),
        1 => _ = shape.pop(),
        2 => shape.insert(0, random.below(3)),
        3 => *shape = (0..random.below(5)).map(|_| random.below(70)).collect(),
        _ if shape.is_empty() => shape.push(1),
        _ => {
            let at = random.below(shape.len());
            shape[at] = (shape[at] + random.below(4)).saturating_sub(2);
        }
    }
}

/// Brings the bytes to the length that dtype and shape say, the shape to one that is whole bytes and no large file.
fn fit(stored: &mut Stored) {
    let bits = |stored: &Stored| stored.shape.iter().product::<usize>() * stored.dtype.bitsize();
    if !bits(stored).is_multiple_of(8) || bits(stored) > 8 << 20 {
        stored.shape = vec![8];
    }
    let len = bits(stored) / 8;
    stored.bytes.resize(len, 0x3c);
}
