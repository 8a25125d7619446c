//! Tensors of every layout that are not what their names say: the input decides which layout, and what is done to it.
#![no_main]

use candle_mmfp4_fuzz::reading::damage;
use candle_mmfp4_fuzz::reading::folders::{self, Folder};
use candle_mmfp4_fuzz::reading::random::Random;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDERS: LazyLock<Vec<Folder>> = LazyLock::new(folders::all);

fuzz_target!(|input: &[u8]| {
    let mut random = Random::of_bytes(input, 0);
    let mut folder = random.pick(&FOLDERS).clone();
    if folder.gguf.is_some() {
        damage::gguf::damage(&mut folder, &mut random);
    } else if folder.tensors.is_empty() {
        damage::index(&mut folder, &mut random);
    } else {
        for _ in 0..1 + random.below(4) {
            damage::tensors::damage(&mut folder, &mut random);
        }
    }
    if random.once_in(4) && folder.files.contains_key("config.json") {
        damage::config::damage(&mut folder, &mut random);
    }
    candle_mmfp4_fuzz::weights(&folder);
});
