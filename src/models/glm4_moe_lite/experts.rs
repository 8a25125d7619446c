//! The second half of a decoder layer: one gated MLP, or a router and experts.

use super::reads::Reads;
use crate::checkpoint::Loader;
use crate::cpu::{Expert, Routing};
use crate::fp4::Weight;
use crate::models::glm4_moe_lite::{Config, Layer};
use crate::models::observe::Trace;
use crate::nn::{FusedMoe, GatedMlp, Router, SeparateMoe};
use crate::ops;
use crate::{Error, Result};
use candle_core::Tensor;

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(GatedMlp),
    Sparse {
        router: Router,
        experts: FusedMoe,
        /// Runs instead of the fused op, where that was asked for.
        separate: Option<SeparateMoe>,
    },
}

/// The router of the mixture of experts `prefix`.
pub(super) fn load_router(loader: &Loader<'_>, prefix: &str, config: &Config) -> Result<Router> {
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
    let gate = loader.kept_weight(
        &format!("{prefix}.gate"),
        config.n_routed_experts,
        config.hidden_size,
    )?;
    Ok(Router::new(
        ops::Linear::new(gate, None)?,
        ops::Route::new(routing, bias)?,
    ))
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
            loader.note_copied(prefix, mlp.copied_bytes());
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

        let router = load_router(loader, prefix, config)?;
        let separate = loader.separates_experts().then(|| SeparateMoe::new(&experts));
        Ok(Self::Sparse {
            router,
            separate: separate.transpose()?,
            experts,
        })
    }

    /// Refuses what a device that runs launch plans has no kernel for: at the first token that would be late.
    pub fn check_kernels(&self, prefix: &str) -> Result<()> {
        let refuse = |part: &str, problem: &str| {
            let problem = format!("{problem}, or compute on the CPU (--device cpu)");
            Err(Error::tensor(format!("{prefix}{part}"), None, problem))
        };
        match self {
            Self::Dense(mlp) if !mlp.has_kernel() => refuse(
                "",
                "Metal kernels take an MLP in FP4, gate and up in one format: quantise it while loading (--quantize mmfp4)",
            ),
            Self::Sparse {
                experts,
                separate: None,
                ..
            } if !experts.has_kernel() => refuse(
                ".experts",
                "Metal kernels take experts in FP4, all of a layer in one format and no more than 512 of them: quantise \
                 them while loading (--quantize mmfp4), run them one by one (--no-fused-moe)",
            ),
            Self::Sparse { router, .. } if !router.has_kernel() => refuse(
                ".gate",
                "Metal kernels take a router in floating point that chooses no more than 16 of 512 experts: take a \
                 checkpoint whose routers are not quantised",
            ),
            _ => Ok(()),
        }
    }

    /// All weights but the router's, which is small.
    pub fn weights(&self) -> Vec<&Weight> {
        match self {
            Self::Dense(mlp) => mlp.weights().weights().into(),
            Self::Sparse { experts, .. } => {
                let all = experts.experts().iter().chain(experts.shared());
                all.flat_map(Expert::weights).collect()
            }
        }
    }

    /// Adds the bytes of its weights to what a pass reads.
    pub fn add_to(&self, reads: &mut Reads) {
        match self {
            Self::Dense(mlp) => reads.always += mlp.weights().size_in_bytes(),
            Self::Sparse { router, experts, .. } => {
                let bytes = |experts: &[Expert]| experts.iter().map(Expert::size_in_bytes).sum::<usize>();
                reads.always += router.size_in_bytes() + bytes(experts.shared());
                reads.experts.push(bytes(experts.experts()));
            }
        }
    }

    /// `[T, hidden]` to the same.
    pub fn forward(&self, x: &Tensor, trace: &mut Trace<'_, '_>) -> Result<Tensor> {
        match self {
            Self::Dense(mlp) => trace.see("mlp", x, mlp.forward(x)?),
            Self::Sparse {
                router,
                experts,
                separate,
                ..
            } => {
                let routed = router.forward(x)?;
                trace.see("mlp.gate", x, routed.logits)?;
                let mixed = match separate {
                    Some(experts) => experts.forward(x, &routed.ids, &routed.weights)?,
                    None => experts.forward(x, &routed.ids, &routed.weights)?,
                };
                trace.see("mlp.experts", x, mixed)
            }
        }
    }
}
