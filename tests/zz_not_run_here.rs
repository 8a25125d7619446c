//! The last line of a test run: what this machine could not run. Without a harness, so that it is always shown.

fn main() {
    let mut missing = Vec::new();
    if cfg!(target_os = "macos") {
        missing.push("resident memory over many conversations (measured on Linux only)");
    } else {
        missing.push("Metal kernels on an Apple GPU");
    }
    if !cfg!(target_arch = "aarch64") {
        missing.push("anything on an aarch64 CPU");
    }
    println!("\nnot run on this machine:");
    for what in missing {
        println!("- {what}");
    }
}
