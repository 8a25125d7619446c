//! What quantising has to be told of layers' inputs.

use crate::Result;
use crate::fp4::{Feedback, Fp4Tensor};
use serde_json::Value;

/// Inputs of a model's linear layers, from a text that the model has read.
///
/// [`Calibration`](crate::models::glm4_moe_lite::Calibration) is one.
pub trait LayerInputs {
    /// What `config.json` is to say of it. It tells interrupted runs apart, too: of other inputs it is another.
    fn note(&self) -> Value;

    /// The decoder layers that it knows, counted from the first; the linear layers of others are rounded plainly.
    fn layers(&self) -> usize;

    /// Has the linear layers of decoder layer `index` rounded, each with what its inputs tell; those that it does not have rounded
    /// are rounded plainly. Called in the order of the layers' numbers, once for each up to the last of which something is to be
    /// written: also for those that an interrupted run has finished.
    ///
    /// # Errors
    /// Those of running the model so far, and of `rounding`.
    fn round_layer(&mut self, index: usize, rounding: &mut dyn Rounding) -> Result<()>;
}

/// What rounds weights for [`LayerInputs`].
pub trait Rounding {
    /// Whether the weight of the linear layer `module` (a weight's name without `.weight`) is still to be rounded: it does not
    /// stay as it is, and no interrupted run has written it.
    fn is_open(&self, module: &str) -> bool;

    /// What the weight of `module` becomes: where it [is open](Self::is_open), rounded with `feedback`, or plainly where the text
    /// says too little of its inputs; else as an interrupted run has written it. `None` where it stays as it is.
    ///
    /// # Errors
    /// Those of [`quantize_compensated`](crate::fp4::quantize_compensated); [`Error::Io`](crate::Error::Io) where what was written
    /// cannot be read.
    fn round(&mut self, module: &str, feedback: Option<&Feedback>) -> Result<Option<Fp4Tensor>>;
}
