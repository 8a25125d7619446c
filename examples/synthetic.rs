//! Writes a checkpoint of random weights in GLM-4.7-Flash's shapes: something to quantise, or to measure, where there is no
//! download.
//!
//! `cargo run --release --example synthetic -- slice-8-bf16 target/synthetic/slice-8-bf16` writes the first eight layers in
//! BF16, 10 GB, for `mmfp4 quantize`.

use anyhow::Context;
use candle_mmfp4::checkpoint::Synthetic;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (name, target) = arguments
        .next()
        .zip(arguments.next())
        .with_context(|| format!("usage: synthetic {} FOLDER", Synthetic::NAMES.join("|")))?;
    let synthetic: Synthetic = name.parse()?;
    synthetic.ensure(&target, |_, _| {})?;
    println!("{target}: {:.1} GB", synthetic.size_in_bytes() as f64 / 1e9);
    Ok(())
}
