//! Looking into a forward pass.

use crate::ops::ValueRange;
use crate::{Error, Result};
use candle_core::Tensor;

/// Where in a model a tensor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The decoder layer, counted from 0; `None` for embeddings, final norm and head.
    pub layer: Option<usize>,
    /// The op, by its name in the checkpoint (`q_a_proj`, `mlp.gate`, …), or `layer` for a whole layer.
    pub op: &'static str,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layer {layer}, {}", self.op),
            None => f.write_str(self.op),
        }
    }
}

/// Called after each op with its site, its input and its output; an error ends the pass. Ops are those that run without an
/// observer too: where one kernel does the work of two, such as `q_a_layernorm` and `q_b_proj`, the later is seen.
pub type Observer<'a> = dyn FnMut(Site, &Tensor, &Tensor) -> Result<()> + 'a;

/// An [`Observer`] that ends the pass at the first op whose output has a NaN or an infinity.
///
/// It reads every op's output once more, which costs time; without it nothing is looked at.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::models::check_finite;
/// use candle_mmfp4::models::glm4_moe_lite::{Logits, Model, Sequence};
///
/// let (model, _) = Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
/// let mut alone = [Sequence { tokens: &[1, 2, 3], position: 0, cache: None }];
/// model.forward_batch(&mut alone, Logits::Last, Some(&mut check_finite))?;
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
///
/// # Errors
/// [`Error::NonFiniteOutput`] with the layer, the op and its input's range.
pub fn check_finite(site: Site, input: &Tensor, output: &Tensor) -> Result<()> {
    let range = ValueRange::of(output)?;
    if range.is_finite() {
        return Ok(());
    }
    Err(Error::NonFiniteOutput {
        site,
        output: range,
        input: ValueRange::of(input)?,
    })
}

/// Hands ops' results to an observer, if there is one.
pub(crate) struct Trace<'a, 'b> {
    observer: Option<&'a mut Observer<'b>>,
    layer: Option<usize>,
}

impl<'a, 'b> Trace<'a, 'b> {
    pub fn new(observer: Option<&'a mut Observer<'b>>) -> Self {
        Self {
            observer,
            layer: None,
        }
    }

    pub fn enter(&mut self, layer: Option<usize>) {
        self.layer = layer;
    }

    pub fn see(&mut self, op: &'static str, input: &Tensor, output: Tensor) -> Result<Tensor> {
        if let Some(observer) = &mut self.observer {
            observer(
                Site {
                    layer: self.layer,
                    op,
                },
                input,
                &output,
            )?;
        }
        Ok(output)
    }
}
