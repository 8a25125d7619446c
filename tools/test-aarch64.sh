#!/usr/bin/env bash
# Runs the CPU kernels' tests for AArch64, with all its instruction sets, on x86-64 Debian under qemu-user.
#
# The standard library for AArch64 and the compiler that it was made with come from Debian (packages `rustc-web` and
# `libstd-rust-web-dev`, unpacked under target/, not installed: they would take the place of another rustc); qemu and
# the cross linker are installed. Arguments go to the tests: `tools/test-aarch64.sh cpu::linear`.
set -euo pipefail
cd "$(dirname "$0")/.."

home=$PWD/target/aarch64-tests
root=$home/root
mkdir -p "$home"

if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
    apt-get update -q
    apt-get install -qy --no-install-recommends qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
fi

if [ ! -x "$home/rustc" ]; then
    # Package lists of two architectures, kept apart from the system's.
    lists=$home/lists
    mkdir -p "$lists/partial" "$home/debs"
    options=(-o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o "Dir::State::Lists=$lists"
        -o APT::Sandbox::User=root -q)
    apt-get "${options[@]}" update
    # What the compiler and the host's standard library (for build scripts and macros) are made of.
    depends() {
        apt-cache "${options[@]}" depends "$1" | sed -n "s/^ *Depends: \($2\)\$/\1/p"
    }
    std=$(depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]*')
    llvm=$(depends "$std" 'libllvm[0-9]*')
    (
        cd "$home/debs"
        rm -f ./*.deb
        apt-get "${options[@]}" download rustc-web libstd-rust-web-dev libstd-rust-web-dev:arm64 "$std" "$llvm"
    )
    rm -rf "$root"
    for package in "$home"/debs/*.deb; do
        dpkg -x "$package" "$root"
    done
    rm -r "$home/debs" "$lists"
    cat >"$home/rustc.new" <<EOF
#!/bin/sh
LD_LIBRARY_PATH='$root/usr/lib/x86_64-linux-gnu' exec '$root/usr/bin/rustc' "\$@"
EOF
    chmod +x "$home/rustc.new"
    mv "$home/rustc.new" "$home/rustc"
fi

export RUSTC=$home/rustc
export CARGO_TARGET_DIR=$home/build
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
# For dependencies with C in them.
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc

# What the kernels do not run on is compiled as quickly as can be.
cargo test --release --no-default-features --target aarch64-unknown-linux-gnu --lib \
    --config 'profile.release.package."*".opt-level=1' -- "${@:-cpu::}"
