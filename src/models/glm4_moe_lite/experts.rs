//! The second half of a decoder layer: one gated MLP, or a router and experts.

use crate::Result;
use crate::checkpoint::Loader;
use crate::cpu::{Expert, Routing};
use crate::models::glm4_moe_lite::{Config, Layer};
use crate::models::observe::Trace;
use crate::nn::{FusedMoe, GatedMlp, Router};
use crate::ops;
use candle_core::Tensor;

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(GatedMlp),
    Sparse { router: Router, experts: FusedMoe },
}

impl FeedForward {
    pub fn load(loader: &Loader<'_>, prefix: &str, kind: Layer, config: &Config) -> Result<Self> {
        let hidden = config.hidden_size;
        let expert = |name: String, width: usize| -> Result<Expert> {
            Ok(Expert {
                gate: loader.weight(&format!("{name}.gate_proj"), width, hidden)?,
                up: loader.weight(&format!("{name}.up_proj"), width, hidden)?,
                down: loader.weight(&format!("{name}.down_proj"), hidden, width)?,
            })
        };
        if kind == Layer::Dense {
            let mlp = GatedMlp::new(expert(prefix.to_string(), config.intermediate_size)?)?;
            return Ok(Self::Dense(mlp.with_arithmetic(loader.arithmetic())));
        }
        let width = config.moe_intermediate_size;
        let routed = (0..config.n_routed_experts).map(|e| expert(format!("{prefix}.experts.{e}"), width));
        let routed = routed.collect::<Result<_>>()?;
        let shared = match config.n_shared_experts {
            0 => Vec::new(),
            count => vec![expert(format!("{prefix}.shared_experts"), width * count)?],
        };
        let experts = FusedMoe::new(routed, shared)?.with_arithmetic(loader.arithmetic());
        loader.note_copied(prefix, experts.copied_bytes());

        let routing = Routing {
            top_k: config.num_experts_per_tok,
            n_group: config.n_group,
            topk_group: config.topk_group,
            normalize: config.norm_topk_prob,
            scaling_factor: config.routed_scaling_factor as f32,
        };
        let bias = loader.vector(
            &format!("{prefix}.gate.e_score_correction_bias"),
            config.n_routed_experts,
        )?;
        let gate = loader.kept_weight(&format!("{prefix}.gate"), config.n_routed_experts, hidden)?;
        let router = Router::new(ops::Linear::new(gate, None)?, ops::Route::new(routing, bias)?);
        Ok(Self::Sparse { router, experts })
    }

    /// `[T, hidden]` to the same.
    pub fn forward(&self, x: &Tensor, trace: &mut Trace<'_, '_>) -> Result<Tensor> {
        match self {
            Self::Dense(mlp) => trace.see("mlp", x, mlp.forward(x)?),
            Self::Sparse { router, experts } => {
                let routed = router.forward(x)?;
                trace.see("mlp.gate", x, routed.logits)?;
                let mixed = experts.forward(x, &routed.ids, &routed.weights)?;
                trace.see("mlp.experts", x, mixed)
            }
        }
    }
}
