//! What was found to do harm once, each by itself.

use crate::reading::folders::{self, Folder, SINGLE};
use crate::reading::read;
use crate::run::alone;
use crate::watch::{Quiet, watch};
use candle_mmfp4::models::glm4_moe_lite::Model;
use serde_json::{Value, json};

fn with_config(layout: &str, field: &str, value: Value) -> Folder {
    let mut folder = folders::find(layout);
    let mut config: Value = serde_json::from_slice(&folder.files["config.json"]).unwrap();
    config[field] = value;
    folder
        .files
        .insert("config.json".into(), config.to_string().into_bytes());
    folder
}

/// A name was made for each of a million layers that a config told of, and each tensor compared with all of them.
#[test]
fn layers_that_predict_are_few() {
    let _alone = alone();
    let files = with_config("marlin", "num_nextn_predict_layers", json!(1 << 20)).in_memory();
    let (result, seen) = watch(|| read::weights(&files, false));
    let error = result.unwrap().unwrap_err().to_string();
    assert!(error.contains("num_nextn_predict_layers = 1048576"), "{error}");
    assert!(seen.peak < 1 << 20, "{seen:?}");
}

/// Of another dtype they were fewer bytes than the shape said, and the rest of the weight became zeros.
#[test]
fn blocks_are_bytes() {
    let _alone = alone();
    let mut folder = folders::find("bf16");
    let stored = folder
        .tensors
        .iter_mut()
        .find(|stored| stored.name.ends_with("0.mlp.up_proj.weight"))
        .unwrap();
    stored.name += ".mxfp4";
    (stored.dtype, stored.shape) = (safetensors::Dtype::F4, vec![64, 34]);
    stored.bytes = vec![0x5a; 64 * 17];
    folder.write_tensors();
    let error = read::folder(&folder, false).unwrap_err().to_string();
    assert!(
        error.contains("0.mlp.up_proj.weight.mxfp4") && error.contains("F4"),
        "{error}"
    );
}

/// Most faults in a header were not said to be of which tensor.
#[test]
fn a_header_at_fault_names_the_tensor() {
    let _alone = alone();
    let whole = folders::find("modelopt");
    let name = "model.layers.0.mlp.up_proj.weight_scale";
    for (from, to) in [
        ("[64,4]", "[64,5]"),
        ("[64,4]", "[-1]"),
        ("F8_E4M3", "F8_E4M9"),
        ("data_offsets", "offsets"),
    ] {
        let mut folder = whole.clone();
        let file = folder.files.get_mut(SINGLE).unwrap();
        let size = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(file[8..8 + size].to_vec()).unwrap();
        let at = header.find(&format!("\"{name}\"")).unwrap();
        let header = header[..at].to_string() + &header[at..].replacen(from, to, 1);
        *file = [
            &(header.len() as u64).to_le_bytes(),
            header.as_bytes(),
            &file[8 + size..],
        ]
        .concat();
        let error = read::folder(&folder, false).unwrap_err().to_string();
        assert!(
            error.contains(&format!("`{name}` in hostile/{SINGLE}")),
            "{error}"
        );
    }
}

/// A template was a program without end, and it runs when a model is loaded.
#[test]
fn a_template_that_does_not_end_is_stopped() {
    let _alone = alone();
    let mut folder = folders::find("marlin");
    let template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    folder.files.insert("chat_template.jinja".into(), template.into());
    let files = folder.in_memory();
    let (result, seen) = watch(|| read::all(&files));
    result.unwrap().unwrap();
    assert!(seen.time.as_secs() < 120, "{seen:?}");
}

/// An error in a template did not say which file it is in.
#[test]
fn a_template_at_fault_is_named() {
    let _alone = alone();
    let mut folder = folders::find("marlin");
    folder
        .files
        .insert("chat_template.jinja".into(), "{% if %}".into());
    let error = read::all(&folder.in_memory()).unwrap_err().to_string();
    assert!(error.contains("hostile/chat_template.jinja"), "{error}");
    folder.files.remove("chat_template.jinja");
    let config = json!({"chat_template": "{{ a"}).to_string();
    folder
        .files
        .insert("tokenizer_config.json".into(), config.into_bytes());
    let error = read::all(&folder.in_memory()).unwrap_err().to_string();
    assert!(error.contains("hostile/tokenizer_config.json"), "{error}");
}

/// Each of four thousand million experts that are not there was missed by name.
#[test]
fn inspecting_gives_up() {
    let _alone = alone();
    let mut folder = with_config("marlin", "n_routed_experts", json!(1 << 20));
    let mut config: Value = serde_json::from_slice(&folder.files["config.json"]).unwrap();
    config["num_hidden_layers"] = json!(4096);
    config["mlp_layer_types"] = Value::Null;
    folder
        .files
        .insert("config.json".into(), config.to_string().into_bytes());
    let files = folder.in_memory();
    let (found, seen) = watch(|| Model::inspect(&files, &Default::default()));
    let problems = found.unwrap().unwrap().problems;
    assert!(problems.len() < 1100, "{}", problems.len());
    assert!(
        problems.iter().any(|problem| problem.contains("not looked for")),
        "{:?}",
        problems.last()
    );
    assert!(seen.peak < 4 << 20, "{seen:?}");
}

/// The tokenizers crate panics at a decoder that ends early.
#[test]
fn a_tokenizer_that_panics_is_an_error() {
    let _alone = alone();
    for text in [
        r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLe"#
            .to_string(),
        r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": "#.to_string()
            + &"[".repeat(1000),
    ] {
        let mut folder = folders::find("marlin");
        folder.files.insert("tokenizer.json".into(), text.into());
        let files = folder.in_memory();
        let quiet = Quiet::new();
        let (result, _) = watch(|| read::all(&files));
        drop(quiet);
        let error = result.unwrap().unwrap_err().to_string();
        assert!(error.contains("hostile/tokenizer.json: not JSON"), "{error}");
    }
}

/// A value that cannot be quantised was not said to be in which file.
#[test]
fn a_value_that_cannot_be_quantised_is_in_a_file() {
    let _alone = alone();
    let mut folder = folders::find("bf16");
    let name = "model.layers.0.mlp.up_proj.weight";
    let stored = folder.tensors.iter_mut().find(|stored| stored.name == name);
    stored.unwrap().bytes.fill(0xff);
    folder.write_tensors();
    let error = read::folder(&folder, true).unwrap_err().to_string();
    let expected = format!("`{name}` in hostile/{SINGLE}: element 0");
    assert!(error.contains(&expected), "{error}");
}

/// A field that held a whole file was shown whole.
#[test]
fn what_a_message_shows_of_a_field_is_short() {
    let _alone = alone();
    let long = json!("x".repeat(100_000));
    let mut beside = folders::find("marlin");
    let text = json!({"transform_config": long}).to_string();
    beside
        .files
        .insert("quantization_config.json".into(), text.into_bytes());
    for (folder, field) in [
        (with_config("marlin", "hidden_size", long), "hidden_size"),
        (beside, "quantization_config.json: transform_config"),
    ] {
        let error = read::folder(&folder, false).unwrap_err().to_string();
        assert!(
            error.contains(field) && error.len() < 1000,
            "{} bytes",
            error.len()
        );
    }
}
