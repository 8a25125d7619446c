//! Hostile files: more than 20,000 model folders, each damaged in some way, are read; the same ones in every run. Whatever
//! stands in them,
//!
//! - nothing panics, and nothing takes long;
//! - an error names the file at fault and, where one is, the tensor or the field;
//! - no more memory is asked for than the folder's size justifies;
//! - no file outside the folder is read.
//!
//! Damage may go unnoticed where it does no harm: then the model loads, and a pass through it computes. `fuzz/` looks for
//! more of the same without end (docs/checkpoints.md).

#[path = "../common/mod.rs"]
mod common;
mod paths;
mod reading;
mod regressions;
mod run;
mod sizes;
mod watch;
mod writing;

use candle_mmfp4::Error;
use reading::damage::{self, Damage};
use reading::folders::{self, Folder, GGUF, INDEX, SINGLE};
use run::{Case, run};

/// How many folders of each kind are damaged and read.
const HEADERS: usize = 5000;
const TENSORS: usize = 5500;
const CONFIGS: usize = 3000;
const INDICES: usize = 1500;
const GGUFS: usize = 5000;
const TEXTS: usize = 1500;
const _: () = assert!(HEADERS + TENSORS + CONFIGS + INDICES + GGUFS + TEXTS > 20_000);

/// Folders with their tensors in one safetensors file.
fn safetensors() -> Vec<Folder> {
    let all = folders::all().into_iter();
    all.filter(|folder| folder.files.contains_key(SINGLE)).collect()
}

/// The folders that the damage is done to are whole.
#[test]
fn whole_folders_are_read() {
    let _alone = run::alone();
    for folder in folders::all() {
        for quantize in [false, true] {
            let read = reading::read::folder(&folder, quantize);
            read.unwrap_or_else(|error| panic!("{}: {error}", folder.layout));
        }
        let read = reading::read::all(&folder.in_memory());
        read.unwrap_or_else(|error| panic!("{}: {error}", folder.layout));
    }
}

#[test]
fn headers_of_safetensors_files() {
    let folders = safetensors();
    run("header", HEADERS, |_, random| {
        let mut folder = random.pick(&folders).clone();
        let damage = damage::header::damage(&mut folder, random);
        Case::weights(folder, damage, &[SINGLE])
    });
}

#[test]
fn tensors_that_are_not_what_their_names_say() {
    let folders = safetensors();
    run("tensors", TENSORS, |index, random| {
        let mut folder = random.pick(&folders).clone();
        let damage = damage::tensors::damage(&mut folder, random);
        Case {
            quantize: index % 4 == 0,
            ..Case::weights(folder, damage, &[SINGLE])
        }
    });
}

#[test]
fn configs() {
    let folder = folders::find("compressed-nvfp4");
    let systematic = damage::config::count(&folder);
    assert!(systematic < CONFIGS);
    run("config", CONFIGS, |index, random| {
        let mut folder = folder.clone();
        let damage = match index < systematic {
            true => damage::config::every_value(&mut folder, index),
            false => damage::config::damage(&mut folder, random),
        };
        // What a config says may be at odds with a tensor: the error names that then.
        Case::weights(folder, damage, &["config.json", SINGLE])
    });
}

#[test]
fn indices() {
    let whole = folders::find("two-files");
    run("index", INDICES, |_, random| {
        let mut folder = whole.clone();
        let damage = damage::index(&mut folder, random);
        Case::weights(folder, damage, &[INDEX, ".safetensors"])
    });
}

#[test]
fn gguf_files() {
    let all = folders::all().into_iter();
    let folders: Vec<_> = all.filter(|folder| folder.gguf.is_some()).collect();
    run("gguf", GGUFS, |index, random| {
        let mut folder = random.pick(&folders).clone();
        let damage = damage::gguf::damage(&mut folder, random);
        Case {
            whole: index % 2 == 0,
            quantize: index % 8 == 1,
            ..Case::weights(folder, damage, &[GGUF])
        }
    });
}

#[test]
fn small_files() {
    let whole = folders::find("marlin");
    run("text", TEXTS, |index, random| {
        let mut folder = whole.clone();
        let name = folders::TEXTS[index % folders::TEXTS.len()];
        if name == "tokenizer_config.json" && random.once_in(2) {
            // The template in it is used only where there is no other.
            folder.files.remove("chat_template.jinja");
        }
        let damage = damage::small_file(&mut folder, name, random);
        Case {
            whole: true,
            // What is in it is named where it is a field, which not all faults are.
            ..Case::weights(
                folder,
                Damage {
                    names: Vec::new(),
                    ..damage
                },
                &[name],
            )
        }
    });
}

/// Whether an error names one of these files of the folder, or a tensor that the folder does not have.
fn names_a_file(error: &Error, files: &[&str]) -> bool {
    let text = error.to_string();
    let missing = text.contains("in hostile: missing from the checkpoint");
    missing || files.iter().any(|file| text.contains(file))
}
