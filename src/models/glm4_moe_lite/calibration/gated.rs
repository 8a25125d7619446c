//! The second half of a layer: gated MLPs, each run over the tokens that it really sees.

use super::TOGETHER;
use super::moments::Moments;
use crate::Result;
use crate::checkpoint::Loader;
use crate::fp4::Feedback;
use crate::models::glm4_moe_lite::Config;
use crate::nn::{MmfP4Linear, Router};
use candle_core::{Device, Module, Tensor};

/// All tokens in the middle of a layer.
pub(super) struct Rows {
    /// What MLPs read, `[tokens, hidden]`.
    normed: Vec<f32>,
    /// The residual stream, `[tokens, hidden]`, to which is added what they give.
    stream: Vec<f32>,
    width: usize,
}

impl Rows {
    pub fn new(normed: Vec<f32>, stream: Vec<f32>, width: usize) -> Self {
        Self {
            normed,
            stream,
            width,
        }
    }

    fn len(&self) -> usize {
        self.normed.len() / self.width
    }

    /// Some tokens' inputs, `[tokens, hidden]`.
    fn inputs(&self, tokens: &[Token]) -> Result<Tensor> {
        let rows = tokens.iter().flat_map(|token| {
            let start = token.row * self.width;
            &self.normed[start..start + self.width]
        });
        let rows: Vec<f32> = rows.copied().collect();
        Ok(Tensor::from_vec(rows, (tokens.len(), self.width), &Device::Cpu)?)
    }

    fn add(&mut self, tokens: &[Token], outputs: &Tensor) -> Result<()> {
        let outputs = outputs.flatten_all()?.to_vec1::<f32>()?;
        for (token, output) in tokens.iter().zip(outputs.chunks_exact(self.width)) {
            let start = token.row * self.width;
            for (sum, value) in self.stream[start..start + self.width].iter_mut().zip(output) {
                *sum += token.weight * value;
            }
        }
        Ok(())
    }
}

/// A token that an MLP sees.
struct Token {
    row: usize,
    /// What its output is multiplied by.
    weight: f32,
}

/// `down(silu(gate x) · up x)`.
struct Mlp {
    /// `…mlp`, `…mlp.experts.3`.
    name: String,
    gate: MmfP4Linear,
    up: MmfP4Linear,
    down: MmfP4Linear,
    tokens: Vec<Token>,
    /// Whether the residual stream has its outputs.
    added: bool,
}

/// The MLPs of a layer.
pub(super) struct Gated {
    rows: Rows,
    mlps: Vec<Mlp>,
    /// Of the MLP that was last asked for.
    known: Option<Known>,
}

struct Known {
    mlp: String,
    /// Of gate and up, which read the same.
    gate: Option<Feedback>,
    down: Option<Feedback>,
}

impl Gated {
    /// Of one MLP for all tokens.
    pub fn dense(rows: Rows, loader: &Loader<'_>, name: String, config: &Config) -> Result<Self> {
        let mlp = Mlp::load(loader, name, config.intermediate_size, config, all(rows.len()))?;
        Ok(Self {
            rows,
            mlps: vec![mlp],
            known: None,
        })
    }

    /// Of the experts that `router` chooses for each token, and those that all share.
    pub fn sparse(
        rows: Rows,
        loader: &Loader<'_>,
        name: &str,
        config: &Config,
        router: &Router,
    ) -> Result<Self> {
        let mut chosen: Vec<Vec<Token>> = (0..config.n_routed_experts).map(|_| Vec::new()).collect();
        let every = all(rows.len());
        for tokens in every.chunks(TOGETHER) {
            let routed = router.forward(&rows.inputs(tokens)?)?;
            let (ids, weights) = (routed.ids.to_vec2::<u32>()?, routed.weights.to_vec2::<f32>()?);
            for (token, (ids, weights)) in tokens.iter().zip(ids.iter().zip(&weights)) {
                for (id, &weight) in ids.iter().zip(weights) {
                    chosen[*id as usize].push(Token {
                        row: token.row,
                        weight,
                    });
                }
            }
        }
        let width = config.moe_intermediate_size;
        let experts = chosen.into_iter().enumerate();
        let experts = experts
            .map(|(id, tokens)| Mlp::load(loader, format!("{name}.experts.{id}"), width, config, tokens));
        let mut mlps = experts.collect::<Result<Vec<_>>>()?;
        if config.n_shared_experts > 0 {
            let (name, width) = (format!("{name}.shared_experts"), width * config.n_shared_experts);
            mlps.push(Mlp::load(loader, name, width, config, every)?);
        }
        Ok(Self {
            rows,
            mlps,
            known: None,
        })
    }

    /// As [`LayerInputs::feedback`](crate::checkpoint::LayerInputs::feedback).
    pub fn feedback(&mut self, module: &str) -> Result<Option<&Feedback>> {
        let (name, linear) = module.rsplit_once('.').unwrap_or((module, ""));
        if self.known.as_ref().is_none_or(|known| known.mlp != name) {
            let mlp = self.mlps.iter_mut().find(|mlp| mlp.name == name);
            let Some(mlp) = mlp else {
                let problem = "expected an MLP or an expert that the model's config has";
                return Err(crate::Error::tensor(module, None, problem));
            };
            let inner = mlp.gate.weight().shape().0;
            let mut moments = [Moments::new(self.rows.width), Moments::new(inner)];
            mlp.run(&mut self.rows, Some(&mut moments))?;
            let [gate, down] = moments;
            self.known = Some(Known {
                gate: gate.into_feedback(&format!("{name}.gate_proj"))?,
                down: down.into_feedback(&format!("{name}.down_proj"))?,
                mlp: mlp.name.clone(),
            });
        }
        Ok(self.known.as_ref().and_then(|known| match linear {
            "down_proj" => known.down.as_ref(),
            _ => known.gate.as_ref(),
        }))
    }

    /// The residual stream behind the layer.
    pub fn finish(mut self) -> Result<Vec<f32>> {
        for mlp in &mut self.mlps {
            if !mlp.added {
                mlp.run(&mut self.rows, None)?;
            }
        }
        Ok(self.rows.stream)
    }
}

impl Mlp {
    fn load(
        loader: &Loader<'_>,
        name: String,
        inner: usize,
        config: &Config,
        tokens: Vec<Token>,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let linear = |part: &str, n, k| loader.linear(&format!("{name}.{part}"), n, k, false);
        Ok(Self {
            gate: linear("gate_proj", inner, hidden)?,
            up: linear("up_proj", inner, hidden)?,
            down: linear("down_proj", hidden, inner)?,
            name,
            tokens,
            added: false,
        })
    }

    /// Runs its tokens and adds, the first time, its outputs; and its inputs to the moments of gate and of down.
    fn run(&mut self, rows: &mut Rows, mut moments: Option<&mut [Moments; 2]>) -> Result<()> {
        for tokens in self.tokens.chunks(TOGETHER) {
            let x = rows.inputs(tokens)?;
            let inner = (self.gate.forward(&x)?.silu()? * self.up.forward(&x)?)?;
            if let Some([of_gate, of_down]) = moments.as_deref_mut() {
                of_gate.add(&x)?;
                of_down.add(&inner)?;
            }
            if !self.added {
                rows.add(tokens, &self.down.forward(&inner)?)?;
            }
        }
        self.added = true;
        Ok(())
    }
}

/// Every token, once and as it is.
fn all(tokens: usize) -> Vec<Token> {
    (0..tokens).map(|row| Token { row, weight: 1.0 }).collect()
}
