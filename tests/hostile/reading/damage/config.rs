//! Damage to `config.json`.

use super::{Damage, small_file};
use crate::reading::folders::Folder;
use crate::reading::random::Random;
use crate::reading::values::{self, NUMBERS};
use serde_json::{Value, json};

const NAME: &str = "config.json";

/// How many cases [`every_value`] has.
pub fn count(folder: &Folder) -> usize {
    read(folder).as_object().expect("it is an object").len() * strange().len()
}

/// The `index`th pair of a field and a value that it should not have.
pub fn every_value(folder: &mut Folder, index: usize) -> Damage {
    let (mut config, strange) = (read(folder), strange());
    let fields = config.as_object_mut().expect("it is an object");
    let field = fields
        .keys()
        .nth(index / strange.len())
        .expect("there is no more than `count`")
        .clone();
    let value = strange[index % strange.len()].clone();
    let what = format!("{field} = {value}");
    fields.insert(field.clone(), value);
    folder.files.insert(NAME.into(), config.to_string().into_bytes());
    Damage::new(what, [field])
}

/// Any other damage: several fields, what is said of quantisation, or the text.
pub fn damage(folder: &mut Folder, random: &mut Random<'_>) -> Damage {
    let mut config = read(folder);
    let fields = config.as_object_mut().expect("it is an object");
    let mut names = Vec::new();
    match random.below(4) {
        0 => return small_file(folder, NAME, random),
        1 => {
            let method = *random.pick(&[
                "mmfp4",
                "compressed-tensors",
                "modelopt",
                "gptq",
                "awq",
                "fp8",
                "bitsandbytes",
                "",
                "mxfp4",
            ]);
            let format = *random.pick(&[
                "nvfp4-pack-quantized",
                "mxfp4-pack-quantized",
                "pack-quantized",
                "dense",
                "",
            ]);
            let mut told = json!({
                "quant_method": method, "format": format, "quant_algo": "NVFP4", "bits": values::value(random),
                "group_size": values::value(random), "mode": values::value(random), "use_hadamard": values::value(random),
            });
            let fields = told.as_object_mut().expect("it is an object");
            for _ in 0..random.below(4) {
                let field = fields
                    .keys()
                    .nth(random.below(fields.len()))
                    .expect("few are removed")
                    .clone();
                fields.shift_remove(&field);
            }
            let field = *random.pick(&["quantization_config", "quantization"]);
            names.push(field.to_string());
            let told = if random.once_in(5) {
                values::value(random)
            } else {
                told
            };
            config[field] = told;
        }
        _ => {
            for _ in 0..1 + random.below(4) {
                let field = fields
                    .keys()
                    .nth(random.below(fields.len()))
                    .expect("it is not empty")
                    .clone();
                let value = match fields[&field].as_u64() {
                    Some(right) => values::size(right, random).into(),
                    None => values::value(random),
                };
                fields.insert(field.clone(), value);
                names.push(field);
            }
        }
    }
    let text = config.to_string();
    folder.files.insert(NAME.into(), text.into_bytes());
    Damage::new(format!("{names:?}"), names)
}

fn read(folder: &Folder) -> Value {
    serde_json::from_slice(&folder.files[NAME]).expect("it is whole")
}

/// Values that hardly any field may have.
fn strange() -> Vec<Value> {
    let numbers = NUMBERS
        .iter()
        .map(|number| serde_json::from_str(number).expect("each is a number"));
    let others = json!([null, true, false, "", "64", "NaN", [], [64], {}, {"a": 1}, ["dense"], [[[[]]]]]);
    numbers
        .chain(others.as_array().expect("it is a list").iter().cloned())
        .collect()
}
