//! Whole models over the layers of [`nn`](crate::nn).

pub mod glm4_moe_lite;
mod observe;
mod profile;

pub use observe::{Observer, Site, check_finite};
pub use profile::{Clock, Phase, PhaseReport, Profile, ProfileReport, ProfileRow};
