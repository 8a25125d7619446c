//! The small files but `tokenizer.json`, which has a fuzzer of its own: the first byte says which one the rest is.
#![no_main]

use candle_mmfp4_fuzz::reading::folders::{self, Folder};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| folders::find("marlin"));

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((which, text)) = input.split_first() else {
        return Corpus::Reject;
    };
    let name = match folders::TEXTS.get(usize::from(*which)) {
        None | Some(&"tokenizer.json") => return Corpus::Reject,
        Some(name) => name,
    };
    let mut folder = FOLDER.clone();
    // The template in tokenizer_config.json is used only where there is no other.
    folder.files.remove("chat_template.jinja");
    folder.files.insert(name.to_string(), text.into());
    candle_mmfp4_fuzz::all(&folder);
    Corpus::Keep
});
