//! GLM-4.7-Flash (`glm4_moe_lite`): multi-head latent attention and a mixture of experts.
//!
//! Follows transformers' `Glm4MoeLiteForCausalLM`, whose float32 results the tests compare with. The
//! architecture is DeepSeek-V3's (arXiv 2412.19437): attention caches a latent of `kv_lora_rank` numbers and
//! one rotary key a token ([`attention`]), and all but the first layers route each token to a few of many
//! small experts ([`experts`]).

pub mod attention;
mod cache;
mod calibration;
mod config;
mod decoder;
pub mod experts;
mod forward;
mod inspect;
mod latent_heads;
mod paged;
mod reads;
mod tensors;

pub use attention::AttentionPath;
pub use cache::{Cache, ContiguousCaches};
pub use calibration::Calibration;
pub use config::{Config, Layer};
pub use decoder::Model;
pub(crate) use decoder::weights_stored;
pub use forward::{Logits, Sequence};
pub use inspect::{FileSize, Inspection, Needed, Told};
