//! The small files: the first byte says which one the rest is.
#![no_main]

use candle_mmfp4_fuzz::reading::folders::{self, Folder};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| folders::find("marlin"));

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((which, text)) = input.split_first() else {
        return Corpus::Reject;
    };
    let Some(name) = folders::TEXTS.get(usize::from(*which)) else {
        return Corpus::Reject;
    };
    let mut folder = FOLDER.clone();
    // The template in tokenizer_config.json is used only where there is no other.
    folder.files.remove("chat_template.jinja");
    folder.files.insert(name.to_string(), text.into());
    candle_mmfp4_fuzz::all(&folder);
    Corpus::Keep
});
