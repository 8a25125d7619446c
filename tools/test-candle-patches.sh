#!/usr/bin/env bash
# candle-transformers as released (every known fault is there) and patched (none is): tests/candle_masks.rs on
# both, each built once, the patched one in target/candle-patched/build. The checkout stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

test=(cargo test --release --quiet --test candle_masks)

echo "candle-transformers as released:"
# The features of the README's test command, so that it finds this built.
env -u MMFP4_CANDLE_PATCHED "${test[@]}" --features candle-transformers,cli,hub --locked

config=$(tools/apply-patches.sh)
echo "candle-transformers with $(ls patches/*.patch | wc -l) patches:"
cd "$root/target/candle-patched/manifest"
# As little as possible: the tests need nothing of the network.
MMFP4_CANDLE_PATCHED=1 "${test[@]}" --no-default-features --features candle-transformers --config "$config" \
    --target-dir "$root/target/candle-patched/build"
