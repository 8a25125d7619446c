//! The demo model, which this program carries in itself: trained on Rust's documentation, in MMFP4.

use candle_mmfp4::Result;
use candle_mmfp4::checkpoint::ModelFiles;
use candle_mmfp4::fp4::Bytes;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$((
            $name,
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/", $name)).as_slice(),
        )),*]
    };
}

const FILES: [(&str, &[u8]); 8] = embedded![
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// What the demo model is asked where nobody asks anything.
pub const QUESTION: &str = "What does `Option::insert` do?";

pub fn files() -> Result<ModelFiles> {
    // Copies, because weights lie in page-aligned maps: 10 MB, a few milliseconds.
    let copies = FILES
        .iter()
        .map(|(name, bytes)| Ok((*name, Bytes::copy_from(bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(ModelFiles::in_memory("demo model", copies))
}
