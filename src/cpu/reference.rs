//! The plain implementations: dequantise, multiply, add, in the order of the formula, with f64 sums.
//!
//! Slow and obvious. Every kernel of this crate, on the CPU and on Metal, is compared with these.

use super::{Arithmetic, Attention, Expert, HeadRows, HeadView, PagedAttention, Pairing, Routing};
use crate::fp4::Weight;
use crate::kv::{RowKind, codec, hadamard};
use std::borrow::Cow;

fn dequantize(weight: &Weight) -> Vec<f32> {
    let (n, k) = weight.shape();
    let mut values = vec![0.0; n * k];
    for (i, row) in values.chunks_exact_mut(k).enumerate() {
        weight.decode_row(i, row);
    }
    values
}

fn dot(a: impl Iterator<Item = f32>, b: impl Iterator<Item = f32>) -> f32 {
    a.zip(b).map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}

/// Rows of `k` activations as [`Arithmetic::W4A8`] takes them: in each block of 128 elements (fewer at a row's end) of
/// largest magnitude `a` the nearest multiple of `a / 127`, ties to even; NaN throughout a block with NaN or infinity.
pub fn round(x: &[f32], k: usize) -> Vec<f32> {
    let round = |block: &[f32]| -> Vec<f32> {
        let largest = block.iter().fold(0f32, |largest, v| match v.is_nan() {
            true => f32::NAN,
            false => {
                if largest.is_nan() {
                    largest
                } else {
                    largest.max(v.abs())
                }
            }
        });
        // In f32, as the definition: between two steps another precision would go the other way.
        let step = largest / 127.0;
        let value = |v: &f32| match largest {
            0.0 => 0.0,
            _ if !largest.is_finite() => f32::NAN,
            _ => (v / step).round_ties_even().clamp(-127.0, 127.0) * step,
        };
        block.iter().map(value).collect()
    };
    x.chunks(k)
        .flat_map(|row| row.chunks(128))
        .flat_map(round)
        .collect()
}

/// What a product with this weight makes of its activations.
fn taken<'a>(weight: &Weight, x: &'a [f32], arithmetic: Arithmetic) -> Cow<'a, [f32]> {
    match (weight, arithmetic) {
        (Weight::Fp4(_) | Weight::Int8(_), Arithmetic::W4A8) => round(x, weight.shape().1).into(),
        _ => x.into(),
    }
}

/// `y[i, n] = Σ_k x[i, k] · w[n, k]`; see [`cpu::linear`](super::linear).
pub fn linear(weight: &Weight, x: &[f32], m: usize, arithmetic: Arithmetic) -> Vec<f32> {
    let rows = HeadRows {
        heads: 1,
        stride: weight.shape().0,
        start: 0,
        len: weight.shape().0,
    };
    per_head(weight, rows, x, m, arithmetic)
}

/// `y[i, h, r] = Σ_k x[i, h, k] · w[first(h) + r, k]`; see [`cpu::per_head`](super::per_head).
pub fn per_head(weight: &Weight, rows: HeadRows, x: &[f32], m: usize, arithmetic: Arithmetic) -> Vec<f32> {
    let x = taken(weight, x, arithmetic);
    let (w, k) = (dequantize(weight), weight.shape().1);
    let mut y = Vec::with_capacity(m * rows.heads * rows.len);
    for i in 0..m {
        for h in 0..rows.heads {
            for r in 0..rows.len {
                let x = &x[(i * rows.heads + h) * k..][..k];
                let w = &w[(rows.first(h) + r) * k..][..k];
                y.push(dot(x.iter().copied(), w.iter().copied()));
            }
        }
    }
    y
}

/// `y[i, h, k] = Σ_r x[i, h, r] · w[first(h) + r, k]`; see
/// [`cpu::per_head_transposed`](super::per_head_transposed).
pub fn per_head_transposed(weight: &Weight, rows: HeadRows, x: &[f32], m: usize) -> Vec<f32> {
    let (w, width) = (dequantize(weight), weight.shape().1);
    let mut y = Vec::with_capacity(m * rows.heads * width);
    for i in 0..m {
        for h in 0..rows.heads {
            for k in 0..width {
                let x = &x[(i * rows.heads + h) * rows.len..][..rows.len];
                let column = (0..rows.len).map(|r| w[(rows.first(h) + r) * width + k]);
                y.push(dot(x.iter().copied(), column));
            }
        }
    }
    y
}

/// `silu(g) · u`.
pub fn swiglu(gate: f32, up: f32) -> f32 {
    gate / (1.0 + (-gate).exp()) * up
}

/// `y[t] = Σ_slot w[t, slot] · down_e(silu(gate_e x[t]) · up_e x[t]) + Σ_shared down(…)`; see
/// [`cpu::fused_moe`](super::fused_moe).
pub fn fused_moe(
    experts: &[Expert],
    shared: &[Expert],
    x: &[f32],
    ids: &[u32],
    weights: &[f32],
    top_k: usize,
    arithmetic: Arithmetic,
) -> Vec<f32> {
    let d = experts[0].gate.shape().1;
    let mut y = Vec::with_capacity(x.len());
    for (t, x) in x.chunks_exact(d).enumerate() {
        let slots = (0..top_k).map(|slot| t * top_k + slot);
        let routed = slots.map(|slot| (&experts[ids[slot] as usize], weights[slot]));
        let mut sum = vec![0f64; experts[0].down.shape().0];
        for (expert, weight) in routed.chain(shared.iter().map(|expert| (expert, 1.0))) {
            let gate = linear(&expert.gate, x, 1, arithmetic);
            let up = linear(&expert.up, x, 1, arithmetic);
            let hidden: Vec<f32> = gate.into_iter().zip(up).map(|(g, u)| swiglu(g, u)).collect();
            for (sum, value) in sum.iter_mut().zip(linear(&expert.down, &hidden, 1, arithmetic)) {
                *sum += f64::from(weight) * f64::from(value);
            }
        }
        y.extend(sum.into_iter().map(|v| v as f32));
    }
    y
}

/// `y[i, h] = Σ_t softmax_t(scale · q · k) · v` for `n` queries, over the keys each sees; see
/// [`cpu::attend`](super::attend).
pub fn attention(attention: Attention<'_>, n: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(n * attention.heads * attention.values.width);
    for i in 0..n {
        for h in 0..attention.heads {
            let query: Vec<f32> = attention
                .queries
                .iter()
                .flat_map(|part| part.get(i, h))
                .copied()
                .collect();
            let score = |t: usize| {
                let key = attention.keys.iter().flat_map(|part| part.get(t, h));
                let products = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k));
                products.sum::<f64>() * f64::from(attention.scale)
            };
            let at = attention.position + i;
            let sees = |t: &usize| attention.window.is_none_or(|window| at - t < window);
            let visible: Vec<usize> = (0..=at).filter(sees).collect();
            let scores: Vec<f64> = visible.iter().copied().map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..attention.values.width {
                let value = |t: usize| f64::from(attention.values.get(t, h)[c]);
                let seen = visible.iter().zip(&weights);
                let mixed: f64 = seen.map(|(t, weight)| weight / sum * value(*t)).sum();
                y.push(mixed as f32);
            }
        }
    }
    y
}

/// Attention over a paged cache: every token decoded to f32, then the formula; see
/// [`cpu::attend_paged`](super::attend_paged).
///
/// # Panics
/// Where that gives an error.
pub fn paged_attention(paged: PagedAttention<'_>) -> Vec<f32> {
    let (layout, mut y, mut first) = (paged.layout, Vec::new(), 0);
    for sequence in paged.sequences.iter().filter(|sequence| sequence.queries > 0) {
        let mut rows = vec![0.0; sequence.len * layout.width()];
        for (position, row) in rows.chunks_exact_mut(layout.width()).enumerate() {
            let tokens = layout.block_tokens();
            let slot = sequence.table[position / tokens] * tokens as u32 + (position % tokens) as u32;
            codec::read(layout, paged.pool, slot, row).expect("a slot of the pool");
            let mut rest = row;
            for (index, part) in layout.parts().iter().enumerate() {
                let (vector, tail) = rest.split_at_mut(part.width);
                let rotary = index == 1 && matches!(layout.kind(), RowKind::Latent { .. });
                if let Some(block) = layout.rotation(part.width).filter(|_| !rotary) {
                    hadamard::unrotate(vector, block).expect("blocks that divide it");
                }
                rest = tail;
            }
        }
        let kv_heads = match layout.kind() {
            RowKind::Latent { .. } => 1,
            RowKind::Heads { kv_heads, .. } => kv_heads,
        };
        let per_query = paged.heads / kv_heads;
        // Of each head of keys the formula's output, then in the order of queries.
        let outputs: Vec<_> = (0..kv_heads)
            .map(|head| {
                let view = |start, width| HeadView {
                    data: &rows[start..],
                    row: layout.width(),
                    head: 0,
                    width,
                };
                let (keys, values) = match layout.kind() {
                    RowKind::Latent { latent, rope } => (view(0, latent + rope), view(0, latent)),
                    RowKind::Heads {
                        key_dim, value_dim, ..
                    } => (
                        view(head * key_dim, key_dim),
                        view(kv_heads * key_dim + head * value_dim, value_dim),
                    ),
                };
                let queries: Vec<_> = (paged.queries.iter())
                    .map(|part| HeadView {
                        data: &part.data[first * part.row + head * per_query * part.head..],
                        ..*part
                    })
                    .collect();
                let of_head = Attention {
                    heads: per_query,
                    queries: &queries,
                    keys: &[keys],
                    values,
                    position: sequence.len - sequence.queries,
                    window: paged.window,
                    scale: paged.scale,
                };
                attention(of_head, sequence.queries)
            })
            .collect();
        for query in 0..sequence.queries {
            for output in &outputs {
                let len = output.len() / sequence.queries;
                y.extend_from_slice(&output[query * len..][..len]);
            }
        }
        first += sequence.queries;
    }
    y
}

/// What parts of attention over runs of positions come to: of each row its `splits` parts of `width` elements, and of each of
/// them `(m, l)`, the largest score in base 2 and the sum of 2 to the power of the scores less it; gives
/// `Σ 2^(m - M) · part / Σ 2^(m - M) · l`, `M` being the row's largest `m`.
///
/// ```
/// use candle_mmfp4::cpu::reference::merge_parts;
///
/// // Two splits, of which the second weighs a quarter, and one without tokens.
/// let stats = [3., 1., 1., 1., f32::NEG_INFINITY, 0.];
/// assert_eq!(merge_parts(&[5., 10., 0.], &stats, 3, 1), [6.]);
/// ```
///
/// # Panics
/// Where there are not as many `stats` as parts.
pub fn merge_parts(parts: &[f32], stats: &[f32], splits: usize, width: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(parts.len() / splits);
    let rows = parts
        .chunks_exact(splits * width)
        .zip(stats.chunks_exact(2 * splits));
    for (parts, stats) in rows {
        let of = |at| stats.iter().skip(at).step_by(2).map(|stat| f64::from(*stat));
        let largest = of(0).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = of(0).map(|m| (m - largest).exp2()).collect();
        let sum: f64 = weights.iter().zip(of(1)).map(|(weight, l)| weight * l).sum();
        for c in 0..width {
            let column = parts[c..].iter().step_by(width).zip(&weights);
            let mixed: f64 = column.map(|(part, weight)| weight * f64::from(*part)).sum();
            y.push((mixed / sum) as f32);
        }
    }
    y
}

/// `x / √(mean(x²) + eps) · weight` for each row, as long as `weight`; see [`cpu::rms_norm`](super::rms_norm).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let squares: f64 = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let root = (squares / row.len() as f64 + f64::from(eps)).sqrt();
        let value = |(x, weight): (&f32, &f32)| (f64::from(*x) / root * f64::from(*weight)) as f32;
        y.extend(row.iter().zip(weight).map(value));
    }
    y
}

/// Each pair turned by its angle; see [`cpu::rope`](super::rope).
pub fn rope(
    pairing: Pairing,
    x: HeadView<'_>,
    heads: usize,
    (cos, sin): (&[f32], &[f32]),
    tokens: usize,
) -> Vec<f32> {
    let half = x.width / 2;
    let mut y = vec![0.0; tokens * heads * x.width];
    for (row, y) in y.chunks_exact_mut(x.width).enumerate() {
        let (t, h) = (row / heads, row % heads);
        for i in 0..half {
            let (a, b) = match pairing {
                Pairing::Interleaved => (2 * i, 2 * i + 1),
                Pairing::Halves => (i, i + half),
            };
            let [cos, sin] = [cos, sin].map(|table| f64::from(table[t * half + i]));
            let [xa, xb] = [a, b].map(|place| f64::from(x.get(t, h)[place]));
            y[a] = (xa * cos - xb * sin) as f32;
            y[b] = (xa * sin + xb * cos) as f32;
        }
    }
    y
}

/// For each row of `logits`: take the best expert of the best groups, strike it out, and so on; see
/// [`cpu::route`](super::route). Choices are made in f32, as the formula says, so that ties are the same.
pub fn route(logits: &[f32], bias: &[f32], routing: &Routing) -> (Vec<u32>, Vec<f32>) {
    let (experts, per_group) = (bias.len(), bias.len() / routing.n_group);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(experts) {
        let scores: Vec<f32> = logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect();
        let mut choice: Vec<Option<f32>> = scores.iter().zip(bias).map(|(s, b)| Some(s + b)).collect();

        let two_best = |group: &[Option<f32>]| {
            let mut group = group.to_vec();
            let first = take_best(&mut group).map_or(0.0, |(_, score)| score);
            Some(first + take_best(&mut group).map_or(0.0, |(_, score)| score))
        };
        let mut groups: Vec<Option<f32>> = choice.chunks_exact(per_group).map(two_best).collect();
        for _ in 0..routing.topk_group {
            take_best(&mut groups);
        }
        // What is left in `groups` was not among the best.
        for (group, lost) in choice.chunks_exact_mut(per_group).zip(&groups) {
            if lost.is_some() {
                group.fill(None);
            }
        }

        let chosen = (0..routing.top_k).filter_map(|_| take_best(&mut choice));
        let chosen: Vec<usize> = chosen.map(|(expert, _)| expert).collect();
        let sum: f64 = chosen.iter().map(|&e| f64::from(scores[e])).sum();
        let divisor = if routing.normalize { sum + 1e-20 } else { 1.0 };
        for expert in chosen {
            ids.push(expert as u32);
            let weight = f64::from(scores[expert]) / divisor * f64::from(routing.scaling_factor);
            weights.push(weight as f32);
        }
    }
    (ids, weights)
}

/// Takes the best of what is left out of `scores`: NaN before all, then the largest, then the first.
fn take_best(scores: &mut [Option<f32>]) -> Option<(usize, f32)> {
    let mut best: Option<(usize, f32)> = None;
    for (index, score) in scores.iter().enumerate() {
        let Some(score) = *score else { continue };
        if best.is_none_or(|(_, b)| !b.is_nan() && (score.is_nan() || score > b)) {
            best = Some((index, score));
        }
    }
    if let Some((index, _)) = best {
        scores[index] = None;
    }
    best
}
