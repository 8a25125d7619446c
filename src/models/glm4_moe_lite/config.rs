//! `config.json`, in transformers 4's and 5's spellings.

use crate::checkpoint::{ModelFiles, check_config, check_quantization_file, gguf_config};
use crate::error::shortened;
use crate::kv::{CacheFormat, RowLayout};
use crate::nn::Pairing;
use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::Path;

/// The most layers that predict further tokens: models have one.
const MOST_PREDICTING: usize = 64;

/// What a decoder layer's second half is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// One gated MLP.
    Dense,
    /// A mixture of experts.
    Sparse,
}

/// The model's dimensions and constants, by the names of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Tokens the embedding knows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the dense layers' MLP.
    pub intermediate_size: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Rank of the queries' low-rank projection; `None` for one direct projection.
    pub q_lora_rank: Option<usize>,
    /// Width of the cached latent.
    pub kv_lora_rank: usize,
    /// Elements of a head that carry no position.
    pub qk_nope_head_dim: usize,
    /// Elements of a head that are rotated, shared by all heads on the keys' side.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Routed experts a layer.
    pub n_routed_experts: usize,
    /// Shared experts a layer, stored as one of their joint width.
    pub n_shared_experts: usize,
    /// Routed experts a token.
    pub num_experts_per_tok: usize,
    /// Groups the experts are divided into.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// Whether the chosen experts' weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// What the experts' weights are multiplied by.
    pub routed_scaling_factor: f64,
    /// The epsilon of the layer norms (not of the two norms inside attention: those use 1e-6).
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f32,
    /// Which elements are rotated together.
    pub rope_pairing: Pairing,
    /// Whether the projections q_a, kv_a and o have biases.
    pub attention_bias: bool,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The longest context.
    pub max_position_embeddings: usize,
    /// What each layer's second half is; as many as there are layers.
    pub layers: Vec<Layer>,
    /// Layers for predicting several tokens at once that follow in the checkpoint; they are not used.
    pub num_nextn_predict_layers: usize,
    /// The ids that end a text; `generation_config.json`, where it exists, takes precedence.
    pub eos_token_id: Vec<u32>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] for the file, [`Error::Config`] for a field.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|e| Error::io(path, e, "a model folder needs its config.json"))?;
        Self::parse(&bytes, path)
    }

    /// Reads the `config.json` of a model or, where its weights are GGUF files, what these say of it.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file); and [`Error::File`] for a `quantization_config.json` beside it that tells of what is
    /// not implemented.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        files.check()?;
        if files.is_gguf() {
            let (config, path) = gguf_config(files)?;
            return Self::from_json(&config).map_err(|error| match error {
                Error::Config {
                    field,
                    value,
                    problem,
                } => {
                    let problem = format!("its metadata, as a config.json, say {field} = {value}: {problem}");
                    Error::file(path, problem, "take a GGUF file of GLM-4.7-Flash")
                }
                other => other,
            });
        }
        let config = Self::parse(&files.read("config.json")?, &files.path("config.json"))?;
        check_quantization_file(files)?;
        Ok(config)
    }

    /// Reads a file's contents; `path` names it in messages.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| Error::file(path, format!("not JSON: {e}"), "fetch the file again"))?;
        Self::from_json(&value)
    }

    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] names the field that is missing, of the wrong type, or not implemented.
    pub fn from_json(value: &Value) -> Result<Self> {
        let Value::Object(fields) = value else {
            return Err(refuse("config.json", value, "expected an object"));
        };
        let fields = Fields(fields);
        fields.require_one_of("model_type", &["glm4_moe_lite"], None)?;
        fields.require_one_of("hidden_act", &["silu"], Some("silu"))?;
        fields.require_one_of("scoring_func", &["sigmoid"], Some("sigmoid"))?;
        fields.require_one_of("topk_method", &["noaux_tc"], Some("noaux_tc"))?;
        fields.check_quantization()?;
        let rope_theta = fields.rope_theta()?;

        let heads: usize = fields.get("num_attention_heads")?;
        let config = Self {
            vocab_size: fields.get("vocab_size")?,
            hidden_size: fields.get("hidden_size")?,
            intermediate_size: fields.get("intermediate_size")?,
            moe_intermediate_size: fields.get("moe_intermediate_size")?,
            num_attention_heads: heads,
            q_lora_rank: fields.get_or("q_lora_rank", None)?,
            kv_lora_rank: fields.get("kv_lora_rank")?,
            qk_nope_head_dim: fields.get("qk_nope_head_dim")?,
            qk_rope_head_dim: fields.get("qk_rope_head_dim")?,
            v_head_dim: fields.get("v_head_dim")?,
            n_routed_experts: fields.get("n_routed_experts")?,
            n_shared_experts: fields.get_or("n_shared_experts", 0)?,
            num_experts_per_tok: fields.get("num_experts_per_tok")?,
            n_group: fields.get_or("n_group", 1)?,
            topk_group: fields.get_or("topk_group", 1)?,
            norm_topk_prob: fields.get_or("norm_topk_prob", true)?,
            routed_scaling_factor: fields.get_or("routed_scaling_factor", 1.0)?,
            rms_norm_eps: fields.get("rms_norm_eps")?,
            rope_theta,
            rope_pairing: match fields.get_or("rope_interleave", true)? {
                true => Pairing::Interleaved,
                false => Pairing::Halves,
            },
            attention_bias: fields.get_or("attention_bias", false)?,
            tie_word_embeddings: fields.get_or("tie_word_embeddings", false)?,
            max_position_embeddings: fields.get("max_position_embeddings")?,
            layers: fields.layers()?,
            num_nextn_predict_layers: fields.get_or("num_nextn_predict_layers", 0)?,
            eos_token_id: fields.eos()?,
        };
        config.check(&fields)?;
        Ok(config)
    }

    /// Numbers a token takes in a layer's cache: latent and rotary key.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Where those numbers lie in a paged cache of this format.
    ///
    /// # Errors
    /// [`Error::Argument`] for a latent whose width the format does not take.
    pub fn cache_layout(&self, format: CacheFormat) -> Result<RowLayout> {
        RowLayout::latent(format, self.kv_lora_rank, self.qk_rope_head_dim)
    }

    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("n_routed_experts", self.n_routed_experts),
            // None of these is as good as one.
            ("n_shared_experts", self.n_shared_experts.max(1)),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_hidden_layers", self.layers.len()),
        ];
        for (field, size) in sizes {
            // Far beyond any model, and small enough that no product of three overflows.
            if size == 0 || size > 1 << 20 && field != "max_position_embeddings" {
                return Err(refuse(field, size, "expected a size between 1 and 1,048,576"));
            }
        }
        // Their tensors are known by their names, one of which is made for each layer.
        if self.num_nextn_predict_layers > MOST_PREDICTING {
            let problem = format!("expected 0 to {MOST_PREDICTING}");
            return Err(refuse(
                "num_nextn_predict_layers",
                self.num_nextn_predict_layers,
                problem,
            ));
        }
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            return Err(refuse(
                "qk_rope_head_dim",
                self.qk_rope_head_dim,
                "rotation needs pairs: expected an even number",
            ));
        }
        let head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim;
        let stated = fields.get_or("qk_head_dim", head_dim)?;
        if stated != head_dim {
            let problem = format!("expected qk_nope_head_dim + qk_rope_head_dim = {head_dim}");
            return Err(refuse("qk_head_dim", stated, problem));
        }
        let kv_heads = fields.get_or("num_key_value_heads", self.num_attention_heads)?;
        if kv_heads != self.num_attention_heads {
            let problem = format!(
                "latent attention has keys for each head: expected num_attention_heads = {}",
                self.num_attention_heads
            );
            return Err(refuse("num_key_value_heads", kv_heads, problem));
        }
        if self.n_group == 0 || !self.n_routed_experts.is_multiple_of(self.n_group) {
            let problem = format!("must divide n_routed_experts = {}", self.n_routed_experts);
            return Err(refuse("n_group", self.n_group, problem));
        }
        if self.topk_group == 0 || self.topk_group > self.n_group {
            return Err(refuse(
                "topk_group",
                self.topk_group,
                format!("expected 1 to n_group = {}", self.n_group),
            ));
        }
        let choice = self.topk_group * (self.n_routed_experts / self.n_group);
        if self.num_experts_per_tok == 0 || self.num_experts_per_tok > choice {
            let problem =
                format!("expected 1 to {choice}, the experts in the groups a token may choose from");
            return Err(refuse("num_experts_per_tok", self.num_experts_per_tok, problem));
        }
        let partial: f64 = fields.get_or("partial_rotary_factor", 1.0)?;
        if partial != 1.0 {
            return Err(refuse(
                "partial_rotary_factor",
                partial,
                "only 1 is implemented for this model",
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(refuse(
                "rms_norm_eps",
                self.rms_norm_eps,
                "expected a small positive number",
            ));
        }
        if !self.routed_scaling_factor.is_finite() {
            return Err(refuse(
                "routed_scaling_factor",
                self.routed_scaling_factor,
                "expected a finite number",
            ));
        }
        Ok(())
    }
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    /// A field that is there and not null.
    fn present(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn get<T: DeserializeOwned>(&self, field: &str) -> Result<T> {
        let value = self
            .present(field)
            .ok_or_else(|| refuse(field, "missing", "the model needs it"))?;
        parse(field, value)
    }

    fn get_or<T: DeserializeOwned>(&self, field: &str, default: T) -> Result<T> {
        self.present(field)
            .map_or(Ok(default), |value| parse(field, value))
    }

    fn require_one_of(&self, field: &str, accepted: &[&str], default: Option<&str>) -> Result<()> {
        let found = match default {
            Some(default) => self.get_or(field, default.to_string())?,
            None => self.get::<String>(field)?,
        };
        if !accepted.contains(&found.as_str()) {
            return Err(refuse(
                field,
                found,
                format!("only {} is implemented", accepted.join(", ")),
            ));
        }
        Ok(())
    }

    /// `rope_theta` at top level or under `rope_parameters`; scaled and otherwise modified RoPE is refused.
    fn rope_theta(&self) -> Result<f32> {
        const FIELD: &str = "rope_theta";
        let mut theta = self.present(FIELD).map(|theta| (FIELD.to_string(), theta));
        for section in ["rope_parameters", "rope_scaling"] {
            let Some(value) = self.present(section) else {
                continue;
            };
            let Value::Object(rope) = value else {
                return Err(refuse(section, value, "expected an object"));
            };
            for field in ["rope_type", "type"] {
                match rope.get(field) {
                    None | Some(Value::Null) => {}
                    Some(Value::String(kind)) if kind == "default" => {}
                    Some(other) => {
                        return Err(refuse(
                            &format!("{section}.{field}"),
                            other,
                            "only default is implemented",
                        ));
                    }
                }
            }
            let partial = rope
                .get("partial_rotary_factor")
                .filter(|v| v.as_f64() != Some(1.0));
            if let Some(partial) = partial {
                return Err(refuse(
                    &format!("{section}.partial_rotary_factor"),
                    partial,
                    "only 1 is implemented",
                ));
            }
            let given = rope.get(FIELD).filter(|theta| !theta.is_null());
            theta = given.map(|theta| (format!("{section}.{FIELD}"), theta)).or(theta);
        }
        let Some((field, value)) = theta else {
            return Err(refuse(
                FIELD,
                "missing",
                "expected at top level or under rope_parameters",
            ));
        };
        let theta: f32 = parse(&field, value)?;
        if !(theta.is_finite() && theta > 0.0) {
            return Err(refuse(&field, value, "expected a positive number"));
        }
        Ok(theta)
    }

    /// `mlp_layer_types`, or the first `first_k_dense_replace` layers dense and the others sparse.
    fn layers(&self) -> Result<Vec<Layer>> {
        let count: usize = self.get("num_hidden_layers")?;
        if count == 0 || count > 1 << 12 {
            return Err(refuse("num_hidden_layers", count, "expected 1 to 4096"));
        }
        if let Some(value) = self.present("mlp_layer_types") {
            let names: Vec<String> = parse("mlp_layer_types", value)?;
            if names.len() != count {
                let problem = format!("{} entries for num_hidden_layers = {count}", names.len());
                return Err(refuse("mlp_layer_types", value, problem));
            }
            let layer = |name: &String| match name.as_str() {
                "dense" => Ok(Layer::Dense),
                "sparse" => Ok(Layer::Sparse),
                other => Err(refuse("mlp_layer_types", other, "expected dense or sparse")),
            };
            return names.iter().map(layer).collect();
        }
        // Transformers' default: only the first layer is dense.
        let dense = self.get_or("first_k_dense_replace", 1)?;
        Ok((0..count)
            .map(|i| if i < dense { Layer::Dense } else { Layer::Sparse })
            .collect())
    }

    fn eos(&self) -> Result<Vec<u32>> {
        match self.present("eos_token_id") {
            None => Ok(Vec::new()),
            Some(list @ Value::Array(_)) => parse("eos_token_id", list),
            Some(one) => Ok(vec![parse("eos_token_id", one)?]),
        }
    }

    fn check_quantization(&self) -> Result<()> {
        let fields = ["quantization_config", "quantization"].into_iter();
        let mut told = fields.filter_map(|field| Some((field, self.present(field)?)));
        told.try_for_each(|(field, value)| check_config(field, value))
    }
}

fn parse<T: DeserializeOwned>(field: &str, value: &Value) -> Result<T> {
    T::deserialize(value).map_err(|e| refuse(field, value, shortened(e.to_string())))
}

fn refuse(field: &str, value: impl std::fmt::Display, problem: impl Into<String>) -> Error {
    Error::Config {
        field: field.into(),
        value: shortened(value.to_string()),
        problem: problem.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plain() -> Value {
        json!({
            "model_type": "glm4_moe_lite", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
            "moe_intermediate_size": 64, "num_attention_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "num_hidden_layers": 3,
            "max_position_embeddings": 512, "routed_scaling_factor": 1.8,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "mlp_layer_types": ["dense", "sparse", "sparse"], "eos_token_id": [1, 2],
        })
    }

    fn with(changes: Value) -> Value {
        let mut config = plain();
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        config
    }

    #[test]
    fn both_spellings_give_one_config() {
        let new = Config::from_json(&plain()).unwrap();
        assert_eq!(new.layers, [Layer::Dense, Layer::Sparse, Layer::Sparse]);
        let old = with(json!({
            "rope_parameters": null, "rope_theta": 1000000, "rope_scaling": null, "mlp_layer_types": null,
            "first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
            "partial_rotary_factor": 1.0,
        }));
        assert_eq!(Config::from_json(&old).unwrap(), new);
        let one_eos = Config::from_json(&with(json!({"eos_token_id": 7, "q_lora_rank": null}))).unwrap();
        assert_eq!((one_eos.eos_token_id, one_eos.q_lora_rank), (vec![7], None));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            (json!({"model_type": "llama"}), "model_type = llama"),
            (json!({"model_type": null}), "model_type = missing"),
            (json!({"hidden_act": "gelu"}), "hidden_act = gelu"),
            (
                json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}),
                "rope_parameters.rope_type",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2}}),
                "rope_scaling.type",
            ),
            (json!({"rope_parameters": null}), "rope_theta = missing"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor = 0.5",
            ),
            (
                json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
                "quant_method = gptq",
            ),
            (
                json!({"quantization_config": {"quant_method": "awq"}}),
                "quant_method = awq",
            ),
            (json!({"quantization_config": {}}), "quant_method = missing"),
            (json!({"scoring_func": "softmax"}), "scoring_func = softmax"),
            (json!({"hidden_size": 0}), "hidden_size = 0"),
            (json!({"hidden_size": "many"}), "hidden_size"),
            (json!({"hidden_size": -1}), "hidden_size = -1"),
            (json!({"vocab_size": null}), "vocab_size = missing"),
            (json!({"qk_rope_head_dim": 15}), "qk_rope_head_dim = 15"),
            (json!({"qk_head_dim": 47}), "qk_head_dim = 47"),
            (json!({"num_key_value_heads": 1}), "num_key_value_heads = 1"),
            (json!({"n_group": 3}), "n_group = 3"),
            (json!({"n_group": 0}), "n_group = 0"),
            (json!({"n_group": 4, "topk_group": 5}), "topk_group = 5"),
            (json!({"n_group": 8, "topk_group": 1}), "num_experts_per_tok = 2"),
            (json!({"num_experts_per_tok": 9}), "num_experts_per_tok = 9"),
            (json!({"mlp_layer_types": ["dense"]}), "mlp_layer_types"),
            (
                json!({"mlp_layer_types": ["dense", "sparse", "odd"]}),
                "mlp_layer_types = odd",
            ),
            (json!({"rms_norm_eps": -1.0}), "rms_norm_eps = -1"),
        ];
        for (changes, expected) in cases {
            let error = Config::from_json(&with(changes)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} should name {expected}");
        }
        assert!(Config::from_json(&json!([])).is_err());
        assert!(Config::from_json(&with(json!({"quantization_config": {"quant_method": "mmfp4"}}))).is_ok());
    }
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// GLM-4.7-Flash's own dimensions.
    pub fn flash() -> Config {
        Config::from_json(&serde_json::json!({
            "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
            "moe_intermediate_size": 1536, "num_attention_heads": 20, "q_lora_rank": 768, "kv_lora_rank": 512,
            "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 64,
            "n_shared_experts": 1, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5, "num_hidden_layers": 47,
            "max_position_embeddings": 202752, "routed_scaling_factor": 1.8, "rope_theta": 1e6,
            "num_nextn_predict_layers": 1,
        }))
        .unwrap()
    }
}
