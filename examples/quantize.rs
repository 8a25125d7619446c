//! Quantises a `glm4_moe_lite` folder to MMFP4 on disk.
//!
//! `cargo run --release --example quantize -- tests/data/demo-model examples/demo-model` remakes the bundled
//! demo model, byte for byte (remove the old one first).

use anyhow::Context;
use candle_mmfp4::checkpoint::{Checkpoint, quantize_folder};
use candle_mmfp4::fp4::{Format, ScaleRule};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (source, target) = arguments
        .next()
        .zip(arguments.next())
        .context("usage: quantize SOURCE TARGET")?;
    quantize_folder(
        &Checkpoint::open(source)?,
        &target,
        Format::mmfp4(),
        ScaleRule::SquaredError,
    )?;
    println!("{target}");
    Ok(())
}
