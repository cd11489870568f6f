#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# The main job, in one command from a fresh Debian machine: installs what is missing, builds examples/train_lm, trains
# the same model with no balancing, with a loss and with a bias, and draws them side by side.
#
#   examples/run.sh [options of train_lm]      for example: examples/run.sh --data ~/texts --ranks 4
#
# Everything is written to build/train_lm. Runs without root where all packages are installed.

set -euo pipefail
export LC_ALL=C.UTF-8

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/main_job
output=$root/build/train_lm

say() { printf '\n== %s\n' "$*"; }

die() {
  printf 'examples/run.sh: %s\n' "$*" >&2
  exit 1
}

# --- Set-up ----------------------------------------------------------------------------------------------------------

install_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^.i' || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  local as_root=()
  if [[ $EUID -ne 0 ]]; then
    command -v sudo >/dev/null || die "packages are missing and there is no sudo: as root, apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "Installing ${missing[*]}"
  "${as_root[@]}" apt-get update -q ||
    echo "The package lists could not be renewed (no network?); trying with those that are here." >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" ||
    die "apt-get could not install ${missing[*]}: without a network, install them beforehand"
}

if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
  packages=(cmake make libcli11-dev nlohmann-json3-dev libxxhash-dev gnuplot-nox xz-utils)
  command -v c++ >/dev/null || packages+=(g++)
  install_packages "${packages[@]}"
else
  echo "This is no Debian: cmake, make, CLI11, gnuplot and xz are expected to be installed." >&2
fi

say "Building train_lm"
# The host half alone: neither nvcc nor the tests are needed. MPI is used where it is installed; checkpoints need
# nlohmann/json and xxHash.
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DTESSERA_BUILD_TESTS=OFF -DTESSERA_BUILD_BENCHMARKS=OFF \
  -DTESSERA_BUILD_EXAMPLES=ON -DTESSERA_INSTALL=OFF -DTESSERA_CUDA=OFF "-DTESSERA_COMPONENTS=mpi;checkpoint"
cmake --build "$build" --target train_lm --parallel "$(nproc)"
program=$build/examples/train_lm/train_lm
[[ -x $program ]] || die "train_lm was not built: CMake's output above says what is missing"

# --- The job ---------------------------------------------------------------------------------------------------------

say "Training"
start=$SECONDS
code=0
"$program" --balance none loss bias --eval-every 140 --output "$output" "$@" || code=$?
if [[ $code -ne 0 ]]; then
  [[ $code -eq 130 ]] && echo "Stopped; what was finished is in $output."
  exit "$code"
fi

printf '\nIn the output folder (%s, unless --output says otherwise):\n' "$output"
printf '  %-42s %s\n' \
  comparison.svg "load and loss of the three runs side by side" \
  "{none,loss,bias}/load.svg" "load of every expert over time" \
  "{none,loss,bias}/loss.svg" "loss over time beside the baselines" \
  "{none,loss,bias}/{metrics,load}.csv" "the numbers of every step" \
  "{none,loss,bias}/sample.txt" "generated text" \
  summary.txt "the table above"
printf '\nElapsed after set-up: %d s\n' $((SECONDS - start))
