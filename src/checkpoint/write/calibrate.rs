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

    /// Has the linear layers of decoder layer `index` rounded, each with what its inputs tell. Called once for each layer, in the
    /// order of their numbers, also for those that an interrupted run has finished.
    ///
    /// # Errors
    /// Those of running the model so far, and of `rounding`.
    fn round_layer(&mut self, index: usize, rounding: &mut dyn Rounding) -> Result<()>;
}

/// What rounds weights for [`LayerInputs`].
pub trait Rounding {
    /// Whether an interrupted run has rounded decoder layer `index`: of its inputs nothing needs to be found out.
    fn is_finished(&self, index: usize) -> bool;

    /// Rounds the weight of the linear layer `module` (a weight's name without `.weight`): with `feedback`, or plainly where
    /// the text says too little of its inputs. What it has become; `None` where it stays as it is.
    ///
    /// # Errors
    /// Those of [`quantize_compensated`](crate::fp4::quantize_compensated).
    fn round(&mut self, module: &str, feedback: Option<&Feedback>) -> Result<Option<Fp4Tensor>>;
}
