//! How fast the CPU kernels are, beside what the machine can do at most and beside Candle's `QMatMul`.
//!
//! ```sh
//! cargo bench --features bench --bench kernels                    # all, some minutes
//! cargo bench --features bench --bench kernels -- vector          # what has this in its name
//! cargo bench --features bench --bench kernels -- --quick vector  # seconds, to see that it works
//! ```
//!
//! Quote no numbers of a `--quick` run, nor of one whose limit the table calls noisy.
//!
//! Each case goes twice: through criterion, which keeps its history under `target/criterion`, and then, all contenders
//! and the machine's limits in turn, into the table on stderr at the end. Only the table's ratios are fit to be quoted:
//! criterion measures one contender after the other, minutes apart. In criterion's output an element is an operation, a
//! product and its sum being two.
//!
//! `MMFP4_CPU` and `MMFP4_THREADS` choose the kernels' instructions and threads, `CANDLE_NUM_THREADS` or
//! `RAYON_NUM_THREADS` Candle's threads.

mod case;
mod inputs;
mod matrix;
mod paged;
mod parts;
mod rounds;
mod table;

use candle_mmfp4::cpu::Executor;
use case::{Bound, Case};
use criterion::{Criterion, Throughput};
use rounds::Effort;
use std::sync::Arc;
use std::time::Duration;

/// Cases that share weights.
type Group = fn(&Arc<Executor>) -> Vec<Case>;

/// All cases; a group's weights are let go before the next one's are made.
const GROUPS: [Group; 10] = [
    |executor| matrix::cases(executor, 2048, 8192, &[1, 16, 128, 512]),
    |executor| matrix::cases(executor, 5120, 2048, &[1]),
    |executor| matrix::cases(executor, 1536, 2048, &[1]),
    |executor| vec![parts::absorb_query(executor)],
    |executor| vec![parts::mixture(executor, 1)],
    |executor| vec![parts::mixture(executor, 512)],
    |executor| vec![matrix::head(executor, 2048, 16384)],
    |executor| vec![parts::prefill(executor, 512), parts::decode(executor, 600)],
    |executor| vec![paged::latents(executor, 4096)],
    |executor| vec![paged::grouped(executor, 8192)],
];

fn main() -> anyhow::Result<()> {
    let executor = Executor::current()?;
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let effort = effort();
    if effort.is_some() {
        table::print_setup(&executor);
    }
    let mut outcomes = Vec::new();
    for group in GROUPS {
        for mut case in group(&executor) {
            bench(&mut criterion, &mut case);
            outcomes.extend(effort.and_then(|effort| rounds::run(&executor, &mut case, effort)));
        }
    }
    criterion.final_summary();
    if !outcomes.is_empty() {
        table::print(&outcomes);
    }
    Ok(())
}

/// How long the rounds take; `None` where criterion was asked for something other than measuring, a test or a list.
fn effort() -> Option<Effort> {
    let given = |flags: &[&str]| std::env::args().any(|argument| flags.contains(&&*argument));
    let measures = given(&["--bench"]) && !given(&["--test", "--list", "--profile-time"]);
    let (milliseconds, rounds) = if given(&["--quick"]) { (5, 3) } else { (100, 9) };
    measures.then_some(Effort {
        turn: Duration::from_millis(milliseconds),
        rounds,
    })
}

fn bench(criterion: &mut Criterion, case: &mut Case) {
    let mut group = criterion.benchmark_group(&case.name);
    for contender in &mut case.contenders {
        group.throughput(match case.bound {
            Bound::Bytes => Throughput::Bytes(contender.work as u64),
            Bound::Operations | Bound::Floats => Throughput::Elements(contender.work as u64),
        });
        group.bench_function(contender.name, |bencher| {
            bencher.iter(&mut contender.ready().call);
        });
    }
    group.finish();
}
