//! Progress bars on stderr; where that is no terminal, none.

use crate::output::say;
use candle_mmfp4::checkpoint::hub::{Plan, Progress, machine_memory};
use indicatif::{BinaryBytes, ProgressBar, ProgressFinish, ProgressStyle};

/// A bar that counts `unit`s and disappears when it is done.
pub fn counting(unit: &str) -> ProgressBar {
    bar(&format!("{{wide_bar}} {{pos}}/{{len}} {unit}, {{eta}} left"))
}

/// A bar that counts the bytes that are written.
pub fn writing(what: &str) -> ProgressBar {
    let bar = bar("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {eta} left");
    bar.set_message(what.to_string());
    bar
}

/// A bar that names the file under way.
pub struct DownloadBar(ProgressBar);

impl DownloadBar {
    pub fn new(wanted: bool) -> Self {
        Self(match wanted {
            true => bar(
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            ),
            false => ProgressBar::hidden(),
        })
    }
}

impl Progress for DownloadBar {
    fn start(&mut self, plan: &Plan) -> candle_mmfp4::Result<()> {
        let advice = machine_memory().and_then(|memory| plan.advice(memory));
        for line in plan.warnings().into_iter().chain(advice) {
            say(format!("warning: {line}"));
        }
        if plan.remaining() > 0 {
            say(format!(
                "fetching {} of {} into {}",
                BinaryBytes(plan.remaining()),
                plan.repo,
                plan.snapshot.display()
            ));
        }
        Ok(())
    }

    fn file(&mut self, name: &str, size: u64, present: u64) {
        // Each of these may draw: the name comes last, so that it never stands beside another file's numbers.
        self.0.reset();
        self.0.set_length(size);
        self.0.set_position(present);
        self.0.set_message(name.to_string());
    }

    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn note(&mut self, message: &str) {
        self.0.suspend(|| say(message));
    }

    fn done(&mut self) {
        self.0.finish_and_clear();
    }
}

fn bar(template: &str) -> ProgressBar {
    // Unknown keys alone make a template invalid, and these are constants; then the default style does.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0)
        .with_style(style)
        .with_finish(ProgressFinish::AndClear)
}
