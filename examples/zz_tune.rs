use candle_mmfp4::cpu::{self, Arithmetic, Executor};
use candle_mmfp4::fp4::*;
use std::time::Instant;
#[repr(C)]
struct Ts {
    s: i64,
    n: i64,
}
unsafe extern "C" {
    fn clock_gettime(id: i32, t: *mut Ts) -> i32;
}
fn cpu_time() -> f64 {
    let mut t = Ts { s: 0, n: 0 };
    unsafe {
        clock_gettime(3, &mut t);
    }
    t.s as f64 + t.n as f64 * 1e-9
}
fn main() {
    let (n, k) = (std::env::var("N").map_or(8192, |s| s.parse().unwrap()), 2048);
    let copies = std::env::var("C").map_or(40, |s| s.parse().unwrap());
    let mut seed = 1u64;
    let mut w = vec![];
    let file = std::env::var("F").ok().map(|f| Bytes::map_file(f).unwrap());
    let group: usize = std::env::args().nth(1).map_or(128, |s| s.parse().unwrap());
    for _ in 0..copies {
        let codes = if let Some(f) = &file {
            let at = 4096 + w.len() * n * k / 2;
            f.slice(at..at + n * k / 2).unwrap()
        } else {
            Bytes::build(n * k / 2, |m| {
                for b in m.chunks_exact_mut(8) {
                    seed = seed
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    b.copy_from_slice(&(seed ^ (seed >> 29)).to_le_bytes());
                }
                Ok(())
            })
            .unwrap()
        };
        let scales: Vec<u8> = (0..n * k / group)
            .flat_map(|i| half::f16::from_f32(0.01 + (i % 7) as f32 * 0.001).to_le_bytes())
            .collect();
        w.push(Weight::from(
            Fp4Tensor::new(
                "w",
                Parts {
                    shape: (n, k),
                    group,
                    codes,
                    scales: Bytes::copy_from(&scales).unwrap(),
                    kind: ScaleKind::F16,
                    factor: Factor::None,
                },
            )
            .unwrap(),
        ));
    }
    let bytes = w[0].size_in_bytes();
    let ts: Vec<usize> = std::env::args()
        .nth(2)
        .map_or(vec![1, 2], |s| vec![s.parse().unwrap()]);
    for threads in ts {
        for isa in [cpu::Isa::Avx512] {
            let ex = Executor::new(isa, threads).unwrap();
            // bandwidth
            let mut best = vec![];
            for _ in 0..3 {
                best.push(
                    cpu::roofline::read_bandwidth(
                        &ex,
                        &w.iter()
                            .map(|w| match w {
                                Weight::Fp4(t) => &t.codes()[..],
                                _ => unreachable!(),
                            })
                            .collect::<Vec<_>>(),
                    ) / 1e9,
                );
            }
            let smaps = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
            println!(
                "{:?}",
                smaps
                    .lines()
                    .filter(|l| l.contains("Pmd") || l.starts_with("Rss") || l.starts_with("AnonHuge"))
                    .collect::<Vec<_>>()
            );
            println!(
                "{threads} threads {isa:?}: read GB/s {best:.1?}; dot peak GOP/s {:.0}",
                cpu::roofline::dot_peak(&ex) / 1e9
            );
            let ms: Vec<usize> =
                std::env::var("M").map_or(vec![1, 2, 4, 8, 16, 32, 128, 512], |s| vec![s.parse().unwrap()]);
            for m in ms {
                for arithmetic in [Arithmetic::W4A8, Arithmetic::Exact]
                    .into_iter()
                    .take(if std::env::var("M").is_ok() { 1 } else { 2 })
                {
                    if arithmetic == Arithmetic::Exact && (m > 32) {
                        continue;
                    }
                    let x: Vec<f32> = (0..m * k)
                        .map(|i| ((i * 7919 % 1000) as f32 / 500.0) - 1.0)
                        .collect();
                    let mut y = vec![0.0; m * n];
                    let reps = if m == 1 { 400 } else { (2000 / m).clamp(12, 300) };
                    let mut times = vec![];
                    for i in 0..reps {
                        let (t, c) = (Instant::now(), cpu_time());
                        cpu::linear(&ex, &[&w[(i * 7) % copies]], &x, arithmetic, &mut y);
                        times.push(if threads == 1 {
                            cpu_time() - c
                        } else {
                            t.elapsed().as_secs_f64()
                        });
                    }
                    times.sort_by(f64::total_cmp);
                    let t = times[times.len() / 20];
                    println!(
                        "  m {m} {arithmetic:?}: {:.3} ms  {:.1} GB/s  {:.0} GOP/s",
                        t * 1e3,
                        bytes as f64 / t / 1e9,
                        2.0 * (m * n * k) as f64 / t / 1e9
                    );
                }
            }
        }
    }
}
