#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Checks train_lm as a user runs it: program.sh CASE PROGRAM FOLDER [MPIEXEC NUMPROC_FLAG]

set -euo pipefail

case_name=$1
program=$2
folder=$3/$1
mpiexec=${4:-}
numproc_flag=${5:-}

rm -rf "$folder"
mkdir -p "$folder/text"

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# Text that every machine has: this repository's own files beside the program's sources.
cp "$(dirname "$0")"/../*.[ch]pp "$folder/text/"

# A model so small that a run takes a second.
small=(--data "$folder/text" --hidden 32 --intermediate 16 --experts 32 --top-k 4 --seq-len 16 --batch 12
  --steps 6 --sample 20 --quiet --no-plots --no-baselines)

# train OUTPUT ARGUMENTS...: a run that must succeed.
train() {
  local output=$1
  shift
  "$program" "${small[@]}" --output "$folder/$output" "$@" >"$folder/$output.log" 2>&1 ||
    fail "train_lm $* ended with $?: $(cat "$folder/$output.log")"
}

# What may not depend on the number of ranks: everything but the speed (column 8).
losses() { cut -d, -f1-7,9- "$folder/$1/metrics.csv"; }

same() {
  diff <(losses "$1") <(losses "$2") >"$folder/difference" || fail "$1 and $2 differ: $(cat "$folder/difference")"
  cmp "$folder/$1/load.csv" "$folder/$2/load.csv" || fail "the loads of $1 and $2 differ"
  cmp "$folder/$1/sample.txt" "$folder/$2/sample.txt" || fail "the samples of $1 and $2 differ"
}

# expect_error TEXT COMMAND...: exit code 1, and the text in the message.
expect_error() {
  local text=$1 code=0
  shift
  "$@" >"$folder/error.log" 2>&1 || code=$?
  [[ $code == 1 ]] || fail "'$*' ended with $code, 1 was expected: $(cat "$folder/error.log")"
  grep -qF -- "$text" "$folder/error.log" || fail "'$*' does not say '$text': $(cat "$folder/error.log")"
}

case $case_name in
  help)
    "$program" --help >"$folder/help.txt"
    for word in --ranks --balance --combine --data --seed --steps Ctrl-C mpirun; do
      grep -qF -- "$word" "$folder/help.txt" || fail "--help does not mention $word"
    done
    ;;

  ranks) # the same bits for every number of ranks, whatever balances the load
    for balance in none loss bias; do
      for ranks in 1 2 3 4; do train "$balance$ranks" --balance "$balance" --ranks "$ranks" --eval-every 3; done
      for ranks in 2 3 4; do same "${balance}1" "$balance$ranks"; done
    done
    train uneven --balance bias --ranks 5 --eval-every 3 # 12 chunks over 5 ranks
    same bias1 uneven
    train other --balance bias --ranks 1 --eval-every 3 --seed 2
    if diff <(losses bias1) <(losses other) >/dev/null; then fail "another seed gives the same run"; fi
    ;;

  outputs) # all files of a comparison, drawn where gnuplot is installed
    train all --balance none loss bias --ranks 2 --sample 40
    for balance in none loss bias; do
      for file in metrics.csv load.csv sample.txt; do
        [[ -s $folder/all/$balance/$file ]] || fail "$balance/$file is missing"
      done
      [[ $(wc -l <"$folder/all/$balance/metrics.csv") == 7 ]] || fail "$balance/metrics.csv does not hold 6 steps"
    done
    grep -q "balance   validation bpb" "$folder/all/summary.txt" || fail "the summary has no table"
    if command -v gnuplot >/dev/null; then
      "$program" --data "$folder/text" --hidden 32 --seq-len 16 --batch 12 --steps 6 --ranks 2 --sample 0 --quiet \
        --balance none bias --output "$folder/drawn" >"$folder/drawn.log" 2>&1 || fail "$(cat "$folder/drawn.log")"
      for file in comparison.svg none/loss.svg none/load.svg bias/loss.svg bias/load.svg; do
        grep -q "</svg>" "$folder/drawn/$file" || fail "$file is missing or incomplete: $(cat "$folder/drawn.log")"
      done
      grep -q "order-2 model" "$folder/drawn/summary.txt" || fail "the summary lacks the order-2 model"
    fi
    ;;

  combine) # reduced sums in another order: close to ordered, and run-to-run the same
    train ordered --ranks 3 --combine ordered
    train reduced --ranks 3 --combine reduced
    train again --ranks 3 --combine reduced
    same reduced again
    paste -d, <(cut -d, -f3 "$folder/ordered/metrics.csv") <(cut -d, -f3 "$folder/reduced/metrics.csv") |
      awk -F, 'NR > 1 && ($1 - $2 > 0.001 || $2 - $1 > 0.001) { exit 1 }' || fail "reduced is far from ordered"
    ;;

  stop) # Ctrl-C finishes the step, writes everything and exits with 130
    "$program" "${small[@]}" --steps 100000 --ranks 3 --output "$folder/stopped" >"$folder/stopped.log" 2>&1 &
    pid=$!
    sleep 2
    kill -INT "$pid"
    code=0
    wait "$pid" || code=$?
    [[ $code == 130 ]] || fail "stopped by SIGINT, it ended with $code: $(cat "$folder/stopped.log")"
    for file in metrics.csv load.csv sample.txt summary.txt; do
      [[ -s $folder/stopped/$file ]] || fail "$file was not written: $(cat "$folder/stopped.log")"
    done
    grep -q "stopped early" "$folder/stopped/summary.txt" || fail "the summary does not say that the run was stopped"
    ;;

  errors) # exit code 1 and a sentence with the values
    mkdir "$folder/empty"
    expect_error "there is no file or folder '/no/such/file'" "$program" --data /no/such/file
    expect_error "holds 0 bytes of text" "$program" --data "$folder/empty" --output "$folder/none"
    expect_error "--top-k 33 exceeds --experts 32" "$program" "${small[@]}" --top-k 33
    expect_error "--batch is 10" "$program" "${small[@]}" --batch 10
    expect_error "--ranks is 40" "$program" "${small[@]}" --ranks 40
    expect_error "--balance" "$program" "${small[@]}" --balance luck
    expect_error "cannot be made" "$program" "${small[@]}" --output /proc/nowhere
    expect_error "--no-such-option" "$program" --no-such-option
    [[ ! -e $folder/none ]] || fail "a run that cannot start has made its output folder"
    ;;

  mpi) # processes give the bits of threads
    train threads --ranks 2 --balance bias --eval-every 3
    for ranks in 1 2 3; do
      "$mpiexec" "$numproc_flag" "$ranks" "$program" "${small[@]}" --balance bias --eval-every 3 \
        --output "$folder/mpi$ranks" >"$folder/mpi$ranks.log" 2>&1 || fail "$(cat "$folder/mpi$ranks.log")"
      same threads "mpi$ranks"
    done
    ;;

  mpi_stop) # mpirun leaves its processes a second after Ctrl-C: enough for the numbers
    "$mpiexec" "$numproc_flag" 2 "$program" "${small[@]}" --steps 1000000 --output "$folder/stopped" \
      >"$folder/stopped.log" 2>&1 &
    pid=$!
    sleep 4
    kill -INT "$pid"
    code=0
    wait "$pid" || code=$?
    [[ $code != 0 ]] || fail "a stopped job ended with 0"
    for file in metrics.csv load.csv; do
      [[ -s $folder/stopped/$file ]] || fail "$file was not written: $(cat "$folder/stopped.log")"
    done
    ;;

  mpi_errors) # every rank reports and the job ends
    code=0
    "$mpiexec" "$numproc_flag" 2 "$program" "${small[@]}" --top-k 33 >"$folder/error.log" 2>&1 || code=$?
    [[ $code != 0 ]] || fail "a job with a mistake ended with 0"
    grep -qF -- "--top-k 33 exceeds --experts 32" "$folder/error.log" || fail "$(cat "$folder/error.log")"
    code=0
    "$mpiexec" "$numproc_flag" 2 "$program" "${small[@]}" --ranks 3 >"$folder/error.log" 2>&1 || code=$?
    [[ $code != 0 ]] || fail "a job with a mistake ended with 0"
    grep -qF -- "contradicts mpirun" "$folder/error.log" || fail "$(cat "$folder/error.log")"
    ;;

  *)
    fail "there is no case '$case_name'"
    ;;
esac
echo "passed: $case_name"
