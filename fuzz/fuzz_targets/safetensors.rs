//! Headers of safetensors files; which layout the config is of does not matter.
#![no_main]

use candle_mmfp4_fuzz::reading::folders::{self, Folder};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| folders::find("bf16"));

fuzz_target!(|input: &[u8]| {
    if let Some(folder) = candle_mmfp4_fuzz::with_header(FOLDER.clone(), input) {
        candle_mmfp4_fuzz::weights(&folder);
    }
});
