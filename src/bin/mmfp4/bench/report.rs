//! Rows as a table, and as CSV.

use super::row::Row;
use crate::output::mib;
use serde_json::Value;
use std::io::Write;

/// A table for people.
pub fn table(rows: &[Row]) -> String {
    let head = [
        "test", "cache", "tokens/s", "spread", "ms", "first ms", "MB/token", "GB/s", "share", "peak",
        "private", "",
    ];
    let lines: Vec<_> = rows.iter().map(line).collect();
    heading(rows) + &columns(head, &lines)
}

/// Generation by depth, beside depth 0 and beside what the machine allows; `None` where no row tells it.
pub fn depths(rows: &[Row]) -> Option<String> {
    let head = [
        "cache",
        "depth",
        "tokens/s",
        "of depth 0",
        "cache MB",
        "ms",
        "bound ms",
        "÷ bound",
        "",
    ];
    let show =
        |value: Option<f64>, digits: usize| value.map_or(String::new(), |value| format!("{value:.digits$}"));
    let line = |row: &Row| {
        let of_depth_0 = row.of_depth_0?;
        Some([
            row.kv_cache.clone(),
            row.depth.to_string(),
            format!("{:.1}", row.tokens_per_s),
            format!("{of_depth_0:.2}"),
            format!("{:.1}", row.cache_bytes as f64 / 1e6),
            format!("{:.1}", row.latency_ms),
            show(row.bound_ms, 1),
            show(row.of_bound, 2),
            noisy(row),
        ])
    };
    let lines: Vec<_> = rows.iter().filter_map(line).collect();
    let deep = rows.iter().any(|row| row.of_depth_0.is_some() && row.depth > 0);
    deep.then(|| columns(head, &lines).trim_start().to_string())
}

/// Lines below a head, a new one each, the first column to the left and the others to the right.
fn columns<const N: usize>(head: [&str; N], lines: &[[String; N]]) -> String {
    let all = || std::iter::once(head.map(String::from)).chain(lines.iter().cloned());
    let widths: Vec<_> = (0..N)
        .map(|column| all().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in all() {
        let mut row = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            row += &match column {
                0 => format!("{cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text += &format!("\n{}", row.trim_end());
    }
    text
}

/// What all rows share.
fn heading(rows: &[Row]) -> String {
    rows.first().map_or_else(String::new, |row| {
        let setup = &row.setup;
        let experts = if setup.fused_moe { "fused" } else { "one by one" };
        let activations = if setup.exact { "in f32" } else { "in eight bits" };
        let head = if setup.int8_head {
            ", output head in eight bits"
        } else {
            ""
        };
        format!(
            "{}, {}, {} threads, activations {activations}, experts {experts}{head}",
            setup.model, setup.cpu, setup.threads
        )
    })
}

/// What a row is called.
pub fn name(row: &Row) -> String {
    let tokens = row.prompt_tokens + row.generated_tokens;
    match (row.test.as_str(), row.depth) {
        ("pp" | "tg", 0) => format!("{} {tokens}", row.test),
        ("pp" | "tg", depth) => format!("{} {tokens} at {depth}", row.test),
        (latency, _) => latency.to_string(),
    }
}

fn noisy(row: &Row) -> String {
    if row.noisy { "noisy" } else { "" }.into()
}

fn line(row: &Row) -> [String; 12] {
    let tokens = row.prompt_tokens + row.generated_tokens;
    let show = |value: f64, digits: usize| format!("{value:.digits$}");
    // What has no tokens has no rate, and one measurement no spread.
    let rate = |text: String| if tokens > 0 { text } else { String::new() };
    let spread = if row.repetitions > 1 {
        percent(row.spread)
    } else {
        String::new()
    };
    [
        name(row),
        row.kv_cache.clone(),
        rate(show(row.tokens_per_s, 1)),
        spread,
        show(row.latency_ms, 1),
        row.first_ms.map_or(String::new(), |ms| show(ms, 1)),
        rate(show(row.bytes_per_token as f64 / 1e6, 2)),
        show(row.read_bandwidth_gb_s, 1),
        rate(percent(row.share_of_bandwidth)),
        mib(row.peak_memory_bytes),
        mib(row.private_memory_bytes),
        noisy(row),
    ]
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// All there is, with the names that the JSON has.
pub fn print_csv(rows: &[Row]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for (index, row) in rows.iter().enumerate() {
        let Value::Object(row) = serde_json::to_value(row)? else {
            anyhow::bail!("a row is no object");
        };
        if index == 0 {
            writeln!(
                out,
                "{}",
                row.keys().map(String::as_str).collect::<Vec<_>>().join(",")
            )?;
        }
        let cells: Vec<_> = row.values().map(cell).collect();
        writeln!(out, "{}", cells.join(","))?;
    }
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(" "),
        Value::String(text) if text.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cells_of_csv() {
        assert_eq!(cell(&json!("a, \"b\"")), "\"a, \"\"b\"\"\"");
        assert_eq!(cell(&json!("plain")), "plain");
        assert_eq!(cell(&json!([1.5, 2])), "1.5 2");
        assert_eq!(cell(&Value::Null), "");
        assert_eq!(cell(&json!(true)), "true");
    }
}
