//! What this machine can do at most: see [`roofline`](crate::cpu::roofline).

use super::Simd;

/// Loads all whole lines of 256 bytes, and does next to nothing with them: what reading costs.
#[inline(always)]
pub(super) unsafe fn read<S: Simd>(bytes: &[u8]) -> u8 {
    let step = 4 * S::LANES;
    // SAFETY: the instructions are the caller's promise; a line is a whole number of registers, and none is longer
    // than 64 bytes.
    unsafe {
        let mut all = [S::load_bytes([0; 64].as_ptr()); 4];
        for line in bytes.chunks_exact(256) {
            for start in (0..256).step_by(4 * step) {
                for (i, all) in all.iter_mut().enumerate() {
                    *all = S::xor(*all, S::load_bytes(line.as_ptr().add(start + i * step)));
                }
            }
        }
        let mut last = [0; 64];
        S::store_bytes(
            last.as_mut_ptr(),
            S::xor(S::xor(all[0], all[1]), S::xor(all[2], all[3])),
        );
        last.into_iter().fold(0, |all, byte| all ^ byte)
    }
}

/// `rounds` times twelve independent products, sums in registers; gives the operations in them.
#[inline(always)]
pub(super) unsafe fn dots<S: Simd>(rounds: u32) -> u64 {
    // SAFETY: the instructions are the caller's promise; no register is longer than 64 bytes.
    unsafe {
        let mut sums = [S::splat_int(1); 12];
        let (codes, x) = std::hint::black_box(([[3u8; 64]; 2], [[5u8; 64]; 12]));
        for round in 0..rounds {
            // Twelve different factors, and one that is new each round: where a product and its sum are two
            // instructions, no product may be taken once for all.
            let codes = S::load_bytes(codes[round as usize % 2].as_ptr());
            for i in 0..12 {
                sums[i] = S::widest(sums[i], codes, S::load_bytes(x[i].as_ptr()));
            }
        }
        std::hint::black_box(sums);
    }
    u64::from(rounds) * 12 * S::LANE_OPERATIONS * S::LANES as u64
}

/// `rounds` times twelve independent products in f32; gives the operations in them.
#[inline(always)]
pub(super) unsafe fn products<S: Simd>(rounds: u32) -> u64 {
    let (a, b) = std::hint::black_box(([[1f32; 16]; 2], [[1f32; 16]; 12]));
    // SAFETY: the instructions are the caller's promise; no register has more than sixteen lanes.
    unsafe {
        let mut sums = [S::splat(0.0); 12];
        for round in 0..rounds {
            let a = S::load(a[round as usize % 2].as_ptr());
            for i in 0..12 {
                sums[i] = S::fma(a, S::load(b[i].as_ptr()), sums[i]);
            }
        }
        std::hint::black_box(sums);
    }
    u64::from(rounds) * 12 * 2 * S::LANES as u64
}
