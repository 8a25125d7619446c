//! What it means to read a folder: what a program does with one that it is given.

use super::folders::Folder;
use candle_core::Device;
use candle_mmfp4::checkpoint::{Checkpoint, LoadOptions, ModelFiles};
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{Message, Pipeline};
use candle_mmfp4::models::glm4_moe_lite::{Config, Logits, Model};
use candle_mmfp4::nn::CacheSize;
use candle_mmfp4::{Error, Result};

/// Config and weights, quantised while loading where that is asked for, and a pass through what came of it.
pub fn weights(files: &ModelFiles, quantize: bool) -> Result<()> {
    let options = LoadOptions {
        quantize: quantize.then(Format::nvfp4),
        ..LoadOptions::default()
    };
    // Both are read whatever the other says.
    let (config, checkpoint) = (Config::from_files(files), Checkpoint::from_files(files));
    let inspected = Model::inspect(files, &options);
    let (config, checkpoint) = (config?, checkpoint?);
    let (model, report) = Model::load(config, &checkpoint, &options, &Device::Cpu)?;
    // Whoever loads prints it.
    let _ = report.to_string();
    let problems = inspected?.problems;
    assert!(
        problems.is_empty(),
        "it loads, but inspecting it finds {problems:?}"
    );
    pass(&model)
}

/// All of a folder, with a cache of few tokens, a conversation by its template, and a pass.
pub fn all(files: &ModelFiles) -> Result<()> {
    let options = LoadOptions {
        kv_size: Some(CacheSize::Tokens(16)),
        ..LoadOptions::default()
    };
    let (pipeline, _) = Pipeline::from_files(files, &options, &Device::Cpu)?;
    let _ = pipeline.options();
    match pipeline.chat_prompt(&[Message::new("user", "ab c")], &Default::default()) {
        // A template may refuse a conversation.
        Ok(_) | Err(Error::Template(_) | Error::Tokenizer(_)) => {}
        Err(other) => return Err(other),
    }
    pass(pipeline.model())
}

/// Weights of a folder in memory.
pub fn folder(folder: &Folder, quantize: bool) -> Result<()> {
    weights(&folder.in_memory(), quantize)
}

fn pass(model: &Model) -> Result<()> {
    // A config may allow no more than one token.
    let tokens = &[0, 1][..model.config().max_position_embeddings.min(2)];
    model.forward(tokens, 0, &mut model.new_cache(), Logits::Last)?;
    Ok(())
}
