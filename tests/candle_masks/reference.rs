//! A plain decoder in `f64`: no tensors, no cache, no mask. A query sums over the keys it may see, found by
//! comparing positions. Its weights come from their names, as the models' do.

use crate::weights::values;

#[derive(Clone, Copy, PartialEq)]
pub enum Norm {
    Rms,
    /// Gemma's: the scale is `1 + weight`.
    RmsPlusOne,
    Layer,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Mlp {
    /// `down(silu(gate) * up)`.
    Swiglu,
    /// `down(gelu(gate) * up)` with the tanh approximation.
    Geglu,
    /// Starcoder2's: `c_proj(gelu(c_fc))` with biases.
    Gelu,
    /// The names of the router's folder and of gate, up and down; weights of the chosen sum to one.
    Moe {
        folder: &'static str,
        names: [&'static str; 3],
        shared: bool,
    },
    /// DeepSeek's, from the second layer on; `groups` are how many there are and how many may be used.
    Deepseek {
        norm_topk: bool,
        groups: Option<(usize, usize)>,
    },
}

/// The family of llama, mistral, qwen and gemma, and where they differ.
#[derive(Clone)]
pub struct Plain {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub theta: f64,
    /// Gemma 3: another base in the layers that have a window.
    pub local_theta: Option<f64>,
    pub eps: f64,
    pub norm: Norm,
    pub mlp: Mlp,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub qk_norm: bool,
    /// Gemma 2 and 3: norms also after attention and MLP.
    pub sandwich: bool,
    pub scale_embeddings: bool,
    pub tied: bool,
    pub attention_cap: Option<f64>,
    pub final_cap: Option<f64>,
    /// How many keys a query of this layer sees, its own included.
    pub window: fn(usize) -> Option<usize>,
    pub experts: usize,
    pub top_k: usize,
    pub mla: Option<Mla>,
}

/// DeepSeek's latent attention, and what its routing multiplies the weights by.
#[derive(Clone, Copy)]
pub struct Mla {
    pub nope: usize,
    pub rope: usize,
    pub value: usize,
    pub rank: usize,
    pub routed_scaling: f64,
}

pub const PLAIN: Plain = Plain {
    vocab: 40,
    hidden: 32,
    intermediate: 48,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    theta: 10_000.,
    local_theta: None,
    eps: 1e-5,
    norm: Norm::Rms,
    mlp: Mlp::Swiglu,
    qkv_bias: false,
    o_bias: false,
    qk_norm: false,
    sandwich: false,
    scale_embeddings: false,
    tied: false,
    attention_cap: None,
    final_cap: None,
    window: |_| None,
    experts: 4,
    top_k: 2,
    mla: None,
};

fn tensor(name: &str, dims: &[usize]) -> Vec<f64> {
    values(name, dims).into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn linear(x: &[f64], name: &str, out: usize, bias: bool) -> Vec<f64> {
    let weight = tensor(&format!("{name}.weight"), &[out, x.len()]);
    let mut y: Vec<f64> = weight.chunks(x.len()).map(|row| dot(row, x)).collect();
    if bias {
        let bias = tensor(&format!("{name}.bias"), &[out]);
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
    y
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn silu(x: f64) -> f64 {
    x / (1. + (-x).exp())
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1. + ((2. / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

fn cap(x: f64, cap: Option<f64>) -> f64 {
    cap.map_or(x, |c| c * (x / c).tanh())
}

impl Plain {
    /// The logits after every token.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let embeddings = tensor("model.embed_tokens.weight", &[self.vocab, self.hidden]);
        let scale = if self.scale_embeddings {
            (self.hidden as f64).sqrt()
        } else {
            1.
        };
        let row = |t: &u32| {
            embeddings
                .chunks(self.hidden)
                .nth(*t as usize)
                .expect("a token of the vocabulary")
        };
        let mut xs: Vec<Vec<f64>> = tokens
            .iter()
            .map(|t| row(t).iter().map(|x| x * scale).collect())
            .collect();
        for layer in 0..self.layers {
            xs = self.layer(layer, &xs);
        }
        let head = if self.tied {
            "model.embed_tokens"
        } else {
            "lm_head"
        };
        xs.iter()
            .map(|x| {
                let logits = linear(&self.norm(x, "model.norm"), head, self.vocab, false);
                logits
                    .into_iter()
                    .map(|x| cap(x, self.final_cap) as f32)
                    .collect()
            })
            .collect()
    }

    fn layer(&self, layer: usize, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let p = format!("model.layers.{layer}");
        let normed: Vec<_> = xs
            .iter()
            .map(|x| self.norm(x, &format!("{p}.input_layernorm")))
            .collect();
        let attended = match self.mla {
            None => self.attention(layer, &format!("{p}.self_attn"), &normed),
            Some(mla) => self.latent_attention(mla, &format!("{p}.self_attn"), &normed),
        };
        let after = format!("{p}.post_attention_layernorm");
        let (before_mlp, after_mlp) = (
            format!("{p}.pre_feedforward_layernorm"),
            format!("{p}.post_feedforward_layernorm"),
        );
        xs.iter()
            .zip(attended)
            .map(|(x, y)| {
                if self.sandwich {
                    let x = add(x, &self.norm(&y, &after));
                    let y = self.mlp(layer, &p, &self.norm(&x, &before_mlp));
                    add(&x, &self.norm(&y, &after_mlp))
                } else {
                    let x = add(x, &y);
                    add(&x, &self.mlp(layer, &p, &self.norm(&x, &after)))
                }
            })
            .collect()
    }

    fn attention(&self, layer: usize, p: &str, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let d = self.head_dim;
        let window = (self.window)(layer);
        let theta = window.and(self.local_theta).unwrap_or(self.theta);
        let project = |x: &[f64], name: &str, heads: usize| -> Vec<Vec<f64>> {
            let y = linear(x, &format!("{p}.{name}_proj"), heads * d, self.qkv_bias);
            y.chunks(d).map(<[f64]>::to_vec).collect()
        };
        let rotated = |x: &[f64], position: usize, name: &str, heads: usize| -> Vec<Vec<f64>> {
            let turn = |mut head: Vec<f64>| {
                if self.qk_norm {
                    head = self.norm(&head, &format!("{p}.{name}_norm"));
                }
                rope(&head, position, theta)
            };
            project(x, name, heads).into_iter().map(turn).collect()
        };
        let keys: Vec<_> = xs
            .iter()
            .enumerate()
            .map(|(j, x)| rotated(x, j, "k", self.kv_heads))
            .collect();
        let vals: Vec<_> = xs.iter().map(|x| project(x, "v", self.kv_heads)).collect();
        let queries: Vec<_> = xs
            .iter()
            .enumerate()
            .map(|(i, x)| rotated(x, i, "q", self.heads))
            .collect();
        self.attend(&queries, &keys, &vals, window, p)
    }

    /// Position by position: `[position][head][channel]` each.
    fn attend(
        &self,
        queries: &[Vec<Vec<f64>>],
        keys: &[Vec<Vec<f64>>],
        values: &[Vec<Vec<f64>>],
        window: Option<usize>,
        p: &str,
    ) -> Vec<Vec<f64>> {
        let at = |(i, query): (usize, &Vec<Vec<f64>>)| {
            let seen: Vec<usize> = (0..=i).filter(|j| window.is_none_or(|w| i - j < w)).collect();
            let mut heads = Vec::new();
            for (h, q) in query.iter().enumerate() {
                let kv = h * keys[i].len() / query.len();
                let score = |j: &usize| {
                    cap(
                        dot(q, &keys[*j][kv]) / (q.len() as f64).sqrt(),
                        self.attention_cap,
                    )
                };
                let weights = softmax(&seen.iter().map(score).collect::<Vec<_>>());
                let sum = |c: usize| {
                    seen.iter()
                        .zip(&weights)
                        .map(|(j, w)| w * values[*j][kv][c])
                        .sum::<f64>()
                };
                heads.extend((0..values[i][kv].len()).map(sum));
            }
            linear(&heads, &format!("{p}.o_proj"), self.hidden, self.o_bias)
        };
        queries.iter().enumerate().map(at).collect()
    }

    fn latent_attention(&self, mla: Mla, p: &str, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let Mla {
            nope,
            rope,
            value,
            rank,
            ..
        } = mla;
        let (mut queries, mut keys, mut values) = (vec![], vec![], vec![]);
        for (i, x) in xs.iter().enumerate() {
            let q = linear(x, &format!("{p}.q_proj"), self.heads * (nope + rope), false);
            let turned = |q: &[f64]| [&q[..nope], &rope_pairs(&q[nope..], i, self.theta)].concat();
            queries.push(q.chunks(nope + rope).map(turned).collect());
            let latent = linear(x, &format!("{p}.kv_a_proj_with_mqa"), rank + rope, false);
            let shared_key = rope_pairs(&latent[rank..], i, self.theta);
            let latent = self.norm(&latent[..rank], &format!("{p}.kv_a_layernorm"));
            let kv = linear(
                &latent,
                &format!("{p}.kv_b_proj"),
                self.heads * (nope + value),
                false,
            );
            keys.push(
                kv.chunks(nope + value)
                    .map(|h| [&h[..nope], &shared_key].concat())
                    .collect(),
            );
            values.push(kv.chunks(nope + value).map(|h| h[nope..].to_vec()).collect());
        }
        self.attend(&queries, &keys, &values, None, p)
    }

    fn gated(&self, x: &[f64], p: &str, [gate, up, down]: [&str; 3], act: fn(f64) -> f64) -> Vec<f64> {
        let gate = linear(x, &format!("{p}.{gate}"), self.intermediate, false);
        let up = linear(x, &format!("{p}.{up}"), self.intermediate, false);
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| act(*g) * u).collect();
        linear(&inner, &format!("{p}.{down}"), self.hidden, false)
    }

    fn mlp(&self, layer: usize, p: &str, x: &[f64]) -> Vec<f64> {
        const NAMES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
        let dense = format!("{p}.mlp");
        match self.mlp {
            Mlp::Swiglu => self.gated(x, &dense, NAMES, silu),
            Mlp::Geglu => self.gated(x, &dense, NAMES, gelu_tanh),
            Mlp::Gelu => {
                let inner = linear(x, &format!("{dense}.c_fc"), self.intermediate, true);
                let inner: Vec<f64> = inner.into_iter().map(gelu_tanh).collect();
                linear(&inner, &format!("{dense}.c_proj"), self.hidden, true)
            }
            Mlp::Deepseek { .. } if layer == 0 => self.gated(x, &dense, NAMES, silu),
            Mlp::Deepseek { norm_topk, groups } => {
                let scores = softmax(&linear(x, &format!("{dense}.gate"), self.experts, false));
                let mut usable: Vec<usize> = (0..self.experts).collect();
                if let Some((count, used)) = groups {
                    let size = self.experts / count;
                    let best = |group: usize| {
                        scores[group * size..(group + 1) * size]
                            .iter()
                            .copied()
                            .fold(f64::MIN, f64::max)
                    };
                    let mut ranked: Vec<usize> = (0..count).collect();
                    ranked.sort_by(|&a, &b| best(b).total_cmp(&best(a)));
                    usable.retain(|e| ranked[..used].contains(&(e / size)));
                }
                usable.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                usable.truncate(self.top_k);
                let scale = match norm_topk {
                    true => 1. / usable.iter().map(|&e| scores[e]).sum::<f64>(),
                    false => self.mla.map_or(1., |mla| mla.routed_scaling),
                };
                let mut y = self.gated(x, &format!("{dense}.shared_experts"), NAMES, silu);
                for e in usable {
                    let expert = self.gated(x, &format!("{dense}.experts.{e}"), NAMES, silu);
                    y = add(
                        &y,
                        &expert.iter().map(|v| v * scores[e] * scale).collect::<Vec<_>>(),
                    );
                }
                y
            }
            Mlp::Moe {
                folder,
                names,
                shared,
            } => {
                let p = format!("{p}.{folder}");
                let scores = softmax(&linear(x, &format!("{p}.gate"), self.experts, false));
                let mut chosen: Vec<usize> = (0..self.experts).collect();
                chosen.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                chosen.truncate(self.top_k);
                let sum: f64 = chosen.iter().map(|&e| scores[e]).sum();
                let mut y = vec![0.; self.hidden];
                for e in chosen {
                    let expert = self.gated(x, &format!("{p}.experts.{e}"), names, silu);
                    y = add(
                        &y,
                        &expert.iter().map(|v| v * scores[e] / sum).collect::<Vec<_>>(),
                    );
                }
                if shared {
                    let gate = linear(x, &format!("{p}.shared_expert_gate"), 1, false)[0];
                    let expert = self.gated(x, &format!("{p}.shared_expert"), names, silu);
                    let weight = 1. / (1. + (-gate).exp());
                    y = add(&y, &expert.iter().map(|v| v * weight).collect::<Vec<_>>());
                }
                y
            }
        }
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let n = x.len() as f64;
        let weight = tensor(&format!("{name}.weight"), &[x.len()]);
        let mean = if self.norm == Norm::Layer {
            x.iter().sum::<f64>() / n
        } else {
            0.
        };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let plus = if self.norm == Norm::RmsPlusOne { 1. } else { 0. };
        let y = x
            .iter()
            .zip(weight)
            .map(|(x, w)| (x - mean) / (variance + self.eps).sqrt() * (w + plus));
        match self.norm {
            Norm::Layer => add(
                &y.collect::<Vec<_>>(),
                &tensor(&format!("{name}.bias"), &[x.len()]),
            ),
            _ => y.collect(),
        }
    }
}

/// Rotates the pairs `(x[2 i], x[2 i + 1])`.
fn rope_pairs(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let turn = |(i, pair): (usize, &[f64])| {
        let angle = position as f64 / theta.powf(2. * i as f64 / x.len() as f64);
        let (sin, cos) = angle.sin_cos();
        [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos]
    };
    x.chunks(2).enumerate().flat_map(turn).collect()
}

/// Rotates the pairs `(x[i], x[i + d / 2])`.
fn rope(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut y = x.to_vec();
    for i in 0..half {
        let angle = position as f64 / theta.powf(i as f64 / half as f64);
        let (sin, cos) = angle.sin_cos();
        y[i] = x[i] * cos - x[i + half] * sin;
        y[i + half] = x[i] * sin + x[i + half] * cos;
    }
    y
}
