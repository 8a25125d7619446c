//! Names for the two conditions that the code asks about: `msl_host`, whether launch plans can run on this machine's CPU
//! (feature `msl-host`, x86-64 Linux), and `launch_plans`, whether anything here runs them at all.

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(msl_host, launch_plans)");
    let target = |name: &str| var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    let feature = var("CARGO_FEATURE_MSL_HOST").is_ok();
    let msl_host = feature && target("OS") == "linux" && target("ARCH") == "x86_64";
    if msl_host {
        println!("cargo::rustc-cfg=msl_host");
    }
    if msl_host || target("OS") == "macos" {
        println!("cargo::rustc-cfg=launch_plans");
    }
}
