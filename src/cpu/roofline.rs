//! What this machine can do at most, by the same threads and instructions as the kernels: reading memory,
//! multiplying bytes, and multiplying floats.

use super::Executor;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Bytes that a thread claims at a time.
const PIECE: usize = 1 << 18;

/// Reads `regions` once with all threads in plain loads of whole registers; gives bytes a second.
///
/// To measure memory rather than caches, take regions several times as large as the last cache.
pub fn read_bandwidth(executor: &Executor, regions: &[&[u8]]) -> f64 {
    let pieces: Vec<&[u8]> = regions.iter().flat_map(|region| region.chunks(PIECE)).collect();
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    let (read, seen) = (executor.kernels().read, AtomicU64::new(0));
    let start = Instant::now();
    executor.run(pieces.len(), |index| {
        // SAFETY: the executor has checked the instructions.
        let value = unsafe { read(pieces[index]) };
        seen.fetch_xor(value.into(), Ordering::Relaxed);
    });
    std::hint::black_box(seen.into_inner());
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// Multiplies and adds bytes in registers with all threads for some ten milliseconds; gives operations (a product and
/// a sum are two) a second.
pub fn dot_peak(executor: &Executor) -> f64 {
    peak(executor, executor.kernels().dots)
}

/// Likewise the products that attention over a paged cache is made of: of BF16 where there are instructions for them
/// ([`Isa::Avx512Bf16`](super::Isa::Avx512Bf16)), else of f32.
pub fn float_peak(executor: &Executor) -> f64 {
    peak(executor, executor.kernels().paged.products)
}

fn peak(executor: &Executor, products: unsafe fn(u32) -> u64) -> f64 {
    const ROUNDS: u32 = 1 << 22;
    let operations = AtomicU64::new(0);
    let start = Instant::now();
    executor.run(executor.threads(), |_| {
        // SAFETY: the executor has checked the instructions.
        let done = unsafe { products(ROUNDS) };
        operations.fetch_add(done, Ordering::Relaxed);
    });
    operations.into_inner() as f64 / start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::executors;

    #[test]
    fn all_measure_something() {
        let bytes = vec![7; 3 * PIECE + 5];
        for executor in executors() {
            assert!(read_bandwidth(executor, &[&bytes, &[]]) > 1e6);
            assert!(dot_peak(executor) > 1e6);
            assert!(float_peak(executor) > 1e6);
        }
    }
}
