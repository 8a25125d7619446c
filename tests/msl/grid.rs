//! Cases of a grid.

use std::collections::BTreeSet;

/// Places along axes of these sizes in which every two values of two axes meet: greedily, of 64 random candidates the one
/// with most new pairs.
pub fn pairwise<const N: usize>(axes: [usize; N]) -> Vec<[usize; N]> {
    let mut random = 1u64;
    let mut below = |size: usize| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) as usize % size
    };
    let pairs = |at: &[usize; N]| {
        let mut met = Vec::new();
        for a in 0..N {
            for b in a + 1..N {
                met.push((a, at[a], b, at[b]));
            }
        }
        met
    };
    let mut missing = BTreeSet::new();
    for (a, size) in axes.into_iter().enumerate() {
        for (b, other) in axes.into_iter().enumerate().skip(a + 1) {
            missing.extend((0..size).flat_map(|i| (0..other).map(move |j| (a, i, b, j))));
        }
    }
    let mut places = Vec::new();
    while let Some(&(a, i, b, j)) = missing.first() {
        let best = (0..64)
            .map(|_| {
                let mut at = axes.map(&mut below);
                (at[a], at[b]) = (i, j);
                at
            })
            .max_by_key(|at| pairs(at).iter().filter(|pair| missing.contains(pair)).count())
            .unwrap();
        for pair in pairs(&best) {
            missing.remove(&pair);
        }
        places.push(best);
    }
    places
}

/// Every place.
pub fn every<const N: usize>(axes: [usize; N]) -> Vec<[usize; N]> {
    let place = |index: usize| {
        let mut rest = index;
        axes.map(|size| {
            let at = rest % size;
            rest /= size;
            at
        })
    };
    (0..axes.iter().product()).map(place).collect()
}

/// [`every`] place where everything is to run, else [`pairwise`] ones.
pub fn chosen<const N: usize>(axes: [usize; N]) -> Vec<[usize; N]> {
    match crate::full() {
        true => every(axes),
        false => pairwise(axes),
    }
}
