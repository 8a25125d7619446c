//! The model's weights in the order in which loading takes them, without the ops that it makes of them.

use crate::checkpoint::{Checkpoint, LoadOptions, LoadReport, Loader};
use crate::fp4::{Weight, gathered_bytes};
use crate::models::glm4_moe_lite::decoder::{duplicate_head, predicted};
use crate::models::glm4_moe_lite::reads::Reads;
use crate::models::glm4_moe_lite::{Config, Layer};
use crate::{Error, Result};

/// Problems that are looked for: a configuration may tell of a million experts that are not there, in each of thousands of
/// layers.
const MOST_PROBLEMS: usize = 1000;

/// What loading would report, and what it would end with: all of it, not only the first.
///
/// # Errors
/// Those of [`Loader::new`].
pub(super) fn report(
    config: &Config,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<(LoadReport, Vec<String>)> {
    let mut walk = Walk {
        loader: Loader::of_headers(checkpoint, options, config.layers.len())?,
        config,
        reads: Reads::default(),
        problems: Vec::new(),
        gave_up: false,
    };
    walk.model();
    let mut report = walk.loader.finish(&predicted(config), duplicate_head(config));
    report.bytes_a_token = walk.reads.of_tokens(1);
    Ok((report, walk.problems))
}

struct Walk<'a> {
    loader: Loader<'a>,
    config: &'a Config,
    reads: Reads,
    problems: Vec<String>,
    gave_up: bool,
}

impl Walk<'_> {
    fn model(&mut self) {
        let config = self.config;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = self.loader.kept_weight("model.embed_tokens", vocab, hidden);
        let embedding = self.found(embedding);
        if let Some(weight) = &embedding {
            self.reads = Reads::of_model(config, weight);
        }
        for (index, kind) in config.layers.iter().enumerate() {
            if self.gives_up() {
                return;
            }
            let name = |part: &str| format!("model.layers.{index}.{part}");
            match kind {
                Layer::Dense => self.mlp(&name("mlp")),
                Layer::Sparse => self.mixture(&name("mlp")),
            }
            self.attention(&name("self_attn"));
            self.vector(&name("input_layernorm.weight"), hidden);
            self.vector(&name("post_attention_layernorm.weight"), hidden);
        }
        self.vector("model.norm.weight", hidden);
        let tied = embedding.as_ref().filter(|_| config.tie_word_embeddings);
        // Without the embeddings there is nothing that a tied head could share.
        if tied.is_some() || !config.tie_word_embeddings {
            let head = self.loader.head("lm_head", vocab, hidden, tied);
            self.always(head);
        }
    }

    fn mlp(&mut self, prefix: &str) {
        let weights = self.expert(prefix, self.config.intermediate_size);
        self.reads.always += bytes(&weights);
        self.loader.note_copied(prefix, gathered_bytes(weights.iter()));
    }

    fn mixture(&mut self, prefix: &str) {
        let (config, width) = (self.config, self.config.moe_intermediate_size);
        let mut weights = Vec::new();
        for index in 0..config.n_routed_experts {
            if self.gives_up() {
                return;
            }
            weights.extend(self.expert(&format!("{prefix}.experts.{index}"), width));
        }
        self.reads.experts.push(bytes(&weights));
        if config.n_shared_experts > 0 {
            let shared = self.expert(
                &format!("{prefix}.shared_experts"),
                width * config.n_shared_experts,
            );
            self.reads.always += bytes(&shared);
            weights.extend(shared);
        }
        self.loader.note_copied(prefix, gathered_bytes(weights.iter()));
        let gate = format!("{prefix}.gate");
        self.vector(
            &format!("{gate}.e_score_correction_bias"),
            config.n_routed_experts,
        );
        let weight = self
            .loader
            .kept_weight(&gate, config.n_routed_experts, config.hidden_size);
        self.always(weight);
    }

    /// Of one expert, or an MLP, the weights that are there.
    fn expert(&mut self, name: &str, width: usize) -> Vec<Weight> {
        let hidden = self.config.hidden_size;
        let parts = [
            ("gate", width, hidden),
            ("up", width, hidden),
            ("down", hidden, width),
        ];
        let weight = |(part, n, k)| {
            let weight = self.loader.weight(&format!("{name}.{part}_proj"), n, k);
            self.found(weight)
        };
        parts.into_iter().filter_map(weight).collect()
    }

    fn attention(&mut self, prefix: &str) {
        let config = self.config;
        let (hidden, heads, latent) = (
            config.hidden_size,
            config.num_attention_heads,
            config.kv_lora_rank,
        );
        let (nope, rope, value) = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        );
        let (bias, name) = (config.attention_bias, |part: &str| format!("{prefix}.{part}"));
        let queries = heads * (nope + rope);
        match config.q_lora_rank {
            None => self.linear(&name("q_proj"), (queries, hidden), false),
            Some(rank) => {
                self.linear(&name("q_a_proj"), (rank, hidden), bias);
                self.vector(&name("q_a_layernorm.weight"), rank);
                self.linear(&name("q_b_proj"), (queries, rank), false);
            }
        }
        self.linear(&name("kv_a_proj_with_mqa"), (latent + rope, hidden), bias);
        self.vector(&name("kv_a_layernorm.weight"), latent);
        if self.loader.has_module(&name("embed_q")) {
            let keys = self.loader.stack(&name("embed_q"), heads, latent, nope);
            self.always(keys);
            let values = self.loader.stack(&name("unembed_out"), heads, value, latent);
            self.always(values);
        } else {
            self.linear(&name("kv_b_proj"), (heads * (nope + value), latent), false);
        }
        self.linear(&name("o_proj"), (hidden, heads * value), bias);
    }

    fn linear(&mut self, module: &str, (n, k): (usize, usize), bias: bool) {
        let weight = self.loader.weight(module, n, k);
        self.always(weight);
        if bias {
            self.vector(&format!("{module}.bias"), n);
        }
    }

    fn vector(&mut self, name: &str, len: usize) {
        let vector = self.loader.vector(name, len);
        self.reads.always += self.found(vector).map_or(0, |values| size_of_val(&values[..]));
    }

    /// Counts a weight that every token reads.
    fn always(&mut self, weight: Result<Weight>) {
        self.reads.always += self.found(weight).map_or(0, |weight| weight.size_in_bytes());
    }

    /// Whether there are so many problems that no more are looked for, which is the last of them then.
    fn gives_up(&mut self) -> bool {
        if self.problems.len() >= MOST_PROBLEMS && !self.gave_up {
            self.gave_up = true;
            self.problems.push("more of them are not looked for".into());
        }
        self.gave_up
    }

    /// Takes note of what is not as it should be.
    fn found<T>(&mut self, found: Result<T, Error>) -> Option<T> {
        found.map_err(|error| self.problems.push(error.to_string())).ok()
    }
}

fn bytes(weights: &[Weight]) -> usize {
    weights.iter().map(Weight::size_in_bytes).sum()
}
