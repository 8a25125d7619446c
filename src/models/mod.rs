//! Whole models over the layers of [`nn`](crate::nn).

pub mod glm4_moe_lite;
mod observe;

pub use observe::{Observer, Site, check_finite};
