#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Builds Tessera and passes every test that this machine can run, from a fresh Debian or Ubuntu with nothing but a C++
# compiler and, if there is one, the CUDA toolkit. Tests that cannot run here are skipped, each with its reason.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tests/run.sh [options]
  --quick           leave out the sanitizer builds
  --no-install      do not install packages; use what is there
  --build DIR       build folder (default: build)
  --jobs N          parallel jobs (default: number of processors)
  --help            this text
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=build
jobs=$(nproc)
sanitizers=1
install=1
while (($# > 0)); do
  case $1 in
    --quick) sanitizers=0 ;;
    --no-install) install=0 ;;
    --build | --jobs)
      if (($# < 2)); then
        echo "tests/run.sh: $1 needs a value" >&2
        exit 2
      fi
      if [[ $1 == --build ]]; then build=$2; else jobs=$2; fi
      shift
      ;;
    --help)
      usage
      exit 0
      ;;
    *)
      echo "tests/run.sh: there is no option '$1'" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then
  echo "tests/run.sh: --jobs needs a positive number, not '$jobs'" >&2
  exit 2
fi

build=$(realpath -m "$build")

start=$SECONDS
step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - start)); }

# --- Packages ---------------------------------------------------------------------------------------------------------
required=(build-essential cmake ninja-build doctest-dev libbenchmark-dev)
optional=(libopenmpi-dev openmpi-bin libopenblas-dev libcli11-dev nlohmann-json3-dev libxxhash-dev clang gnuplot-nox xz-utils doxygen doxygen-awesome-css
  clang-format-14 shellcheck pkg-config)

installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed$'; }
missing() {
  local package
  for package in "$@"; do installed "$package" || printf '%s ' "$package"; done
}

install_packages() {
  local needed wanted sudo=()
  read -ra needed <<<"$(missing "${required[@]}")"
  read -ra wanted <<<"$(missing "${optional[@]}")"
  if ((${#needed[@]} + ${#wanted[@]} == 0)); then return 0; fi
  step "Installing ${needed[*]-} ${wanted[*]-}"
  if ((EUID != 0)); then sudo=(sudo); fi
  export DEBIAN_FRONTEND=noninteractive
  if ! "${sudo[@]}" apt-get update -qq; then
    echo "The package lists could not be fetched; going on with those of before." >&2
  fi
  if ((${#needed[@]} > 0)) && ! "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${needed[@]}"; then
    echo "These packages are needed and could not be installed: ${needed[*]}" >&2
    echo "Without a network, install them by hand and run this again, or use --no-install." >&2
    exit 1
  fi
  # Nothing stands or falls with one of these: what lacks it is skipped and says so.
  local package
  if ((${#wanted[@]} > 0)) && ! "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${wanted[@]}"; then
    for package in "${wanted[@]}"; do
      "${sudo[@]}" apt-get install -y -qq --no-install-recommends "$package" ||
        echo "Going on without $package." >&2
    done
  fi
}

if ((install)); then
  if command -v apt-get >/dev/null; then
    install_packages
  else
    echo "This is no Debian or Ubuntu: going on with the tools that are there." >&2
  fi
fi

# The toolkit's own place, where it is not on the path.
if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
  export PATH=$PATH:/usr/local/cuda/bin
fi

# --- Build and test ---------------------------------------------------------------------------------------------------
passed=0
failed=0
skipped=0
broken=()
launcher=()

# run_tests <folder> <title>: runs CTest there, adds to the counts and prints why tests were skipped.
run_tests() {
  local folder=$1 title=$2 junit total off absent bad
  step "$title: tests"
  junit=$folder/junit.xml
  rm -f "$junit"
  "${launcher[@]}" ctest --test-dir "$folder" --output-on-failure -j "$jobs" --output-junit "$junit" || broken+=("$title")
  if [[ ! -e $junit ]]; then
    failed=$((failed + 1))
    return
  fi
  # A test whose program was not built counts as failed; JUnit files call it skipped.
  total=$(grep -c '<testcase ' "$junit" || true)
  off=$(grep -c '<skipped message="SKIP_' "$junit" || true)
  absent=$(grep -c '<skipped message="[^S]' "$junit" || true)
  bad=$(($(sed -n 's/^[[:space:]]*failures="\([0-9]*\)".*/\1/p' "$junit" | head -n 1) + absent))
  if ((total == 0)); then
    echo "No test was found in $folder." >&2
    broken+=("$title")
  fi
  passed=$((passed + total - bad - off))
  failed=$((failed + bad))
  skipped=$((skipped + off))
  if ((off > 0)); then
    echo
    echo "Skipped:"
    awk '/<testcase /{ if (match($0, /name="[^"]*"/)) name = substr($0, RSTART + 6, RLENGTH - 7) }
         match($0, /skipped: .*/) && !(name in seen) {
           reason = substr($0, RSTART + 9); sub(/<.*/, "", reason); seen[name] = 1
           printf "  %s: %s\n", name, reason
         }' "$junit"
  fi
}

# build_and_test <folder> <title> <cmake arguments>...
build_and_test() {
  local folder=$1 title=$2 generator=() keep_going=(-k)
  shift 2
  step "$title: configuring and building in $folder"
  if [[ ! -e $folder/CMakeCache.txt ]] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  # What could be built is tested all the same, so that one report shows everything.
  if cmake -S . -B "$folder" "${generator[@]}" "$@"; then
    if grep -q '^CMAKE_GENERATOR:INTERNAL=Ninja' "$folder/CMakeCache.txt"; then keep_going=(-k 0); fi
    cmake --build "$folder" --parallel "$jobs" -- "${keep_going[@]}" || broken+=("$title: build")
  else
    broken+=("$title: configure")
  fi
  run_tests "$folder" "$title"
}

build_and_test "$build" "Release" -DTESSERA_WERROR=ON

if ((sanitizers)); then
  export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1}
  export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
  export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1}
  common=(-DCMAKE_BUILD_TYPE=Sanitize "-DCMAKE_CXX_FLAGS_SANITIZE=-Og" -DTESSERA_CUDA=OFF -DTESSERA_BUILD_BENCHMARKS=OFF
    -DTESSERA_BUILD_EXAMPLES=OFF -DTESSERA_INSTALL=OFF)
  build_and_test "$build/address" "Address and undefined behaviour sanitizers" "${common[@]}" \
    -DTESSERA_SANITIZE=address,undefined
  # Kernels that scatter addresses widely leave no room for the thread sanitizer's own.
  if setarch "$(uname -m)" --addr-no-randomize true 2>/dev/null; then
    launcher=(setarch "$(uname -m)" --addr-no-randomize)
  fi
  build_and_test "$build/thread" "Thread sanitizer" "${common[@]}" -DTESSERA_SANITIZE=thread
fi

# --- Summary ----------------------------------------------------------------------------------------------------------
elapsed=$((SECONDS - start))
printf '\n'
if ((${#broken[@]} > 0)); then printf 'Not clean: %s\n' "${broken[@]}"; fi
printf 'Done in %d min %02d s.\n' $((elapsed / 60)) $((elapsed % 60))
printf 'tests: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
((failed == 0 && ${#broken[@]} == 0))
