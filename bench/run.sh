#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Runs the host benchmarks of a build, writes their raw JSON to bench/results/ and prints the tables of bench/README.md.
# Usage: bench/run.sh [build folder, default: build] [benchmark names, default: all]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:-build}
if (($# > 0)); then shift; fi
if (($# > 0)); then
  names=("$@")
else
  names=(gemm router dispatch experts layer shard checkpoint pipeline)
fi
mkdir -p bench/results
for name in "${names[@]}"; do
  binary=$build/bench/${name}_bench
  if [[ ! -x $binary ]]; then
    echo "bench/run.sh: $binary is not there; build first: cmake -S . -B $build && cmake --build $build" >&2
    exit 1
  fi
  echo "== $name" >&2
  out=bench/results/host_$name.json
  # One BLAS thread: a rank is a thread. Names of machines and paths say nothing to a reader.
  OPENBLAS_NUM_THREADS=1 "$binary" --benchmark_min_time=0.2 --benchmark_format=json 2>/dev/null |
    sed -e '/"host_name":/d' -e '/"executable":/d' -e '/"load_avg":/d' >"$out"
done
python3 bench/table.py "${names[@]/#/bench/results/host_}"
