//! `config.json`.
#![no_main]

use candle_mmfp4_fuzz::reading::folders::{self, Folder};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| folders::find("compressed-nvfp4"));

fuzz_target!(|input: &[u8]| {
    let mut folder = FOLDER.clone();
    folder.files.insert("config.json".into(), input.into());
    candle_mmfp4_fuzz::weights(&folder);
});
