//! Mixture of experts, all slots of all tokens in two parallel regions.
//!
//! Tokens are grouped by expert, so that a call reads each expert in use once. Region one computes
//! `silu(gate x) · up x` for every (expert, tile of rows), region two `down` of it; both spread all experts'
//! tiles over the threads together, which matters in decoding, where each expert has one token. The slots
//! of a token are then added in their order, shared experts last: no result depends on the threads.

use super::activations::{self, Block, Rounded};
use super::simd::{Selection, TILE, sized};
use super::tile::{self, Activations, SharedSlice};
use super::{Arithmetic, Executor};
use crate::fp4::Weight;
use std::cell::RefCell;
use std::ops::Range;

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

impl Expert {
    /// The three of them.
    pub fn weights(&self) -> [&Weight; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Bytes they take where they lie.
    pub fn size_in_bytes(&self) -> usize {
        self.weights().iter().map(|weight| weight.size_in_bytes()).sum()
    }

    /// I, its width.
    fn width(&self) -> usize {
        self.gate.shape().0
    }
}

/// One expert's share of a call.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    /// Its index among the routed experts and then the shared ones.
    expert: usize,
    /// Its slots, in the order of tokens: a range of [`Memory::tokens`].
    first: usize,
    count: usize,
    /// Where its rows begin in [`Memory::hidden`], and their blocks among the rounded ones.
    hidden: usize,
    blocks: usize,
    /// Tiles of the groups before, of gate and of down.
    tiles: [usize; 2],
}

impl Group {
    fn slots(&self) -> Range<usize> {
        self.first..self.first + self.count
    }
}

/// What a caller keeps from one call to the next.
#[derive(Debug, Default)]
struct Memory {
    groups: Vec<Group>,
    /// The token of each slot, by group.
    tokens: Vec<u32>,
    /// Where in `tokens` each slot went, by token and slot.
    places: Vec<usize>,
    /// Where each expert's next slot goes.
    next: Vec<usize>,
    /// `silu(gate x) · up x` of each slot, by group.
    hidden: Vec<f32>,
    /// `down` of that.
    down: Vec<f32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// From so many elements on, adding up slots is work for all threads.
const ADD_TOGETHER: usize = 1 << 14;

/// `y[t] = Σ_slot w[t, slot] · down_e(silu(gate_e x[t]) · up_e x[t])`, `e = ids[t, slot]`, plus every
/// expert of `shared` with weight 1 (their width may differ).
///
/// `x` is `[T, D]`, `ids` and `weights` `[T, top_k]`, `y` `[T, D]`. Without routed experts `top_k` is 0, and this is a
/// gated MLP.
///
/// # Panics
/// If lengths disagree or an id names no expert; the op checks both before.
#[expect(clippy::too_many_arguments, reason = "a mixture has as many parts")]
pub fn fused_moe(
    executor: &Executor,
    experts: &[Expert],
    shared: &[Expert],
    x: &[f32],
    ids: &[u32],
    weights: &[f32],
    top_k: usize,
    arithmetic: Arithmetic,
    y: &mut [f32],
) {
    let expert = |index: usize| match index.checked_sub(experts.len()) {
        None => &experts[index],
        Some(index) => &shared[index],
    };
    let d = expert(0).gate.shape().1;
    let tokens = x.len() / d;
    let per_token = top_k + shared.len();
    assert!(
        x.len() == tokens * d
            && y.len() == x.len()
            && ids.len() == tokens * top_k
            && weights.len() == ids.len(),
        "fused_moe"
    );
    if tokens == 0 {
        return;
    }
    // A nested call, of a task, has memory of its own.
    let mut memory = MEMORY.take();
    let (mut x_blocks, mut hidden_blocks) = (tile::take_blocks(0), tile::take_blocks(1));
    let slots = tokens * per_token;
    let (hidden_len, blocks_len) = memory.group(expert, experts.len(), shared.len(), ids, top_k, tokens);
    let Memory {
        groups,
        tokens: rows,
        places,
        hidden,
        down,
        ..
    } = &mut memory;
    let (groups, rows) = (&groups[..], &rows[..slots]);
    let rounds = |weight: fn(&Expert) -> &Weight| {
        groups
            .iter()
            .any(|group| tile::rounds(weight(expert(group.expert)), arithmetic))
    };

    let x = Activations {
        values: x,
        rounded: (rounds(|e| &e.gate) || rounds(|e| &e.up))
            .then(|| tile::round(executor, x, d, &mut x_blocks)),
    };
    let hidden = sized(hidden, hidden_len);
    let place = SharedSlice::new(hidden);
    let swiglu = executor.kernels().swiglu;
    each_tile(
        executor,
        groups,
        0,
        |g| expert(g.expert).width(),
        |group, index| {
            let expert = expert(group.expert);
            let (width, tile) = (expert.width(), tile::range(expert.width(), index));
            let selection = Selection::Rows(&rows[group.slots()]);
            tile::with_scratch(|scratch| {
                let mut up = std::mem::take(&mut scratch.other_tile);
                let up_tile = sized(&mut up, group.count * TILE);
                tile::rows(executor, &expert.up, tile.clone(), x, selection, up_tile, scratch);
                tile::placed(
                    executor,
                    &expert.gate,
                    tile.clone(),
                    x,
                    selection,
                    scratch,
                    |i, gate| {
                        let start = group.hidden + i * width + tile.start;
                        // SAFETY: this group's row i, this tile's columns: no other task's.
                        let place = unsafe { place.part(start..start + gate.len()) };
                        place.copy_from_slice(gate);
                        // SAFETY: the executor has checked the instructions.
                        unsafe { swiglu(place, &up_tile[i * TILE..][..gate.len()]) };
                    },
                );
                scratch.other_tile = up;
            });
        },
    );

    let hidden = &hidden[..];
    let rounded = rounds(|e| &e.down);
    if rounded {
        if hidden_blocks.len() < blocks_len {
            hidden_blocks.resize(blocks_len, Block::ZERO);
        }
        let place = SharedSlice::new(&mut hidden_blocks[..]);
        let round = executor.kernels().round;
        let row = |slot: usize| {
            let group = &groups[groups.partition_point(|group| group.first <= slot) - 1];
            let (row, width) = (slot - group.first, expert(group.expert).width());
            let x = &hidden[group.hidden + row * width..][..width];
            // SAFETY: the executor has checked the instructions; the group's blocks begin there, and no other row writes
            // this one's.
            unsafe { round(x, row, group.count, place.as_ptr().add(group.blocks)) };
        };
        match hidden.len() < tile::ROUND_TOGETHER {
            true => (0..slots).for_each(row),
            false => executor.run(slots, row),
        }
    }
    let down = sized(down, slots * d);
    let place = SharedSlice::new(down);
    each_tile(
        executor,
        groups,
        1,
        |_| d,
        |group, index| {
            let expert = expert(group.expert);
            let (width, tile) = (expert.width(), tile::range(d, index));
            let x = Activations {
                values: &hidden[group.hidden..][..group.count * width],
                rounded: rounded.then(|| Rounded {
                    blocks: &hidden_blocks[group.blocks..][..group.count * activations::blocks(width)],
                    rows: group.count,
                }),
            };
            let all = Selection::Every {
                first: 0,
                step: 1,
                count: group.count,
            };
            tile::with_scratch(|scratch| {
                tile::placed(
                    executor,
                    &expert.down,
                    tile.clone(),
                    x,
                    all,
                    scratch,
                    |i, values| {
                        let start = (group.first + i) * d + tile.start;
                        // SAFETY: this slot's row, this tile's columns: no other task's.
                        let place = unsafe { place.part(start..start + values.len()) };
                        place.copy_from_slice(values);
                    },
                );
            });
        },
    );

    let (down, places) = (&down[..], &places[..slots]);
    let place = SharedSlice::new(y);
    let add = |t: usize| {
        // SAFETY: token t's row: no other task's.
        let y = unsafe { place.part(t * d..(t + 1) * d) };
        y.fill(0.0);
        for slot in 0..per_token {
            let weight = match slot < top_k {
                true => weights[t * top_k + slot],
                false => 1.0,
            };
            let values = &down[places[t * per_token + slot] * d..][..d];
            for (y, value) in y.iter_mut().zip(values) {
                *y += weight * value;
            }
        }
    };
    match slots * d < ADD_TOGETHER {
        true => (0..tokens).for_each(add),
        false => executor.run(tokens, add),
    }
    tile::give_blocks(0, x_blocks);
    tile::give_blocks(1, hidden_blocks);
    MEMORY.set(memory);
}

impl Memory {
    /// Groups all slots by expert; gives the elements of `hidden`, and the blocks they round to.
    fn group<'a>(
        &mut self,
        expert: impl Fn(usize) -> &'a Expert,
        routed: usize,
        shared: usize,
        ids: &[u32],
        top_k: usize,
        tokens: usize,
    ) -> (usize, usize) {
        let per_token = top_k + shared;
        let expert_of = |t: usize, slot: usize| match slot < top_k {
            true => ids[t * top_k + slot] as usize,
            false => routed + slot - top_k,
        };
        let next = sized(&mut self.next, routed + shared);
        next.fill(0);
        for t in 0..tokens {
            for slot in 0..per_token {
                next[expert_of(t, slot)] += 1;
            }
        }
        self.groups.clear();
        let mut after = Group::default();
        for (index, next) in next.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
            let count = std::mem::replace(next, after.first);
            let (width, d) = expert(index).gate.shape();
            self.groups.push(Group {
                expert: index,
                count,
                ..after
            });
            after.first += count;
            after.hidden += count * width;
            after.blocks += count * activations::blocks(width);
            after.tiles[0] += tile::count(width);
            after.tiles[1] += tile::count(d);
        }
        let rows = sized(&mut self.tokens, tokens * per_token);
        let places = sized(&mut self.places, tokens * per_token);
        for t in 0..tokens {
            for slot in 0..per_token {
                let next = &mut next[expert_of(t, slot)];
                rows[*next] = t as u32;
                places[t * per_token + slot] = *next;
                *next += 1;
            }
        }
        (after.hidden, after.blocks)
    }
}

/// Runs `work` for every tile of every group's gate (`pass` 0) or down (1), with the tile's number.
fn each_tile(
    executor: &Executor,
    groups: &[Group],
    pass: usize,
    rows: impl Fn(&Group) -> usize,
    work: impl Fn(&Group, usize) + Sync,
) {
    let Some(last) = groups.last() else { return };
    let tiles = last.tiles[pass] + tile::count(rows(last));
    executor.run(tiles, |index| {
        let group = &groups[groups.partition_point(|group| group.tiles[pass] <= index) - 1];
        work(group, index - group.tiles[pass]);
    });
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
        for arithmetic in ARITHMETICS {
            let run = |executor: &Executor| {
                let mut y = vec![f32::NAN; x.len()];
                fused_moe(
                    executor, &experts, &shared, &x, &ids, &weights, top_k, arithmetic, &mut y,
                );
                y
            };
            let expected = reference::fused_moe(&experts, &shared, &x, &ids, &weights, top_k, arithmetic);
            for executor in executors() {
                let what = format!(
                    "{tokens} tokens, top {top_k}, {} shared, {arithmetic:?}",
                    shared.len()
                );
                // An activation between two steps may go either way after another order of summation.
                let bound = if arithmetic == Arithmetic::Exact {
                    1e-9
                } else {
                    1e-6
                };
                assert_within(&run(executor), &expected, bound, &what);
            }
            assert_same_bits_for_any_threads(run);
        }
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
    fn a_token_gives_the_same_bits_alone_and_among_many() {
        let (d, top_k, tokens) = (128, 2, 33);
        let experts: Vec<_> = (0..8).map(|e| expert(d, 128, e)).collect();
        let shared = [expert(d, 256, 20)];
        let (x, weights) = (noise(tokens * d, 1), noise(tokens * top_k, 2));
        // Most tokens go to the first expert, so that it has many rows.
        let ids: Vec<u32> = (0..tokens * top_k)
            .map(|i| if i % 2 == 0 { 0 } else { 1 + i as u32 % 7 })
            .collect();
        for arithmetic in ARITHMETICS {
            for executor in executors().iter().map(|executor| executor.uniform()) {
                let run = |tokens: std::ops::Range<usize>| {
                    let mut y = vec![f32::NAN; tokens.len() * d];
                    let slots = tokens.start * top_k..tokens.end * top_k;
                    fused_moe(
                        &executor,
                        &experts,
                        &shared,
                        &x[tokens.start * d..tokens.end * d],
                        &ids[slots.clone()],
                        &weights[slots],
                        top_k,
                        arithmetic,
                        &mut y,
                    );
                    y
                };
                let whole = run(0..tokens);
                for ranges in cuts(tokens) {
                    let what = format!("{arithmetic:?}, {:?}: {:?}", executor.isa(), ranges[0]);
                    let cut: Vec<_> = ranges.into_iter().flat_map(run).collect();
                    assert_same_bits(&cut, &whole, &what);
                }
            }
        }
    }

    #[test]
    fn no_tokens_give_no_rows() {
        let experts = [expert(128, 128, 0)];
        for executor in executors() {
            fused_moe(
                executor,
                &experts,
                &[],
                &[],
                &[],
                &[],
                2,
                Arithmetic::W4A8,
                &mut [],
            );
        }
    }
}
