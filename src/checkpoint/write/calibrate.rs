//! What quantising has to be told of layers' inputs.

use crate::Result;
use crate::fp4::Feedback;
use serde_json::Value;

/// Inputs of a model's linear layers, from a text that the model has read.
///
/// [`Calibration`](crate::models::glm4_moe_lite::Calibration) is one.
pub trait LayerInputs {
    /// What `config.json` is to say of it. It tells interrupted runs apart, too: of other inputs it is another.
    fn note(&self) -> Value;

    /// What the inputs of the linear layer `module` (a weight's name without `.weight`) tell, or `None` where there are too
    /// few of them: the weight is then rounded plainly. Asked layer by layer, in the order of their numbers.
    ///
    /// # Errors
    /// Those of running the model so far.
    fn feedback(&mut self, module: &str) -> Result<Option<&Feedback>>;
}
