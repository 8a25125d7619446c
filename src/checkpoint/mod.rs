//! Model folders: safetensors and GGUF read where they lie, safetensors written.

mod base;
mod component;
mod disk;
mod files;
mod gguf;
mod header;
#[cfg(feature = "hub")]
pub mod hub;
mod keep;
mod layout;
mod layouts;
mod ledger;
mod load;
mod quality;
mod report;
mod safetensors;
mod surplus;
mod synthetic;
mod validate;
mod write;

pub use component::Component;
pub use files::ModelFiles;
pub(crate) use gguf::{chat_template as gguf_template, config as gguf_config, tokenizer as gguf_tokenizer};
pub use layouts::Layout;
pub(crate) use layouts::{check_config, check_quantization_file, has_weight};
pub use load::{LoadOptions, Loader};
pub use report::{Kept, LoadReport, OwnMemory, OwnReason, RoundedHead, Share, Supplied, Tally};
pub use safetensors::{Checkpoint, StoredTensor};
pub use synthetic::Synthetic;
pub use validate::{Quantized, validate_checkpoint};
pub use write::{
    LayerInputs, QuantizeOptions, QuantizeReport, Rounding, quantize_calibrated, quantize_checkpoint,
    quantize_folder,
};
