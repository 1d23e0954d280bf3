#!/usr/bin/env bash
# Builds the op library with the address and undefined behaviour sanitizers (g++) and runs the op tests, or what is given, with it.
#   runtime/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitized
cmake -S runtime -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=None -DBDQ_SANITIZE=ON ${ORT_INCLUDE_DIR:+-DORT_INCLUDE_DIR="$ORT_INCLUDE_DIR"}
cmake --build "$build"

# Python is not built with the sanitizers, so their runtimes come first; what Python itself never frees is no leak of ours.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
  BDQ_LIBRARY="$PWD/$build/libbdq_ops.so" python -m pytest -q "${@:-tests/runtime/ops}"
