#!/usr/bin/env bash
# Builds llama.cpp's llama-bench, which tools/bench_llama_cpp.py runs, for the machine it runs on:
#   target/llama-bench/python           a virtual environment with tools/requirements-bench.txt
#   target/llama-bench/src              llama-cpp-python's source distribution, which carries llama.cpp
#   target/llama-bench/bin/llama-bench  the program, one file; beside it VERSION says what it was built from
# Five to ten minutes on two cores, 0.6 GB of disk; src may be removed afterwards. Needs Python 3.11 or later, a C++
# compiler, and pip's registry. CARGO_TARGET_DIR is honoured; JOBS is the number of compilers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
version=0.3.36
# The numbers in docs/ are of this source and no other.
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
out=${CARGO_TARGET_DIR:-$root/target}/llama-bench
mkdir -p "$out/src" "$out/bin"
out=$(cd "$out" && pwd)
archive=$out/src/llama_cpp_python-$version.tar.gz
source=$out/src/llama_cpp_python-$version
build=$out/src/build

[[ -x $out/python/bin/python ]] || python3 -m venv "$out/python"
"$out/python/bin/pip" install --quiet --disable-pip-version-check --requirement "$root/tools/requirements-bench.txt"
export PATH=$out/python/bin:$PATH

if [[ ! -f $archive ]]; then
    pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest "$out/src" \
        "llama-cpp-python==$version"
fi
echo "$sha256  $archive" | sha256sum --check --quiet
if [[ ! -d $source ]]; then
    fresh=$(mktemp -d "$out/src/unpack.XXXXXX")
    tar -xzf "$archive" -C "$fresh"
    mv "$fresh/llama_cpp_python-$version" "$source"
    rmdir "$fresh"
fi
commit=$(cut -c 1-9 "$source/.git/modules/vendor/llama.cpp/HEAD")

# Static, so that the program may be copied; the commit is given, since CMake would find that of this checkout.
# No server, web UI, TLS: llama-bench needs none. llama.cpp leaves curl out by itself.
cmake -S "$source/vendor/llama.cpp" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_COMMIT="$commit" -DLLAMA_BUILD_NUMBER=0
cmake --build "$build" --target llama-bench --parallel "${JOBS:-$(nproc)}"

cp "$build/bin/llama-bench" "$out/bin/llama-bench.new"
mv "$out/bin/llama-bench.new" "$out/bin/llama-bench"
printf 'llama.cpp %s, of llama-cpp-python %s, sha256 %s; %s\n' "$commit" "$version" "$sha256" \
    "$("${CXX:-c++}" --version | head -n 1)" >"$out/bin/VERSION"
echo "$out/bin/llama-bench"
