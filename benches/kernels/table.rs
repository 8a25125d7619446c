//! What the rounds gave, as Markdown.

use crate::case::Bound;
use crate::rounds::{Outcome, Row, Samples};
use candle_mmfp4::cpu::Executor;

/// A run whose limit spreads by more than this, relative to its median, says little.
const NOISY: f64 = 0.15;

/// What the numbers depend on.
pub fn print_setup(executor: &Executor) {
    eprintln!(
        "candle-mmfp4: {} instructions, {} threads. Candle: {} threads.",
        executor.isa().name(),
        executor.threads(),
        candle_threads(),
    );
    let names = [
        "MMFP4_CPU",
        "MMFP4_THREADS",
        "RAYON_NUM_THREADS",
        "CANDLE_NUM_THREADS",
    ];
    let set = names.map(|name| {
        let value = std::env::var_os(name);
        let value = value.map_or("not set".into(), |value| value.to_string_lossy().into_owned());
        format!("{name} {value}")
    });
    eprintln!("{}.", set.join(", "));
    if executor.threads() != candle_threads() {
        eprintln!("The two sides have different numbers of threads: their ratio says little.");
    }
}

/// The threads of QMatMul's pool, which Candle tells nobody: its environment variable, or as many as Rayon's.
fn candle_threads() -> usize {
    let named = std::env::var("CANDLE_NUM_THREADS").ok();
    let named = named
        .and_then(|text| text.parse().ok())
        .filter(|threads| *threads > 0);
    named.unwrap_or_else(candle_core::utils::get_num_threads)
}

/// All cases, in their order.
pub fn print(outcomes: &[Outcome]) {
    eprintln!(
        "\nAll contenders and the limit in turn, round by round; medians (least to most) of {} rounds after the first.\n\
         The limit of a case is the read bandwidth over the weights of its first contender, or the peak of byte\n\
         products; `exact` and attention multiply in f32, of which a register holds a quarter as many. Attention over\n\
         a paged cache: BF16 products where the processor has them, else f32; `÷ bound` is a call's time by the larger of\n\
         what its bytes and what its products take at the two limits.\n\
         Bytes are those of the weights as stored: on x86 Candle repacks Q4K to 6 bits a weight and, for more than\n\
         one row, Q6K to 10; it reads those. Candle refuses Q4K and Q6K where K is no multiple of 256 (kv_b's 192):\n\
         Q4_0 stands there.",
        outcomes.first().map_or(0, |outcome| outcome.limit.len())
    );
    for outcome in outcomes {
        print_case(outcome);
    }
}

fn print_case(outcome: &Outcome) {
    let (unit, _) = words(outcome.bound);
    let bounded = outcome.other.len() > 0;
    let mut limits = limit(outcome.bound, &outcome.limit);
    if bounded {
        limits += &format!("; {}", limit(outcome.bound.other(), &outcome.other));
    }
    eprintln!("\n{}: {limits}\n", outcome.title);
    let peer = outcome.rows.iter().find(|row| Some(row.name) == outcome.peer);
    let compared = peer.map_or(String::new(), |peer| {
        format!(" {unit} ÷ {0} | calls ÷ {0} |", peer.name)
    });
    let of_bound = if bounded { " ÷ bound |" } else { "" };
    eprintln!("| | ms a call | {unit} | share of the limit |{of_bound}{compared}");
    eprintln!(
        "|---|---|---|---|{}{}",
        if bounded { "---|" } else { "" },
        peer.map_or("", |_| "---|---|")
    );
    for row in &outcome.rows {
        let ratios = peer.map_or(String::new(), |peer| {
            let calls = peer.seconds.median() / row.seconds.median();
            format!(" {:.2} | {calls:.2} |", rate(row) / rate(peer))
        });
        let of_bound = row.other.map_or(String::new(), |other| {
            let seconds = |work: usize, limit: &Samples| work as f64 / limit.median();
            let bound = seconds(row.work, &outcome.limit).max(seconds(other, &outcome.other));
            format!(" {:.2} |", row.seconds.median() / bound)
        });
        eprintln!(
            "| {} | {} | {:.1} | {:.1} % |{of_bound}{ratios}",
            row.name,
            range(&row.seconds, |seconds| seconds * 1e3, 3),
            rate(row) / 1e9,
            100.0 * rate(row) / outcome.limit.median(),
        );
    }
}

/// The unit of a bound's rates, and what the machine is said to do.
fn words(bound: Bound) -> (&'static str, &'static str) {
    match bound {
        Bound::Bytes => ("GB/s", "read bandwidth"),
        Bound::Operations => ("GOP/s", "byte products"),
        Bound::Floats => ("GOP/s", "float products"),
    }
}

/// What the machine reached.
fn limit(bound: Bound, samples: &Samples) -> String {
    let (unit, name) = words(bound);
    let noisy = (samples.max() - samples.min()) / samples.median() > NOISY;
    let noisy = if noisy { ", NOISY" } else { "" };
    format!("{name} {} {unit}{noisy}", range(samples, |rate| rate / 1e9, 1))
}

/// Bytes or operations a second.
fn rate(row: &Row) -> f64 {
    row.work as f64 / row.seconds.median()
}

fn range(samples: &Samples, scale: fn(f64) -> f64, digits: usize) -> String {
    let [median, min, max] = [samples.median(), samples.min(), samples.max()].map(scale);
    format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
}
