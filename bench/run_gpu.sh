#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Runs the GPU benchmarks of a build on one GPU, writes their raw JSON and prints the tables of bench/README.md.
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
for name in gemm router layer; do
  echo "== $name" >&2
  # Names of machines and paths say nothing to a reader.
  "$build/bench/${name}_gpu_bench" --benchmark_format=json 2>/dev/null |
    sed -e '/"host_name":/d' -e '/"executable":/d' -e '/"load_avg":/d' >"$results/gpu_$name.json"
done
python3 bench/table.py "$results"/gpu_{gemm,router,layer}.json
# Between 2 and 4 GPUs, where NCCL was found and there are as many. NVLink multicast is not used and stays off.
for ranks in 2 4; do
  for name in ranks overlap; do
    if [[ -x $build/bench/${name}_gpu_bench && $(nvidia-smi --list-gpus | wc -l) -ge $ranks ]]; then
      echo "== $name, $ranks GPUs" >&2
      CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((ranks - 1))) NCCL_NVLS_ENABLE=0 \
        "$build/bench/${name}_gpu_bench" --benchmark_format=json 2>/dev/null |
        sed -e '/"host_name":/d' -e '/"executable":/d' -e '/"load_avg":/d' >"$results/gpu_${name}_$ranks.json"
      python3 bench/table.py "$results/gpu_${name}_$ranks.json"
    fi
  done
done
