//! The tables of docs/metal.md.

use super::moved::{Moved, Token, assert_planned};
use super::{Both, CACHED, DECODED, DEPTHS, PROMPT, SHARE, head, size, sum};
use crate::model::tolerance;
use candle_core::DType;
use candle_mmfp4::kv::CacheFormat;
use candle_mmfp4::metal::plan::Launch;
use candle_mmfp4::models::glm4_moe_lite::AttentionPath;
use std::fmt::Write as _;

#[derive(Default)]
struct Table(String);

impl Table {
    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<_> = cells.into_iter().collect();
        writeln!(self.0, "| {} |", cells.join(" | ")).unwrap();
    }

    fn head(&mut self, names: &[&str]) {
        self.row(names.iter().map(ToString::to_string));
        self.row(names.iter().map(|_| "---".to_string()));
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

pub fn decode_tables() -> [String; 3] {
    let both = Both::new(AttentionPath::Absorbed);
    let (one, two, sparse) = both.pass(1, CACHED, CacheFormat::BF16);
    [
        decode_table(&sparse, one.cache, two.weights - one.weights),
        floor_table(&Token::new(&both, CACHED, CacheFormat::BF16)),
        cache_table(&both),
    ]
}

/// The launches of a sparse layer.
fn decode_table(launches: &[Launch], row: u64, weights: u64) -> String {
    let mut table = Table::default();
    table.head(&["dispatch", "kernel", "threadgroups", "weights", "read", "written"]);
    for (launch, name) in launches.iter().zip(DECODED) {
        let [x, y, z] = launch.threadgroups;
        table.row([
            name.into(),
            format!("`{}`", launch.kernel),
            format!("{x} × {y} × {z}"),
            thousands(launch.work.weights),
            thousands(launch.work.read),
            thousands(launch.work.written),
        ]);
    }
    let moved = Moved::of(launches, CACHED, row);
    table.row([
        "all".into(),
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(moved.weights),
        thousands(sum(launches, |work| work.read)),
        thousands(sum(launches, |work| work.written)),
    ]);
    // Counted apart from the plans: what the model says that a token reads. Its norms are f32 in both.
    assert_planned(moved.weights, weights);
    format!(
        "{}\nThe model needs {} bytes of weights for a token and such a layer; the cache has {} for {} tokens. What the plans\n\
         read is {:.3} × that, with the activations between dispatches.\n",
        table.0,
        thousands(weights),
        thousands(CACHED as u64 * row),
        thousands(CACHED as u64),
        moved.read as f64 / (weights + CACHED as u64 * row) as f64,
    )
}

/// All that a token moves, part by part.
fn floor_table(token: &Token) -> String {
    let mut table = Table::default();
    let names = [
        "part",
        "dispatches",
        "weights",
        "cache",
        "activations",
        "attention's parts",
        "all",
    ];
    table.head(&names);
    let whole = ("**a token**".to_string(), token.all);
    for (name, moved) in token.parts.iter().chain([&whole]) {
        let dispatches = match moved.dispatches {
            0 => "the host's".into(),
            count => count.to_string(),
        };
        let bytes = [
            moved.weights,
            moved.cache,
            moved.activations,
            moved.parts,
            moved.all(),
        ];
        table.row([name.clone(), dispatches].into_iter().chain(bytes.map(thousands)));
    }
    let (_, fp4_head) = head(size("vocab_size"), true);
    let (_, bf16_head) = head(size("vocab_size"), false);
    let (all, with_bf16_head) = (token.all.all(), token.all.all() - fp4_head + bf16_head);
    let milliseconds = |bytes: u64| bytes as f64 / 1e11 * 1e3;
    format!(
        "{}\nAt 100 GB/s a token takes {:.1} ms at least. With an output head in BF16, which is {} bytes instead of {}, these\n\
         are {} bytes, {:.1} ms.\n",
        table.0,
        milliseconds(all),
        thousands(bf16_head),
        thousands(fp4_head),
        thousands(with_bf16_head),
        milliseconds(with_bf16_head),
    )
}

/// Of each format what a token reads of the cache, and of all that it reads the share of what it cannot do without.
fn cache_table(both: &Both) -> String {
    let mut table = Table::default();
    let depths = DEPTHS.map(|depth| format!("at {}", thousands(depth as u64)));
    let names = ["cache", "bytes a token and layer"].map(String::from);
    let names: Vec<_> = names.into_iter().chain(depths).collect();
    table.head(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for name in ["f16", "bf16", "fp8", "fp4"] {
        let format = name.parse().unwrap();
        let mut cells = vec![format!("`{name}`")];
        for depth in DEPTHS {
            let Token { all, .. } = Token::new(both, depth, format);
            let row = all.cache / size("num_hidden_layers") / (depth as u64 + 1);
            if cells.len() == 1 {
                cells.push(row.to_string());
            }
            // Asserted by itself: what attention reads of it in each layer is no more.
            let cached = row * depth as u64 * size("num_hidden_layers");
            let share = all.share(cached);
            assert!(share <= SHARE, "{name} at {depth}: {share}");
            cells.push(format!("{}, {share:.3} ×", thousands(cached)));
        }
        table.row(cells);
    }
    table.0
}

/// How far whole models may be off: what tests/msl/model.rs requires.
pub fn logits_table() -> String {
    let mut table = Table::default();
    table.head(&[
        "activations",
        "error of the logits at most",
        "in half of all cases",
    ]);
    for (name, dtype) in [("F32", DType::F32), ("F16", DType::F16), ("BF16", DType::BF16)] {
        let [most, middle] = tolerance(dtype);
        table.row([name.into(), format!("{most:e}"), format!("{middle:e}")]);
    }
    table.0
}

pub fn prompt_table() -> String {
    let both = Both::new(AttentionPath::Materialised);
    let (_, _, launches) = both.pass(PROMPT, PROMPT, CacheFormat::BF16);
    let mut table = Table::default();
    table.head(&[
        "kernel",
        "threadgroups",
        "weights",
        "read and written",
        "operations",
    ]);
    for launch in &launches {
        let [x, y, z] = launch.threadgroups;
        table.row([
            format!("`{}`", launch.kernel),
            format!("{x} × {y} × {z}"),
            thousands(launch.work.weights),
            thousands(launch.work.read + launch.work.written),
            thousands(launch.work.operations),
        ]);
    }
    table.row([
        format!("{} dispatches", launches.len()),
        String::new(),
        thousands(sum(&launches, |work| work.weights)),
        thousands(sum(&launches, |work| work.read + work.written)),
        thousands(sum(&launches, |work| work.operations)),
    ]);
    table.0
}
