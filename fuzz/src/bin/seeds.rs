//! Writes what the fuzzers begin with to `corpus/`: the files of whole folders.

use candle_mmfp4_fuzz::header_of;
use candle_mmfp4_fuzz::reading::folders::{self, INDEX, SINGLE, TEXTS};
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |fuzzer: &str, name: &str, bytes: &[u8]| {
        let folder = corpus.join(fuzzer);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(name), bytes)
    };
    for folder in folders::all() {
        if folder.gguf.is_some() {
            write("gguf", folder.layout, &header_of(&folder))?;
        } else if folder.files.contains_key(SINGLE) {
            write("safetensors", folder.layout, &header_of(&folder))?;
        }
        for (name, bytes) in &folder.files {
            match (name.as_str(), TEXTS.iter().position(|text| text == name)) {
                (INDEX, _) => write("index", folder.layout, bytes)?,
                ("config.json", _) => write("config", folder.layout, bytes)?,
                ("tokenizer.json", _) => write("tokenizer", name, bytes)?,
                (_, Some(which)) => write("texts", name, &[&[which as u8], &bytes[..]].concat())?,
                _ => {}
            }
        }
    }
    Ok(())
}
