//! What a layer's weights have become.

use super::moments::Moments;
use crate::Result;
use crate::checkpoint::Rounding;
use crate::fp4::Fp4Tensor;
use std::collections::BTreeMap;

/// The linear layers of a decoder layer that have been rounded so far.
pub(super) struct Weights<'a> {
    rounding: &'a mut dyn Rounding,
    /// By module; what stays as it is is not among them.
    pub rounded: BTreeMap<String, Fp4Tensor>,
}

impl<'a> Weights<'a> {
    pub fn new(rounding: &'a mut dyn Rounding) -> Self {
        Self {
            rounding,
            rounded: BTreeMap::new(),
        }
    }

    /// Whether any of these modules is still to be rounded: else nobody needs to know of their inputs.
    pub fn are_open(&self, modules: &[String]) -> bool {
        modules.iter().any(|module| self.rounding.is_open(module))
    }

    /// Rounds modules that read the same.
    pub fn round(&mut self, modules: &[String], inputs: Moments) -> Result<()> {
        let [first, ..] = modules else {
            return Ok(());
        };
        let feedback = match self.are_open(modules) {
            true => inputs.into_feedback(first)?,
            false => None,
        };
        for module in modules {
            if let Some(weight) = self.rounding.round(module, feedback.as_ref())? {
                self.rounded.insert(module.clone(), weight);
            }
        }
        Ok(())
    }
}
