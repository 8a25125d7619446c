//! What is read and how it is damaged: shared by this test and the fuzzers under `fuzz/`.
#![allow(dead_code, reason = "a fuzzer uses a part")]

pub mod damage;
pub mod folders;
mod model;
pub mod random;
pub mod read;
pub mod values;
