//! Layers that a checkpoint lists and its model does not have: those that predict several tokens at once, mostly.

use super::files::ModelFiles;
use serde_json::Value;
use std::cell::OnceCell;

/// Tells the tensors of such layers, by the `config.json` beside the weights.
pub(super) struct Surplus<'a> {
    model: &'a ModelFiles,
    /// The layers that the model has; read when the first question is asked, as there is none of most checkpoints.
    layers: OnceCell<Option<u64>>,
}

impl<'a> Surplus<'a> {
    pub fn new(model: &'a ModelFiles) -> Self {
        Self {
            model,
            layers: OnceCell::new(),
        }
    }

    /// Whether a tensor is of a layer that the model does not have. Where no config says how many there are, of none.
    pub fn has(&self, tensor: &str) -> bool {
        let layers = self.layers.get_or_init(|| {
            let config = self.model.read("config.json").ok()?;
            layers_told(&serde_json::from_slice(&config).ok()?)
        });
        layers.is_some_and(|layers| is_beyond(tensor, layers))
    }
}

/// The layers that a config says the model has.
pub(super) fn layers_told(config: &Value) -> Option<u64> {
    config.get("num_hidden_layers")?.as_u64()
}

/// Whether a tensor is of a layer after so many.
pub(super) fn is_beyond(tensor: &str, layers: u64) -> bool {
    let layer = tensor
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.')?.0.parse::<u64>().ok());
    layer.is_some_and(|layer| layer >= layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_counted_from_0() {
        for (tensor, expected) in [
            ("model.layers.46.mlp.gate.weight", false),
            ("model.layers.47.eh_proj.weight", true),
            ("model.layers.147.enorm.weight", true),
            ("model.layers.x.enorm.weight", false),
            ("model.layers.47", false),
            ("model.norm.weight", false),
        ] {
            assert_eq!(is_beyond(tensor, 47), expected, "{tensor}");
        }
    }
}
