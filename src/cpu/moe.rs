//! Mixture of experts, all slots of all tokens in two parallel passes.
//!
//! Tokens are grouped by expert, so that a call reads each expert in use once. Pass one computes
//! `silu(gate x) · up x` for every (expert, tile of rows), pass two `down` of it; both spread all experts'
//! tiles over the threads together, which matters in decoding, where each expert has one token. The slots
//! of a token are then added in their order, shared experts last: no result depends on the threads.

use super::{reference::swiglu, tile};
use crate::fp4::Weight;
use rayon::prelude::*;

/// One expert: `gate` and `up` are `[I, D]`, `down` is `[D, I]`.
#[derive(Debug, Clone)]
pub struct Expert {
    /// The gate projection, `[I, D]`.
    pub gate: Weight,
    /// The up projection, `[I, D]`.
    pub up: Weight,
    /// The down projection, `[D, I]`.
    pub down: Weight,
}

/// One expert's share of a call.
struct Group<'a> {
    expert: &'a Expert,
    /// Positions in the list of all slots, `token · slots + slot`, ascending.
    slots: Vec<usize>,
    /// The tokens' activations, `[slots, D]`.
    x: Vec<f32>,
}

/// `y[t] = Σ_slot w[t, slot] · down_e(silu(gate_e x[t]) · up_e x[t])`, `e = ids[t, slot]`, plus every
/// expert of `shared` with weight 1 (their width may differ).
///
/// `x` is `[T, D]`, `ids` and `weights` `[T, top_k]`, the result `[T, D]`.
///
/// # Panics
/// If lengths disagree or an id names no expert; the op checks both before.
pub fn fused_moe(
    experts: &[Expert],
    shared: &[Expert],
    x: &[f32],
    ids: &[u32],
    weights: &[f32],
    top_k: usize,
) -> Vec<f32> {
    let d = experts[0].gate.shape().1;
    let tokens = x.len() / d;
    let per_token = top_k + shared.len();
    assert!(
        x.len() == tokens * d && ids.len() == tokens * top_k && weights.len() == ids.len(),
        "fused_moe"
    );

    let mut slots: Vec<Vec<usize>> = vec![Vec::new(); experts.len() + shared.len()];
    for t in 0..tokens {
        for slot in 0..top_k {
            slots[ids[t * top_k + slot] as usize].push(t * per_token + slot);
        }
        for slot in 0..shared.len() {
            slots[experts.len() + slot].push(t * per_token + top_k + slot);
        }
    }
    let groups: Vec<Group<'_>> = experts
        .iter()
        .chain(shared)
        .zip(slots)
        .filter(|(_, slots)| !slots.is_empty())
        .map(|(expert, slots)| {
            let x = slots
                .iter()
                .flat_map(|slot| &x[slot / per_token * d..][..d])
                .copied()
                .collect();
            Group { expert, slots, x }
        })
        .collect();

    let hidden = pass(
        &groups,
        |g| g.expert.gate.shape().0,
        |_, g, rows, out, scratch| {
            let m = g.slots.len();
            tile::rows(&g.expert.gate, rows.clone(), &g.x, m, out, scratch);
            let mut up = vec![0.0; out.len()];
            tile::rows(&g.expert.up, rows, &g.x, m, &mut up, scratch);
            for (gate, up) in out.iter_mut().zip(up) {
                *gate = swiglu(*gate, up);
            }
        },
    );
    let hidden: Vec<Vec<f32>> = groups
        .iter()
        .zip(hidden)
        .map(|(g, h)| tile::transpose(h, g.expert.gate.shape().0, g.slots.len()))
        .collect();
    let hidden = &hidden;
    let down = pass(
        &groups,
        |g| g.expert.down.shape().0,
        |index, g, rows, out, scratch| {
            tile::rows(&g.expert.down, rows, &hidden[index], g.slots.len(), out, scratch);
        },
    );

    // Where each slot's result lies: its group's [D, slots] and its column there.
    let mut places = vec![(0, 0); tokens * per_token];
    for (index, group) in groups.iter().enumerate() {
        for (column, slot) in group.slots.iter().enumerate() {
            places[*slot] = (index, column);
        }
    }
    let mut y = vec![0.0; tokens * d];
    y.par_chunks_exact_mut(d).enumerate().for_each(|(t, y)| {
        for slot in 0..per_token {
            let weight = if slot < top_k {
                weights[t * top_k + slot]
            } else {
                1.0
            };
            let (index, column) = places[t * per_token + slot];
            let stride = groups[index].slots.len();
            for (y, value) in y.iter_mut().zip(down[index].iter().skip(column).step_by(stride)) {
                *y += weight * value;
            }
        }
    });
    y
}

/// Runs `work` on every tile of rows of every group, in parallel; a group's result is `[rows, slots]`. `work` takes
/// the group's index and the group, the tile's rows, its part of the result, and scratch memory.
fn pass<'a>(
    groups: &[Group<'a>],
    rows: impl Fn(&Group<'a>) -> usize,
    work: impl Fn(usize, &Group<'a>, std::ops::Range<usize>, &mut [f32], &mut Vec<f32>) + Sync,
) -> Vec<Vec<f32>> {
    let mut results: Vec<Vec<f32>> = groups
        .iter()
        .map(|g| vec![0.0; rows(g) * g.slots.len()])
        .collect();
    let mut tiles = Vec::new();
    for (index, (group, result)) in groups.iter().zip(&mut results).enumerate() {
        for (number, out) in result.chunks_mut(tile::ROWS * group.slots.len()).enumerate() {
            tiles.push((index, number * tile::ROWS, out));
        }
    }
    tiles
        .into_par_iter()
        .for_each_init(Vec::new, |scratch, (index, start, out)| {
            let group = &groups[index];
            work(
                index,
                group,
                start..start + out.len() / group.slots.len(),
                out,
                scratch,
            );
        });
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    fn expert(d: usize, i: usize, seed: u64) -> Expert {
        // Kinds differ from expert to expert and within one: a checkpoint may mix them.
        let kinds = weights(&[i], &[d]).len() as u64;
        let pick = |n: usize, k: usize, s: u64| {
            weights_seeded(&[n], &[k], seed * 3 + s).swap_remove(((seed + s) % kinds) as usize)
        };
        Expert {
            gate: pick(i, d, 0),
            up: pick(i, d, 1),
            down: pick(d, i, 2),
        }
    }

    fn check(tokens: usize, top_k: usize, shared: usize, ids: impl Fn(usize, usize) -> u32) {
        let (d, experts) = (128, (0..8).map(|e| expert(128, 128, e)).collect::<Vec<_>>());
        let shared: Vec<_> = (0..shared).map(|s| expert(d, 256, 20 + s as u64)).collect();
        let x = noise(tokens * d, 1);
        let ids: Vec<u32> = (0..tokens * top_k).map(|i| ids(i / top_k, i % top_k)).collect();
        let weights = noise(tokens * top_k, 2);
        let y = fused_moe(&experts, &shared, &x, &ids, &weights, top_k);
        let expected = reference::fused_moe(&experts, &shared, &x, &ids, &weights, top_k);
        assert_close(
            &y,
            &expected,
            &format!("{tokens} tokens, top {top_k}, {} shared", shared.len()),
        );
        assert_same_bits_for_any_threads(|| fused_moe(&experts, &shared, &x, &ids, &weights, top_k));
    }

    #[test]
    fn top_1_to_top_8_with_and_without_shared_experts() {
        for top_k in 1..=8 {
            check(5, top_k, top_k % 3, |t, slot| ((t * 3 + slot) % 8) as u32);
        }
    }

    #[test]
    fn one_two_three_and_all_tokens_on_an_expert() {
        // Expert 0 has one token, 1 two, 2 three, 3 to 6 none, 7 the rest.
        let by_size = |t: usize, _| [0, 1, 1, 2, 2, 2, 7, 7, 7, 7, 7, 7, 7, 7][t];
        check(14, 1, 1, by_size);
        for tokens in [1, 2, 3, 17, 65] {
            check(tokens, 1, 0, |_, _| 5);
            check(tokens, 2, 1, |t, slot| ((t + slot * 4) % 8) as u32);
        }
    }

    #[test]
    fn an_expert_may_fill_several_slots_of_a_token() {
        check(3, 4, 1, |_, slot| (slot / 2) as u32);
    }

    #[test]
    fn no_tokens_give_no_rows() {
        let experts = [expert(128, 128, 0)];
        assert!(fused_moe(&experts, &[], &[], &[], &[], 2).is_empty());
    }
}
