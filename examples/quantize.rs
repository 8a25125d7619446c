//! Quantises a `glm4_moe_lite` folder to MMFP4 on disk.
//!
//! `cargo run --release --example quantize -- tests/data/demo-model examples/demo-model` remakes the bundled
//! demo model, byte for byte (remove the old one first).

use anyhow::Context;
use candle_mmfp4::checkpoint::{Checkpoint, QuantizeOptions, quantize_checkpoint};
use candle_mmfp4::fp4::Format;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (source, target) = arguments
        .next()
        .zip(arguments.next())
        .context("usage: quantize SOURCE TARGET")?;
    let options = QuantizeOptions {
        // Small enough for two files, so that what reads the demo model reads an index too.
        shard_bytes: 7_000_000,
        ..QuantizeOptions::new(Format::mmfp4())
    };
    let report = quantize_checkpoint(&Checkpoint::open(source)?, &target, &options, |_, _| {})?;
    println!("{target}: {report}");
    Ok(())
}
