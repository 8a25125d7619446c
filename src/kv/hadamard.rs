//! A fixed rotation of vectors, block by block: it spreads what one channel has over its block, so that the channel's
//! scale does not drown its neighbours.
//!
//! Each block of `b` elements, a power of two, is multiplied by the Hadamard matrix of that order over √b, with
//! elements' signs turned first by a fixed pattern: without signs a block of equal elements, which real rows have in
//! their means, would end up in one. The matrix is orthogonal: dot products of two rotated vectors are those of the
//! vectors, and [`unrotate`] is its transpose.

use crate::{Error, Result};

/// The widest block that a vector is rotated in. Wider ones carry an outlier's error to more channels:
/// docs/kv-cache.md has their errors.
const WIDEST: usize = 64;

/// The block that a vector of this width is rotated in: the largest power of two that divides it, up to 64.
///
/// ```
/// use candle_mmfp4::kv::hadamard::block;
///
/// assert_eq!((block(512), block(96)), (64, 32));
/// ```
pub const fn block(width: usize) -> usize {
    match width {
        0 => 1,
        _ => {
            let largest = 1 << width.trailing_zeros();
            if largest < WIDEST { largest } else { WIDEST }
        }
    }
}

/// Rotates a vector in place.
///
/// # Errors
/// [`Error::Argument`] where `block` is no power of two that divides the vector's length.
///
/// ```
/// use candle_mmfp4::kv::hadamard::{rotate, unrotate};
///
/// let mut x = [8f32, 0., 0., 0.];
/// rotate(&mut x, 4)?;
/// assert_eq!(x.map(f32::abs), [4.; 4]);
/// unrotate(&mut x, 4)?;
/// assert_eq!(x, [8., 0., 0., 0.]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
pub fn rotate(vector: &mut [f32], block: usize) -> Result<()> {
    check(vector, block)?;
    rotate_blocks(vector, block);
    Ok(())
}

/// Takes [`rotate`] back.
///
/// # Errors
/// As [`rotate`].
pub fn unrotate(vector: &mut [f32], block: usize) -> Result<()> {
    check(vector, block)?;
    unrotate_blocks(vector, block);
    Ok(())
}

/// Rotates a vector in blocks of the size that [`block`] gives, which divides it.
pub(crate) fn rotate_whole(vector: &mut [f32]) {
    rotate_blocks(vector, block(vector.len()));
}

/// Takes [`rotate_whole`] back.
pub(crate) fn unrotate_whole(vector: &mut [f32]) {
    unrotate_blocks(vector, block(vector.len()));
}

fn rotate_blocks(vector: &mut [f32], block: usize) {
    for part in vector.chunks_exact_mut(block) {
        turn_signs(part);
        transform(part);
    }
}

fn unrotate_blocks(vector: &mut [f32], block: usize) {
    for part in vector.chunks_exact_mut(block) {
        transform(part);
        turn_signs(part);
    }
}

fn check(vector: &[f32], block: usize) -> Result<()> {
    if block.is_power_of_two() && vector.len().is_multiple_of(block) {
        return Ok(());
    }
    let expected = format!("a power of two that divides {}", vector.len());
    Err(Error::argument("hadamard", "block", expected, block.to_string()))
}

/// Whether element `i` of a block changes its sign: the top bit of a multiplicative hash, an even mixture.
///
/// Kernels compute the same.
pub const fn turns(i: usize) -> bool {
    (i as u32).wrapping_mul(0x9e37_79b1) >> 31 == 1
}

fn turn_signs(part: &mut [f32]) {
    for (i, x) in part.iter_mut().enumerate() {
        if turns(i) {
            *x = -*x;
        }
    }
}

/// The orthonormal Walsh-Hadamard transform, its own inverse: sums and differences at distances 1, 2, 4, … in this
/// order, then the factor.
fn transform(part: &mut [f32]) {
    let mut distance = 1;
    while distance < part.len() {
        for pair in part.chunks_exact_mut(2 * distance) {
            let (low, high) = pair.split_at_mut(distance);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        distance *= 2;
    }
    let factor = 1.0 / (part.len() as f32).sqrt();
    part.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| (random.uniform() * 2.0 - 1.0) as f32).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn kv_rotations_are_the_matrix_by_definition() {
        for block in [1, 2, 8, 64] {
            let x = noise(2 * block, 1);
            let mut y = x.clone();
            rotate(&mut y, block).unwrap();
            for (i, y) in y.iter().enumerate() {
                let part = i / block * block;
                let expected: f64 = (0..block)
                    .map(|j| {
                        let signs = ((i - part) & j).count_ones() + u32::from(turns(j));
                        let sign = if signs % 2 == 0 { 1.0 } else { -1.0 };
                        sign * f64::from(x[part + j]) / (block as f64).sqrt()
                    })
                    .sum();
                assert!(
                    (f64::from(*y) - expected).abs() < 1e-6,
                    "{block}: {y} for {expected}"
                );
            }
        }
    }

    #[test]
    fn kv_rotations_keep_dot_products_and_come_back() {
        for (width, block) in [(512, 512), (512, 64), (128, 128), (96, 32), (6, 2), (5, 1)] {
            let (a, b) = (noise(width, 2), noise(width, 3));
            let (mut turned_a, mut turned_b) = (a.clone(), b.clone());
            rotate(&mut turned_a, block).unwrap();
            rotate(&mut turned_b, block).unwrap();
            assert!((dot(&turned_a, &turned_b) - dot(&a, &b)).abs() < 1e-5);
            assert!(block == 1 || turned_a != a);
            unrotate(&mut turned_a, block).unwrap();
            assert!(a.iter().zip(&turned_a).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }

    #[test]
    fn kv_rotation_spreads_outliers_and_means() {
        let mut outlier = vec![0f32; 512];
        outlier[37] = 100.0;
        rotate(&mut outlier, 512).unwrap();
        assert!(outlier.iter().all(|x| x.abs() < 4.5));
        let mut mean = vec![1f32; 512];
        rotate(&mut mean, 512).unwrap();
        let largest = mean.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(largest < 12.0, "{largest}, without signs 22.6");
    }

    #[test]
    fn kv_rotation_refuses_blocks_that_do_not_fit() {
        for (len, block) in [(8, 0), (8, 3), (12, 8), (8, 16)] {
            let error = rotate(&mut vec![0.0; len], block).unwrap_err().to_string();
            assert!(error.contains(&block.to_string()) && unrotate(&mut vec![0.0; len], block).is_err());
        }
    }
}
