//! Rotary position embedding.

use super::Executor;
use super::attention::HeadView;
use super::tile::SharedSlice;

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Neighbours, `(2i, 2i + 1)`: `rope_interleave` true, GLM and DeepSeek.
    Interleaved,
    /// Halves, `(i, i + d/2)`: `rope_interleave` false, NeoX and Llama.
    Halves,
}

/// From so many elements on, rotating is work for all threads.
const TOGETHER: usize = 1 << 15;
/// Tokens of a task.
const TOKENS: usize = 16;

/// Rotates pair `i` of every head of token `t` by the angle whose cosine is `cos[t, i]`, both tables being
/// `[tokens, d/2]`; `y` is `[tokens, heads, d]`, and `x` as many rows of as many heads, `d` wide.
///
/// # Panics
/// If `d` is odd or 0, or lengths disagree.
pub fn rope(
    executor: &Executor,
    pairing: Pairing,
    x: HeadView<'_>,
    heads: usize,
    (cos, sin): (&[f32], &[f32]),
    y: &mut [f32],
) {
    let d = x.width;
    assert!(d > 0 && d.is_multiple_of(2) && heads > 0, "rope: heads");
    let tokens = y.len() / (heads * d);
    assert!(y.len() == tokens * heads * d, "rope: y");
    assert!(
        cos.len() == tokens * d / 2 && sin.len() == cos.len(),
        "rope: angles"
    );
    let len = y.len();
    let y = SharedSlice::new(y);
    let token = |t: usize| {
        // SAFETY: token t's row: no other task's.
        let y = unsafe { y.part(t * heads * d..(t + 1) * heads * d) };
        let angles = t * d / 2..(t + 1) * d / 2;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        for (h, y) in y.chunks_exact_mut(d).enumerate() {
            rotate(pairing, x.get(t, h), cos, sin, y);
        }
    };
    match len < TOGETHER {
        true => (0..tokens).for_each(token),
        false => executor.run(tokens.div_ceil(TOKENS), |task| {
            (task * TOKENS..((task + 1) * TOKENS).min(tokens)).for_each(token);
        }),
    }
}

/// A head of a token: the same bits wherever it is computed.
pub(super) fn rotate(pairing: Pairing, x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let angles = cos.iter().zip(sin);
    match pairing {
        Pairing::Interleaved => {
            let pairs = x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut::<2>().0);
            for (([a, b], y), (cos, sin)) in pairs.zip(angles) {
                *y = [a * cos - b * sin, a * sin + b * cos];
            }
        }
        Pairing::Halves => {
            let half = x.len() / 2;
            let (x, y) = (x.split_at(half), y.split_at_mut(half));
            let pairs = x.0.iter().zip(x.1).zip(y.0.iter_mut().zip(y.1));
            for (((a, b), (to_a, to_b)), (cos, sin)) in pairs.zip(angles) {
                (*to_a, *to_b) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    #[test]
    fn agrees_with_the_reference() {
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            for (heads, d) in [(1, 2), (1, 64), (3, 6), (20, 64)] {
                for tokens in ROWS {
                    let (row, head) = (heads * (d + 5), d + 5);
                    let angles: Vec<f32> = noise(tokens * d / 2, 7).iter().map(|v| v * 1e3).collect();
                    let cos: Vec<f32> = angles.iter().map(|v| v.cos()).collect();
                    let sin: Vec<f32> = angles.iter().map(|v| v.sin()).collect();
                    let data = noise(tokens * row, 1);
                    let x = HeadView {
                        data: &data[5..],
                        row,
                        head,
                        width: d,
                    };
                    let expected = reference::rope(pairing, x, heads, (&cos, &sin), tokens);
                    let run = |executor: &Executor| {
                        let mut y = vec![f32::NAN; tokens * heads * d];
                        rope(executor, pairing, x, heads, (&cos, &sin), &mut y);
                        y
                    };
                    for executor in executors() {
                        let what = format!("{pairing:?}, {tokens} tokens, {heads} heads of {d}");
                        assert_close(&run(executor), &expected, &what);
                    }
                    if tokens == 65 {
                        assert_same_bits_for_any_threads(run);
                    }
                }
            }
        }
    }
}
