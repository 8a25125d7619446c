//! Speed by the depth of the cache, as `mmfp4 bench --json` measured it: a plot, and its table in Markdown on stdout or,
//! where a page is named, in the place that it has for it.
//!
//! ```sh
//! mmfp4 bench --synthetic glm-4.7-flash -p 0 -n 32 -d 0,512,1024,2048,4096,8192 --kv-cache bf16,fp8,fp4 --json |
//!     cargo run --release --features bench --example plot_depth -- docs/kv-cache-depth.svg docs/kv-cache.md
//! ```

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use serde::Deserialize;
use std::path::Path;

/// What stands before and after the table in a page.
const PLACE: [&str; 2] = ["<!-- plot_depth -->\n", "<!-- /plot_depth -->\n"];

/// Told apart by those who are colour-blind as well (Okabe and Ito).
const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

/// What is taken of a row of the report.
#[derive(Deserialize)]
struct Row {
    model: String,
    cpu: String,
    threads: usize,
    test: String,
    kv_cache: String,
    depth: usize,
    tokens_per_s: f64,
    of_depth_0: Option<f64>,
    cache_bytes: u64,
    of_bound: Option<f64>,
    noisy: bool,
}

fn main() -> Result<()> {
    let mut paths = std::env::args_os().skip(1);
    let picture = paths.next().context("usage: plot_depth SVG [PAGE] < JSON")?;
    let rows: Vec<Row> = serde_json::from_reader(std::io::stdin().lock())
        .context("expected the JSON of `mmfp4 bench -d 0,... --kv-cache ... --json`")?;
    let rows: Vec<Row> = rows.into_iter().filter(|row| row.test == "tg").collect();
    ensure!(!rows.is_empty(), "expected rows of the test tg, found none");
    match paths.next() {
        None => print!("{}", table(&rows)),
        Some(page) => {
            let page = Path::new(&page);
            let text = std::fs::read_to_string(page).with_context(|| page.display().to_string())?;
            let text = placed(&text, &table(&rows))
                .with_context(|| format!("{}: expected {PLACE:?}, one after the other", page.display()))?;
            replace(page, &text)?;
        }
    }
    replace(Path::new(&picture), &plot(&rows)?)
}

/// Writes a file that its readers find as it was or as it is to be, not in between.
fn replace(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension("tmp");
    std::fs::write(&unfinished, text).with_context(|| unfinished.display().to_string())?;
    std::fs::rename(&unfinished, path).with_context(|| path.display().to_string())
}

/// A page with another table in its place.
fn placed(page: &str, table: &str) -> Option<String> {
    let (before, rest) = page.split_once(PLACE[0])?;
    let (_, after) = rest.split_once(PLACE[1])?;
    Some(format!("{before}{}{table}{}{after}", PLACE[0], PLACE[1]))
}

/// What all rows share.
fn setup(row: &Row) -> String {
    format!("{}, {}, {} threads", row.model, row.cpu, row.threads)
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{}:\n\n| cache | depth | tokens/s | of depth 0 | cache, MB | time ÷ bound | |\n|---|---|---|---|---|---|---|\n",
        setup(&rows[0])
    );
    for row in rows {
        let show = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
        text += &format!(
            "| {} | {} | {:.1} | {} | {:.1} | {} | {} |\n",
            row.kv_cache,
            row.depth,
            row.tokens_per_s,
            show(row.of_depth_0),
            row.cache_bytes as f64 / 1e6,
            show(row.of_bound),
            if row.noisy { "noisy" } else { "" },
        );
    }
    text
}

/// Tokens a second over depth, a line a cache; dashed, what the machine's limits would allow.
fn plot(rows: &[Row]) -> Result<String> {
    let mut caches: Vec<&str> = rows.iter().map(|row| row.kv_cache.as_str()).collect();
    caches.dedup();
    let deepest = rows.iter().map(|row| row.depth).max().unwrap_or(0).max(1);
    let fastest = rows.iter().map(|row| row.tokens_per_s).fold(0.0, f64::max);

    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (860, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(setup(&rows[0]), ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0..deepest, 0.0..fastest * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("tokens in the cache")
        .y_desc("tokens/s (dashed: what the machine's limits allow)")
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()?;
    for (index, cache) in caches.into_iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let of_cache = || rows.iter().filter(move |row| row.kv_cache == cache);
        let measured: Vec<_> = of_cache().map(|row| (row.depth, row.tokens_per_s)).collect();
        chart.draw_series(
            measured
                .iter()
                .map(|point| Circle::new(*point, 3, color.filled())),
        )?;
        chart
            .draw_series(LineSeries::new(measured, color.stroke_width(2)))?
            .label(cache)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(2)));
        let bound = of_cache().filter_map(|row| Some((row.depth, row.tokens_per_s * row.of_bound?)));
        chart.draw_series(DashedLineSeries::new(bound, 4, 4, color.stroke_width(1)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .label_font(("sans-serif", 14))
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    drop(chart);
    area.present()?;
    drop(area);
    Ok(svg)
}
