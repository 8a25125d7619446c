//! Looking into a forward pass.

use candle_core::{Result, Tensor};

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

/// Called after each op with its site, its input and its output; an error ends the pass.
pub type Observer<'a> = dyn FnMut(Site, &Tensor, &Tensor) -> Result<()> + 'a;

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
