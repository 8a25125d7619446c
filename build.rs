//! Names the condition that the code asks about: `msl_host`, whether launch plans can run on this machine's CPU (feature
//! `msl-host`, x86-64 Linux).

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(msl_host)");
    let target = |name: &str| var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    let feature = var("CARGO_FEATURE_MSL_HOST").is_ok();
    if feature && target("OS") == "linux" && target("ARCH") == "x86_64" {
        println!("cargo::rustc-cfg=msl_host");
    }
}
