//! What a layer's weights have become.

use crate::Result;
use crate::checkpoint::Rounding;
use crate::fp4::{Feedback, Fp4Tensor};
use std::collections::BTreeMap;

/// The linear layers of a decoder layer that have been rounded so far.
pub(super) struct Weights<'a> {
    rounding: &'a mut dyn Rounding,
    /// Whether an interrupted run has rounded all of them.
    pub finished: bool,
    /// By module.
    pub rounded: BTreeMap<String, Fp4Tensor>,
}

impl<'a> Weights<'a> {
    pub fn new(layer: usize, rounding: &'a mut dyn Rounding) -> Self {
        Self {
            finished: rounding.is_finished(layer),
            rounded: BTreeMap::new(),
            rounding,
        }
    }

    pub fn round(&mut self, module: String, feedback: Option<&Feedback>) -> Result<()> {
        if let Some(weight) = self.rounding.round(&module, feedback)? {
            self.rounded.insert(module, weight);
        }
        Ok(())
    }
}
