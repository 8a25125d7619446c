//! 4-bit floating-point models in [Candle](candle_core): linear layers, fused mixtures of experts and
//! GLM-4.7-Flash.
//!
//! # In ten lines
//!
//! Swap a layer: any `candle_nn::Linear` becomes a quarter of its size, for an error that [`fp4::validate`]
//! tells.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use candle_mmfp4::{fp4::Format, nn::MmfP4Linear};
//!
//! let dense = candle_nn::Linear::new(Tensor::randn(0f32, 1., (64, 128), &Device::Cpu)?, None);
//! let layer = MmfP4Linear::from_linear(&dense, Format::mmfp4())?;
//! assert_eq!(layer.forward(&Tensor::ones((2, 128), candle_core::DType::BF16, &Device::Cpu)?)?.dims(), [2, 64]);
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! Load a model, ask it something: an FP4 folder is used where it lies, a BF16 one can be quantised while
//! loading ([`checkpoint::LoadOptions`]).
//!
//! ```
//! use candle_core::Device;
//! use candle_mmfp4::generation::{Event, Message, Pipeline};
//!
//! let (pipeline, report) = Pipeline::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
//! println!("{report}");
//! let prompt = pipeline.chat_prompt(&[Message::new("user", "What does `Vec::push` do?")], &Default::default())?;
//! for event in pipeline.generate(&prompt, &pipeline.options())? {
//!     if let Event::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok::<(), candle_mmfp4::Error>(())
//! ```
//!
//! # The map
//!
//! | module | what for |
//! |---|---|
//! | [`fp4`] | the number format: quantise, decode, measure what it cost |
//! | [`kv`] | a cache's bytes: formats, where they lie in a pool, blocks |
//! | [`nn`] | what a Candle user swaps in: [`MmfP4Linear`](nn::MmfP4Linear), [`FusedMoe`](nn::FusedMoe), masks, caches |
//! | [`ops`] | the custom ops behind them, and their comparison with a plain reference |
//! | [`cpu`] | the kernels, and that reference |
//! | [`metal`] | Metal kernels and their launch plans; what runs them |
//! | [`models`] | [`glm4_moe_lite`](models::glm4_moe_lite), and looking into a forward pass |
//! | [`checkpoint`] | safetensors folders and GGUF files read where they lie, quantised and written; the hub |
//! | [`generation`] | tokenizer, chat template, sampling, sessions, batches |
//! | [`memory`], [`bandwidth`] | how much of it this process takes, and how fast it is read |
//! | [`doctor`] | what this machine is, and whether the kernels compute here what they should |
//!
//! # What runs where
//!
//! On the CPU everything runs and is tested. On Metal every op that a model needs has a kernel, which has run on Linux and
//! on an NVIDIA GPU, but not yet on an Apple one; what has none is an error that says so. CUDA is not supported. There is no backward pass.

#![deny(missing_docs, clippy::undocumented_unsafe_blocks)]

pub mod bandwidth;
pub mod checkpoint;
pub mod cpu;
pub mod doctor;
mod error;
pub mod fp4;
pub mod generation;
pub mod kv;
pub mod memory;
pub mod metal;
pub mod models;
pub mod nn;
pub mod ops;
mod place;
mod random;

pub use error::{Error, Result};
pub use place::Place;
