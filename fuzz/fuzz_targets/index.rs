//! The index of a checkpoint in several files.
#![no_main]

use candle_mmfp4_fuzz::reading::folders::{self, Folder, INDEX};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| folders::find("two-files"));

fuzz_target!(|input: &[u8]| {
    let mut folder = FOLDER.clone();
    folder.files.insert(INDEX.into(), input.into());
    candle_mmfp4_fuzz::weights(&folder);
});
