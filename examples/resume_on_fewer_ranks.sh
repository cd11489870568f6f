#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Elastic training to watch: train_lm on 4 ranks is killed with kill -9, goes on from its last checkpoint on 2 ranks with
# another split, is killed again, and ends on 3 ranks. Then the same run without a break, on 1 rank: every loss must
# have the same bits.
#
#   examples/resume_on_fewer_ranks.sh [options of train_lm]    for example: --data ~/texts --hidden 64
#
# Everything is written to build/resume. STEPS (default 120) and EVERY (10) say how long the run is and how often it
# saves. Builds train_lm first, unless TRAIN_LM names the program.

set -euo pipefail
export LC_ALL=C.UTF-8

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=${OUTPUT:-$root/build/resume}
steps=${STEPS:-120}
every=${EVERY:-10}
program=${TRAIN_LM:-}

say() { printf '\n== %s\n' "$*"; }

die() {
  printf 'examples/resume_on_fewer_ranks.sh: %s\n' "$*" >&2
  exit 1
}

if [[ -z $program ]]; then
  say "Building train_lm"
  build=$root/build/main_job
  cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DTESSERA_BUILD_TESTS=OFF -DTESSERA_BUILD_BENCHMARKS=OFF \
    -DTESSERA_BUILD_EXAMPLES=ON -DTESSERA_INSTALL=OFF -DTESSERA_CUDA=OFF "-DTESSERA_COMPONENTS=mpi;checkpoint"
  cmake --build "$build" --target train_lm --parallel "$(nproc)"
  program=$build/examples/train_lm/train_lm
  [[ -x $program ]] || die "train_lm was not built: examples/run.sh installs what is missing"
fi

rm -rf "$output"
mkdir -p "$output"
saved=$output/checkpoints
run=("$program" --steps "$steps" --no-baselines --no-plots --sample 0 "$@")
pid=
trap '[[ -z $pid ]] || kill -9 "$pid" 2>/dev/null || true' EXIT

newest() { cat "$saved/latest" 2>/dev/null || true; }

# Runs with a mesh until it has saved two checkpoints, then kills it while it trains on.
until_killed() {
  local mesh=$1 before count=0
  before=$(newest)
  "${run[@]}" --mesh "$mesh" --checkpoint "$saved" --checkpoint-every "$every" --resume --output "$output/elastic" &
  pid=$!
  while [[ $count -lt 2 ]]; do
    kill -0 "$pid" 2>/dev/null || die "the run ended before it could be killed: give it more STEPS than $steps"
    if [[ $(newest) != "$before" ]]; then
      before=$(newest)
      count=$((count + 1))
    fi
    sleep 0.02
  done
  kill -9 "$pid"
  wait "$pid" 2>/dev/null || true
  pid=
  say "Killed with kill -9. In $saved: $(cd "$saved" && echo *)"
}

say "4 ranks: parameters in 4 shards, experts over 2 x 2 ranks"
until_killed dp_shard=4,ep=2

say "2 ranks: each has the whole model (two replicas, no expert parallelism)"
until_killed dp_replicate=2,dp_shard=1,ep=1

say "3 ranks: experts and all else over 3 ranks, to the end"
"${run[@]}" --mesh dp_shard=3,ep=3 --checkpoint "$saved" --checkpoint-every "$every" --resume --output "$output/elastic"

say "The same run on 1 rank, in one piece"
"${run[@]}" --ranks 1 --output "$output/whole"

# Every column but the speed; the last one holds the loss with all its bits.
numbers() { cut -d, -f1-7,9- "$output/$1/metrics.csv"; }
if diff <(numbers whole) <(numbers elastic) >"$output/difference"; then
  say "All $steps steps are bitwise equal: loss, gradient norm, expert loads, validation"
else
  die "the runs differ, see $output/difference"
fi
