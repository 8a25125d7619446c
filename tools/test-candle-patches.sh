#!/usr/bin/env bash
# candle-transformers as released (every known fault is there) and patched (none is): tests/candle_masks.rs on
# both. The checkout stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

test=(cargo test --release --quiet --test candle_masks)

# The features of the README's test command, and one target folder, so that all share what is built but
# candle-transformers and this crate.
features=candle-transformers,cli,hub

echo "candle-transformers as released:"
env -u MMFP4_CANDLE_PATCHED "${test[@]}" --features "$features" --locked

config=$(tools/apply-patches.sh)
echo "candle-transformers with $(ls patches/*.patch | wc -l) patches:"
cd "$root/target/candle-patched/manifest"
MMFP4_CANDLE_PATCHED=1 "${test[@]}" --features "$features" --config "$config" --target-dir "$root/target"
