#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Runs the GPU benchmarks of a build on one GPU and writes their raw JSON.
# Usage: bench/run_gpu.sh [build folder, default: build] [folder for JSON, default: bench/results]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:-build}
results=${2:-bench/results}
mkdir -p "$results"
for name in gemm router layer; do
  if [[ ! -x $build/bench/${name}_gpu_bench ]]; then
    echo "bench/run_gpu.sh: $build/bench/${name}_gpu_bench is not there; build first, with nvcc:" \
      "cmake -S . -B $build && cmake --build $build" >&2
    exit 1
  fi
done
"$build/bench/gemm_gpu_bench" --json "$results/gpu_gemm.json"
"$build/bench/router_gpu_bench" --json "$results/gpu_router.json"
# Names of machines and paths say nothing to a reader.
"$build/bench/layer_gpu_bench" --benchmark_format=json 2>/dev/null |
  sed -e '/"host_name":/d' -e '/"executable":/d' -e '/"load_avg":/d' >"$results/gpu_layer.json"
