//! The tensors that a model consists of, by its configuration.

use super::{Config, Layer, Model};
use crate::Result;
use crate::checkpoint::{Checkpoint, LoadOptions, ModelFiles, Supplied, has_weight};

/// A part of a model as a checkpoint in floating point names it.
#[derive(Debug, PartialEq, Eq)]
enum Need {
    /// The module of a matrix, `<module>.weight` or whatever a quantised checkpoint has in its place.
    Matrix(String),
    /// A vector's tensor.
    Vector(String),
}

impl Model {
    /// The tensors that a checkpoint lacks, by the names that they have in floating point: what
    /// [`LoadOptions::base`](crate::checkpoint::LoadOptions::base) has to supply. Of a weight that is there in part nothing
    /// is among them. Only headers are read.
    ///
    /// # Errors
    /// Those of [`Config::from_files`] and [`Checkpoint::from_files`].
    pub fn missing_tensors(files: &ModelFiles) -> Result<Vec<String>> {
        let (config, checkpoint) = (Config::from_files(files)?, Checkpoint::from_files(files)?);
        Ok(missing(&config, &checkpoint))
    }
}

/// The checkpoint with what the options' base supplies, and what that is; `None` where no base is given.
///
/// # Errors
/// Those of [`Checkpoint::completed`].
pub(super) fn completed(
    config: &Config,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Option<(Checkpoint, Vec<Supplied>)>> {
    let complete = |base| checkpoint.completed(base, &missing(config, checkpoint));
    options.base.as_ref().map(complete).transpose()
}

/// As [`Model::missing_tensors`].
fn missing(config: &Config, checkpoint: &Checkpoint) -> Vec<String> {
    let absent = |need: Need| match need {
        Need::Matrix(module) => {
            // Some checkpoints have this one in halves, under other names.
            let halves = module
                .strip_suffix("kv_b_proj")
                .map(|layer| format!("{layer}embed_q"));
            let there =
                has_weight(checkpoint, &module) || halves.is_some_and(|half| checkpoint.has_module(&half));
            (!there).then(|| format!("{module}.weight"))
        }
        Need::Vector(name) => checkpoint.find(&name).is_none().then_some(name),
    };
    needs(config).into_iter().filter_map(absent).collect()
}

fn needs(config: &Config) -> Vec<Need> {
    let mut needs = vec![Need::Matrix("model.embed_tokens".into())];
    for (index, kind) in config.layers.iter().enumerate() {
        layer(config, &format!("model.layers.{index}"), *kind, &mut needs);
    }
    needs.push(Need::Vector("model.norm.weight".into()));
    if !config.tie_word_embeddings {
        needs.push(Need::Matrix("lm_head".into()));
    }
    needs
}

fn layer(config: &Config, layer: &str, kind: Layer, needs: &mut Vec<Need>) {
    let norms = [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.kv_a_layernorm",
    ];
    let low_rank = config.q_lora_rank.map(|_| "self_attn.q_a_layernorm");
    for norm in norms.into_iter().chain(low_rank) {
        needs.push(Need::Vector(format!("{layer}.{norm}.weight")));
    }
    let queries: &[_] = match config.q_lora_rank {
        None => &["q_proj"],
        Some(_) => &["q_a_proj", "q_b_proj"],
    };
    for part in queries
        .iter()
        .chain(&["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])
    {
        needs.push(Need::Matrix(format!("{layer}.self_attn.{part}")));
        if config.attention_bias && ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"].contains(part) {
            needs.push(Need::Vector(format!("{layer}.self_attn.{part}.bias")));
        }
    }
    let mut mlp = |module: String| {
        let parts = ["gate_proj", "up_proj", "down_proj"];
        needs.extend(parts.map(|part| Need::Matrix(format!("{module}.{part}"))));
    };
    if kind == Layer::Dense {
        return mlp(format!("{layer}.mlp"));
    }
    (0..config.n_routed_experts).for_each(|expert| mlp(format!("{layer}.mlp.experts.{expert}")));
    if config.n_shared_experts > 0 {
        mlp(format!("{layer}.mlp.shared_experts"));
    }
    needs.push(Need::Matrix(format!("{layer}.mlp.gate")));
    needs.push(Need::Vector(format!("{layer}.mlp.gate.e_score_correction_bias")));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::glm4_moe_lite::decoder::predicted;
    use std::collections::BTreeSet;

    #[test]
    fn a_model_needs_the_tensors_that_it_has() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        let tiny = std::fs::read_dir(root.join("tiny-models")).unwrap();
        let folders = tiny.map(|entry| entry.unwrap().path());
        let mut seen = 0;
        for folder in folders.chain([root.join("demo-model")]) {
            let files = ModelFiles::folder(&folder);
            let config = Config::from_files(&files).unwrap();
            let needed = needs(&config).into_iter().map(|need| match need {
                Need::Matrix(module) => format!("{module}.weight"),
                Need::Vector(name) => name,
            });
            let checkpoint = Checkpoint::from_files(&files).unwrap();
            let surplus = predicted(&config);
            let of_model = |name: &&str| !surplus.iter().any(|prefix| name.starts_with(prefix));
            let names = checkpoint.tensors().map(|(name, _)| name).filter(of_model);
            let held: BTreeSet<_> = names.map(str::to_string).collect();
            assert_eq!(needed.collect::<BTreeSet<_>>(), held, "{}", folder.display());
            assert_eq!(Model::missing_tensors(&files).unwrap(), [""; 0]);
            seen += 1;
        }
        assert!(seen >= 7);
    }
}
