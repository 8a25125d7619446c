//! Which experts a token goes to, and with what weight (DeepSeek-V3's auxiliary-loss-free routing, as
//! transformers' `Glm4MoeLiteTopkRouter` and `route_tokens_to_experts` compute it).

use std::cell::RefCell;

/// The router's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Experts a token.
    pub top_k: usize,
    /// Groups the experts are divided into.
    pub n_group: usize,
    /// Groups whose experts may be chosen.
    pub topk_group: usize,
    /// Whether the chosen weights are divided by their sum.
    pub normalize: bool,
    /// What the weights are multiplied by.
    pub scaling_factor: f32,
}

/// What a thread keeps from one call to the next.
#[derive(Default)]
struct Memory {
    scores: Vec<f32>,
    choice: Vec<f32>,
    groups: Vec<f32>,
    order: Vec<usize>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Chooses experts for each row of `logits` `[T, E]`; `ids` and `weights` are `[T, top_k]`, best first.
///
/// The correction `bias` `[E]` takes part in the choice only: weights are the plain sigmoid scores. A group's
/// score is the sum of its two best corrected scores; the other groups are out of the race whatever their
/// scores. Ties go to the lower index. A row with NaN chooses some experts, with NaN weights, so that it
/// stays visible.
///
/// # Panics
/// If the shapes disagree, or there are fewer experts in the allowed groups than slots.
pub fn route(logits: &[f32], bias: &[f32], routing: &Routing, ids: &mut [u32], weights: &mut [f32]) {
    let (experts, per_group) = (bias.len(), bias.len() / routing.n_group);
    assert!(
        experts > 0 && logits.len().is_multiple_of(experts),
        "route: logits"
    );
    assert!(routing.top_k <= routing.topk_group * per_group, "route: top_k");
    let slots = logits.len() / experts * routing.top_k;
    assert!(ids.len() == slots && weights.len() == slots, "route: slots");
    MEMORY.with_borrow_mut(|memory| {
        let Memory {
            scores,
            choice,
            groups,
            order,
        } = memory;
        let rows = ids
            .chunks_exact_mut(routing.top_k)
            .zip(weights.chunks_exact_mut(routing.top_k));
        for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(rows) {
            scores.clear();
            scores.extend(logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())));
            choice.clear();
            choice.extend(scores.iter().zip(bias).map(|(score, bias)| score + bias));
            if routing.topk_group < routing.n_group {
                groups.clear();
                for scores in choice.chunks_exact(per_group) {
                    let two = best(scores, 2, order);
                    groups.push(two.iter().map(|&i| scores[i]).sum());
                }
                let allowed = best(groups, routing.topk_group, order);
                for (group, scores) in choice.chunks_exact_mut(per_group).enumerate() {
                    if !allowed.contains(&group) {
                        scores.fill(f32::NEG_INFINITY);
                    }
                }
            }
            let chosen = best(choice, routing.top_k, order);
            let sum: f32 = chosen.iter().map(|&e| scores[e]).sum();
            let divisor = if routing.normalize { sum + 1e-20 } else { 1.0 };
            for (&expert, (id, weight)) in chosen.iter().zip(ids.iter_mut().zip(weights)) {
                *id = expert as u32;
                *weight = scores[expert] / divisor * routing.scaling_factor;
            }
        }
    });
}

/// The indices of the `count` largest values, best first, ties by index, NaN before all; kept in `order`.
fn best<'a>(values: &[f32], count: usize, order: &'a mut Vec<usize>) -> &'a [usize] {
    order.clear();
    order.extend(0..values.len());
    let by_rank = |&a: &usize, &b: &usize| {
        let nan = values[b].is_nan().cmp(&values[a].is_nan());
        nan.then(
            values[b]
                .partial_cmp(&values[a])
                .unwrap_or(std::cmp::Ordering::Equal),
        )
        .then(a.cmp(&b))
    };
    if count < order.len() {
        order.select_nth_unstable_by(count, by_rank);
        order.truncate(count);
    }
    order.sort_unstable_by(by_rank);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Routing = Routing {
        top_k: 2,
        n_group: 1,
        topk_group: 1,
        normalize: true,
        scaling_factor: 1.8,
    };

    fn routed(logits: &[f32], bias: &[f32], routing: &Routing) -> (Vec<u32>, Vec<f32>) {
        let slots = logits.len() / bias.len() * routing.top_k;
        let (mut ids, mut weights) = (vec![u32::MAX; slots], vec![f32::NAN; slots]);
        route(logits, bias, routing, &mut ids, &mut weights);
        (ids, weights)
    }

    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn weights_are_sigmoid_not_softmax_normalised_then_scaled() {
        let (ids, weights) = routed(&[0.0, 2.0, -1.0, 1.0], &[0.0; 4], &PLAIN);
        assert_eq!(ids, [1, 3]);
        let sum = sigmoid(2.0) + sigmoid(1.0);
        assert_eq!(weights, [sigmoid(2.0) / sum * 1.8, sigmoid(1.0) / sum * 1.8]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let (ids, weights) = routed(&[0.0, 2.0, -1.0, 1.0], &[0.0, 0.0, 5.0, 0.0], &PLAIN);
        assert_eq!(ids, [2, 1]);
        let sum = sigmoid(-1.0) + sigmoid(2.0);
        assert_eq!(weights, [sigmoid(-1.0) / sum * 1.8, sigmoid(2.0) / sum * 1.8]);
    }

    #[test]
    fn groups_limit_the_choice_even_below_zero() {
        // Group 1 wins by the sum of its two best although the single best expert is in group 0; with all
        // corrected scores negative, a mask of zeros (as early code had) would choose group 0's again.
        let routing = Routing {
            n_group: 2,
            topk_group: 1,
            normalize: false,
            scaling_factor: 1.0,
            ..PLAIN
        };
        let logits = [3.0, -9.0, -9.0, 1.0, 1.5, -9.0];
        let (ids, weights) = routed(&logits, &[-2.0; 6], &routing);
        assert_eq!(ids, [4, 3]);
        assert_eq!(weights, [sigmoid(1.5), sigmoid(1.0)]);
    }

    #[test]
    fn ties_go_to_the_lower_index_and_nan_stays_visible() {
        let (ids, _) = routed(&[1.0; 5], &[0.0; 5], &Routing { top_k: 3, ..PLAIN });
        assert_eq!(ids, [0, 1, 2]);
        let (ids, weights) = routed(&[1.0, f32::NAN, 3.0], &[0.0; 3], &PLAIN);
        assert_eq!(ids, [1, 2]);
        assert!(weights.iter().all(|w| w.is_nan()));
    }

    #[test]
    fn it_agrees_with_the_plain_reference() {
        use crate::cpu::{reference, testing::noise};
        for (experts, n_group, topk_group, top_k) in
            [(1, 1, 1, 1), (8, 1, 1, 8), (64, 1, 1, 4), (64, 8, 3, 6)]
        {
            for normalize in [true, false] {
                let routing = Routing {
                    top_k,
                    n_group,
                    topk_group,
                    normalize,
                    scaling_factor: 1.8,
                };
                // Coarse steps make ties; the last row has a NaN.
                let mut logits: Vec<f32> = noise(33 * experts, 1)
                    .iter()
                    .map(|x| (x * 8.0).round() / 4.0)
                    .collect();
                logits[32 * experts] = f32::NAN;
                let bias: Vec<f32> = noise(experts, 2)
                    .iter()
                    .map(|x| (x * 4.0).round() / 8.0)
                    .collect();
                let (ids, weights) = routed(&logits, &bias, &routing);
                let (expected_ids, expected) = reference::route(&logits, &bias, &routing);
                assert_eq!(ids, expected_ids, "{routing:?}");
                for (weight, expected) in weights.iter().zip(&expected) {
                    let close = (weight - expected).abs() <= 1e-6 * expected;
                    assert!(
                        close || weight.is_nan() && expected.is_nan(),
                        "{weight} for {expected}"
                    );
                }
            }
        }
    }
}
