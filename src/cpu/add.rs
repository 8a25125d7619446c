//! Sums of activations.

use super::Executor;
use super::tile::SharedSlice;

/// From so many elements on, adding is work for all threads.
const TOGETHER: usize = 1 << 16;
/// Elements of a task.
const A_TASK: usize = 1 << 14;

/// `y[i] = a[i] + b[i]`.
///
/// # Panics
/// If lengths disagree.
pub fn add(executor: &Executor, a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len(), "add");
    let len = y.len();
    let y = SharedSlice::new(y);
    let task = |from: usize, to: usize| {
        // SAFETY: from `from` to `to`: no other task's.
        let y = unsafe { y.part(from..to) };
        for ((y, a), b) in y.iter_mut().zip(&a[from..to]).zip(&b[from..to]) {
            *y = a + b;
        }
    };
    match len < TOGETHER {
        true => task(0, len),
        false => executor.run(len.div_ceil(A_TASK), |index| {
            task(index * A_TASK, ((index + 1) * A_TASK).min(len));
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::*;

    #[test]
    fn adds_each_element_once() {
        for len in [0, 1, 2048, TOGETHER - 1, TOGETHER, TOGETHER + A_TASK / 2 + 3] {
            let (a, b) = (noise(len, 1), noise(len, 2));
            let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            for executor in executors() {
                let mut y = vec![f32::NAN; len];
                add(executor, &a, &b, &mut y);
                assert!(y == expected, "{len} elements");
            }
        }
    }
}
