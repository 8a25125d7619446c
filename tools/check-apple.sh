#!/usr/bin/env bash
# Type-checks the Mac-only code for the real target, aarch64-apple-darwin, on x86-64 Debian: `cargo check`, nothing is linked.
#
# The standard library is built from its sources (Debian's rustc-web and rust-web-src, unpacked under target/, not
# installed). C code of dependencies is not compiled: a stand-in writes empty objects.
set -euo pipefail
cd "$(dirname "$0")/.."

home=$PWD/target/check-apple
root=$home/root
mkdir -p "$home"

if [ ! -x "$home/rustc" ]; then
    depends() {
        apt-cache depends "$1" | sed -n "s/^ *Depends: \($2\)\$/\1/p"
    }
    # A fresh machine has no lists of packages yet.
    std=$(depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]*' || true)
    if [ -z "$std" ]; then
        apt-get update -q
        std=$(depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]*')
    fi
    llvm=$(depends "$std" 'libllvm[0-9]*')
    rm -rf "$home/debs" "$root"
    mkdir "$home/debs"
    (
        cd "$home/debs"
        apt-get -o APT::Sandbox::User=root -q download rustc-web rust-web-src libstd-rust-web-dev "$std" "$llvm"
    )
    for package in "$home"/debs/*.deb; do
        dpkg -x "$package" "$root"
    done
    rm -r "$home/debs"

    cat >"$home/cc" <<'EOF'
#!/bin/sh
# Stands in for a C compiler: an empty object for every -o.
case "$*" in *--version* | *-dumpmachine*) echo "Apple clang version 17.0.0"; exit 0 ;; esac
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && : >"$2"
    shift
done
EOF
    cat >"$home/ar" <<'EOF'
#!/bin/sh
# Stands in for an archiver: an empty archive.
for argument; do
    case "$argument" in *.a) printf '!<arch>\n' >"$argument" ;; esac
done
EOF
    cat >"$home/rustc.new" <<EOF
#!/bin/sh
LD_LIBRARY_PATH='$root/usr/lib/x86_64-linux-gnu' exec '$root/usr/bin/rustc' "\$@"
EOF
    chmod +x "$home/cc" "$home/ar" "$home/rustc.new"
    mv "$home/rustc.new" "$home/rustc"
fi

export RUSTC=$home/rustc
# The standard library is built by a stable compiler.
export RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR=$home/build
export CC_aarch64_apple_darwin=$home/cc CXX_aarch64_apple_darwin=$home/cc
export AR_aarch64_apple_darwin=$home/ar RANLIB_aarch64_apple_darwin=/bin/true

cargo check -Zbuild-std=std,panic_unwind --target aarch64-apple-darwin --all-targets \
    --features cli,candle-transformers,msl-host "$@"
