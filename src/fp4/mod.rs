//! The number format: 4-bit codes, block scales, the bytes they lie in, and the way there and back.
//!
//! An FP4 weight `[N, K]` is a row-major matrix of E2M1 codes ([`code`]) and, for each row and each
//! *group* of consecutive elements along K, one block scale ([`ScaleKind`]). An optional factor holds
//! for the whole tensor. The value of an element is
//!
//! ```text
//! w[n, k] = E2M1[code[n, k]] · (scale[n, k / group]  op  factor)      op: nothing, × or ÷
//! ```
//!
//! Two codes share a byte, the even k in the low nibble, so that a little-endian `u32` word of eight
//! codes and four `u8` pairs are the same bytes. Compressed-tensors, ModelOpt, MLX and Marlin MMFP4
//! checkpoints agree on this and differ only in the scales; [`Fp4Tensor`] therefore uses the codes of
//! each where they lie in the file ([`Bytes`]).
//!
//! | preset | group | scale | factor | bits a weight |
//! |---|---|---|---|---|
//! | [`Format::mmfp4`] | 128 | F16 | none | 4.125 |
//! | [`Format::mxfp4`] | 32 | E8M0 | none | 4.25 |
//! | [`Format::nvfp4`] | 16 | E4M3 | a power of two, multiplied | 4.5 |

mod blocks;
mod bytes;
pub mod code;
mod compensate;
mod dense;
mod feedback;
mod format;
mod gather;
mod int8;
mod quantize;
mod scale;
mod search;
mod tensor;
mod validate;

pub use blocks::BlockTensor;
pub use bytes::Bytes;
pub use compensate::quantize_compensated;
pub use dense::{DenseTensor, FloatKind, Weight};
pub use feedback::Feedback;
pub use format::Format;
pub(crate) use gather::{gather, gathered_bytes};
pub(crate) use int8::INT8_BLOCK;
pub use int8::Int8Tensor;
pub use quantize::{quantize, quantize_dense, shared_factor};
pub use scale::ScaleKind;
pub use search::ScaleRule;
pub use tensor::{Factor, Fp4Tensor, GROUPS, Parts};
pub use validate::{BlockError, Validation, validate};
