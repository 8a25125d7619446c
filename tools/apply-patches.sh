#!/usr/bin/env bash
# A patched candle-transformers, and how to build with it, without touching the checkout:
#   target/candle-patched/candle-transformers   the released source with patches/*.patch applied
#   target/candle-patched/manifest              this package's manifest and lock file, beside links to its sources
# The last line printed is the cargo argument that uses it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
version=0.11.1
out=$root/target/candle-patched
crate=$out/candle-transformers
manifest=$out/manifest
mkdir -p "$root/target"

cargo fetch --locked --quiet
registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
released=$(find "$registry" -mindepth 2 -maxdepth 2 -type d -name "candle-transformers-$version" | head -n 1)
if [[ -z $released ]]; then
    echo "candle-transformers $version is not in $registry: does Cargo.lock hold another version?" >&2
    exit 1
fi

# The last result is kept where nothing changed, so that cargo does not build it again.
fresh=$(mktemp -d "$root/target/candle-patched.XXXXXX")
trap 'rm -rf "$fresh"' EXIT
cp -R "$released/." "$fresh"
chmod -R u+w "$fresh"
for patch in "$root"/patches/*.patch; do
    echo "applying ${patch#"$root"/}" >&2
    patch -d "$fresh" -p1 -F0 -f -s <"$patch"
done
mkdir -p "$crate" "$manifest"
if ! diff -rq "$fresh" "$crate" >/dev/null; then
    rm -rf "$crate"
    mv "$fresh" "$crate"
fi

# A patched dependency changes the lock file, so that cargo gets a copy of both.
cp "$root/Cargo.toml" "$root/Cargo.lock" "$manifest/"
for entry in *; do
    case $entry in Cargo.toml | Cargo.lock | target) ;; *) ln -sfn "$root/$entry" "$manifest/$entry" ;; esac
done

echo "to build with it, in the copy of the manifest:" >&2
echo "  cd ${manifest#"$root"/} && cargo build --release --features candle-transformers \\" >&2
echo "      --target-dir ../.. --config 'patch.crates-io.candle-transformers.path=\"$crate\"'" >&2
echo "patch.crates-io.candle-transformers.path=\"$crate\""
