//! `-v` and `RUST_LOG`: a span for each layer and each op, with its time and the memory after it.

use crate::output::{Usage, mib};
use candle_core::Tensor;
use candle_mmfp4::memory;
use candle_mmfp4::models::Site;
use std::io::IsTerminal;
use tracing::field::{Empty, debug, display};
use tracing::span::EnteredSpan;
use tracing::{Level, debug_span, info_span};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::fmt::time::uptime;

/// Sets up what is told on stderr: `-v`s, or else RUST_LOG, or else nothing.
pub fn init(verbose: u8) -> anyhow::Result<()> {
    let variable = std::env::var("RUST_LOG").ok().filter(|value| !value.is_empty());
    let directives = match (verbose, variable) {
        (0, Some(directives)) => directives,
        (0, None) => return Ok(()),
        (1, _) => "mmfp4=info".into(),
        _ => "mmfp4=debug".into(),
    };
    let filter = EnvFilter::builder().parse(&directives).map_err(|error| {
        Usage(format!(
            "RUST_LOG: {error}; an example that works is RUST_LOG=mmfp4=debug"
        ))
    })?;
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !no_color)
        .with_target(false)
        .with_timer(uptime())
        .with_span_events(FmtSpan::CLOSE)
        .init();
    Ok(())
}

/// Whether somebody wants the spans of [`Spans`], which cost time themselves.
pub fn is_wanted() -> bool {
    tracing::enabled!(Level::INFO)
}

/// Makes spans of what an observer of a forward pass sees.
///
/// An observer is called after each op: a span begins where the op before ended, and gets its name at its end.
/// The embeddings, which come first, have no beginning that could be seen, and no span.
#[derive(Default)]
pub struct Spans {
    // In this order, because the inner one ends first.
    op: Option<EnteredSpan>,
    layer: Option<Layer>,
}

struct Layer {
    span: EnteredSpan,
    named: bool,
}

impl Spans {
    pub fn see(&mut self, site: Site, output: &Tensor) {
        if let Some(layer) = self.layer.as_mut().filter(|layer| !layer.named) {
            match site.layer {
                Some(index) => layer.span.record("index", index),
                // What follows the last layer: norm and output head.
                None => layer.span.record("index", display("head")),
            };
            layer.named = true;
        }
        if let Some(op) = self.op.take().filter(|op| !op.is_disabled()) {
            op.record("name", site.op);
            op.record("shape", debug(output.dims()));
            op.record("resident", mib(memory::resident()));
        }
        let is_last = site.op == "lm_head";
        if (site.op == "layer" || is_last)
            && let Some(layer) = self.layer.take()
        {
            layer.span.record("resident", mib(memory::resident()));
        }
        if is_last {
            return;
        }
        self.layer.get_or_insert_with(|| Layer {
            span: info_span!("layer", index = Empty, resident = Empty).entered(),
            named: false,
        });
        self.op = Some(debug_span!("op", name = Empty, shape = Empty, resident = Empty).entered());
    }
}
