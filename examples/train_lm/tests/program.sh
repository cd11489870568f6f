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

# needs_checkpoints: ends the case as skipped where the program has none.
needs_checkpoints() {
  "$program" "${small[@]}" --steps 1 --checkpoint "$folder/probe" --output "$folder/probe" >"$folder/probe.log" 2>&1 ||
    true # what it says decides
  if grep -q "built without checkpoints" "$folder/probe.log"; then
    echo "skipped: $program was built without checkpoints"
    exit 77
  fi
  rm -rf "$folder/probe"
}

# Splits of ranks into copies, shards and expert parallelism.
meshes=("dp_shard=1" "dp_shard=4,ep=4" "dp_shard=2,ep=1" "dp_replicate=2,dp_shard=1" "dp_replicate=2,dp_shard=2,ep=2"
  "dp_shard=4,ep=2" "dp_shard=3")

case $case_name in
  help)
    "$program" --help >"$folder/help.txt"
    for word in --pipeline --mtp --ranks --balance --combine --data --seed --steps Ctrl-C mpirun; do
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

  mesh) # the same bits for every mesh: FSDP, HSDP, replicas, expert parallelism and their products
    for balance in none loss bias; do
      for mesh in "${meshes[@]}"; do train "$balance-$mesh" --balance "$balance" --mesh "$mesh" --eval-every 3; done
      for mesh in "${meshes[@]}"; do same "$balance-dp_shard=1" "$balance-$mesh"; done
    done
    train idle --balance bias --mesh dp_shard=14,ep=2 --eval-every 3 # 12 chunks over 14 ranks: some have none
    same bias-dp_shard=1 idle
    expect_error "dp_replicate" "$program" "${small[@]}" --ranks 4 --mesh dp_replicate=3
    expect_error "ep" "$program" "${small[@]}" --mesh dp_shard=4,ep=3
    expect_error "the axes are dp_replicate, dp_shard and ep" "$program" "${small[@]}" --ranks 2 --mesh tp=2
    ;;

  resume) # saved by one mesh and resumed by another, a run goes on as if nothing had happened
    needs_checkpoints
    goes_on() { # BALANCE FROM TO...
      local balance=$1 from=$2 to saved=$folder/saved-$1-$2
      train first --balance "$balance" --mesh "$from" --steps 8 --eval-every 3 --checkpoint "$saved" \
        --checkpoint-every 4
      rm -r "$saved/step-8" "$saved/latest" # as if the run had ended after step 4
      for to in "${@:3}"; do
        cp -r "$saved" "$folder/again"
        train second --balance "$balance" --mesh "$to" --steps 8 --eval-every 3 --checkpoint "$folder/again" --resume
        grep -q "step 4 of 8, saved by mesh .*$from" "$folder/second.log" || fail "$(cat "$folder/second.log")"
        same "whole-$balance" second
        rm -r "$folder/again"
      done
    }
    train whole-bias --balance bias --ranks 1 --steps 8 --eval-every 3
    goes_on bias dp_shard=1 dp_shard=2,ep=2 dp_replicate=2,dp_shard=2,ep=2 dp_shard=5
    goes_on bias dp_shard=3,ep=3 dp_shard=1 dp_shard=4,ep=2
    goes_on bias dp_replicate=2,dp_shard=2,ep=2 dp_shard=1 dp_shard=3,ep=3 dp_replicate=2,dp_shard=1
    goes_on bias dp_shard=4,ep=2 dp_shard=1 dp_shard=2,ep=1 dp_shard=4,ep=4
    train whole-loss --balance loss --ranks 1 --steps 8 --eval-every 3
    goes_on loss dp_shard=4,ep=2 dp_shard=3,ep=3
    saved=$folder/saved-bias-dp_shard=1
    expect_error "add --resume" "$program" "${small[@]}" --checkpoint "$saved"
    expect_error "--hidden 32, this run has 64" "$program" "${small[@]}" --hidden 64 --checkpoint "$saved" --resume
    expect_error "--balance bias, this run has none" "$program" "${small[@]}" --balance none --checkpoint "$saved" \
      --resume
    expect_error "--resume needs --checkpoint" "$program" "${small[@]}" --resume
    train new --checkpoint "$folder/nothing" --resume # a loop that restarts a job need not know whether it ever ran
    grep -q "starting anew" "$folder/new.log" || fail "$(cat "$folder/new.log")"
    train finished --checkpoint "$folder/nothing" --resume # nothing is left to train
    same new finished
    ;;

  kill) # kill -9 at any moment, five times over: the last run has the metrics of one that nobody killed
    needs_checkpoints
    run=("${small[@]}" --steps 300 --eval-every 70)
    "$program" "${run[@]}" --ranks 1 --output "$folder/whole" >"$folder/whole.log" 2>&1 || fail "the whole run"
    killed=0
    for mesh in dp_shard=4,ep=2 dp_shard=2,ep=2 dp_replicate=2,dp_shard=2,ep=1 dp_shard=3,ep=3 dp_replicate=3,dp_shard=1; do
      "$program" "${run[@]}" --mesh "$mesh" --checkpoint "$folder/saved" --checkpoint-every 5 --keep 2 --resume \
        --output "$folder/run" >"$folder/run.log" 2>&1 &
      pid=$!
      sleep "0.$((RANDOM % 5 + 2))$((RANDOM % 10))"
      kill -9 "$pid" 2>/dev/null && killed=$((killed + 1))
      wait "$pid" 2>/dev/null || true
    done
    "$program" "${run[@]}" --ranks 2 --checkpoint "$folder/saved" --checkpoint-every 5 --keep 2 --resume \
      --output "$folder/run" >"$folder/run.log" 2>&1 || fail "$(cat "$folder/run.log")"
    echo "killed $killed times; $(grep -h resumed "$folder/run.log" || true)"
    [[ $killed -gt 0 ]] || fail "no run was killed before its end"
    grep -q "resumed from" "$folder/run.log" || fail "nothing was resumed: $(cat "$folder/run.log")"
    same whole run
    left=$(ls "$folder/saved")
    [[ $(grep -c . <<<"$left") == 3 && $left == *latest*step-*step-300 ]] || fail "the folder holds $left"
    ;;

  pipeline) # the same bits for every schedule as without a pipeline, whatever balances the load
    stages=(--layers 4 --stages 4)
    for balance in none loss bias; do
      train "plain-$balance" --layers 4 --balance "$balance" --ranks 1 --eval-every 3
      for schedule in 1f1b zb1p dualpipe dualpipev; do
        train "$schedule-$balance" --pipeline "$schedule" "${stages[@]}" --balance "$balance" --eval-every 3
        same "plain-$balance" "$schedule-$balance"
      done
    done
    grep -q "DualPipe: 4 stages on 4 ranks, 12 micro-batches" "$folder/dualpipe-bias.log" ||
      fail "$(cat "$folder/dualpipe-bias.log")"
    # Two ranks for each place of the pipeline: other sums, the same bits for every schedule.
    train places --layers 4 --micro-batches 6 --ranks 2
    train places-v --pipeline dualpipev "${stages[@]}" --micro-batches 6 --ranks 4
    same places places-v
    expect_error "at least 2 * num_ranks" "$program" "${small[@]}" --pipeline dualpipe "${stages[@]}" --micro-batches 6
    expect_error "between 1 and --layers 2" "$program" "${small[@]}" --pipeline 1f1b --stages 3
    expect_error "must be a multiple of the 2 ranks" "$program" "${small[@]}" --pipeline 1f1b --stages 2 --ranks 3
    expect_error "there is no schedule 'gpipe'" "$program" "${small[@]}" --pipeline gpipe --stages 2
    ;;

  mtp) # further bytes: their loss and the fate of their drafts are told, the same under a pipeline
    train alone --layers 4 --mtp 2 --eval-every 3
    for column in mtp_loss_1 mtp_loss_2 draft_acceptance_1 draft_acceptance_2; do
      head -1 "$folder/alone/metrics.csv" | grep -q ",$column," || fail "metrics.csv has no $column"
    done
    grep -q "the same 384 bytes as without drafts" "$folder/alone/summary.txt" || fail "$(cat "$folder/alone.log")"
    for schedule in 1f1b dualpipe dualpipev; do
      train "$schedule" --layers 4 --mtp 2 --eval-every 3 --pipeline "$schedule" --stages 4
      same alone "$schedule"
    done
    train weights --layers 4 --mtp 2 --mtp-weight 0 --eval-every 3
    if diff <(losses alone) <(losses weights) >/dev/null; then fail "the weight of the further losses is not used"; fi
    expect_error "less than --seq-len" "$program" "${small[@]}" --mtp 16
    expect_error "always sums in order" "$program" "${small[@]}" --mtp 1 --combine reduced
    ;;

  mpi_pipeline) # processes give the bits of threads
    train threads --layers 2 --mtp 1 --pipeline 1f1b --stages 2
    "$mpiexec" "$numproc_flag" 2 "$program" "${small[@]}" --layers 2 --mtp 1 --pipeline 1f1b --stages 2 \
      --output "$folder/processes" >"$folder/processes.log" 2>&1 || fail "$(cat "$folder/processes.log")"
    same threads processes
    "$mpiexec" "$numproc_flag" 2 "$program" "${small[@]}" --layers 2 --mtp 1 --pipeline dualpipe --stages 2 \
      --output "$folder/both_ways" >"$folder/both_ways.log" 2>&1 || fail "$(cat "$folder/both_ways.log")"
    same threads both_ways
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

  stop_saved) # what Ctrl-C ends is saved where it stood
    needs_checkpoints
    "$program" "${small[@]}" --steps 100000 --ranks 2 --output "$folder/stopped" --checkpoint "$folder/saved" \
      --checkpoint-every 0 >"$folder/stopped.log" 2>&1 &
    pid=$!
    sleep 1
    kill -INT "$pid"
    code=0
    wait "$pid" || code=$?
    [[ $code == 130 ]] || fail "stopped by SIGINT, it ended with $code: $(cat "$folder/stopped.log")"
    steps=$(($(wc -l <"$folder/stopped/metrics.csv") - 1))
    [[ $(cat "$folder/saved/latest") == "step-$steps" ]] || fail "$steps steps, saved: $(ls "$folder/saved")"
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

  mpi_resume) # threads resume what processes have saved
    needs_checkpoints
    train threads --ranks 1 --steps 8
    "$mpiexec" "$numproc_flag" 4 "$program" "${small[@]}" --steps 8 --mesh dp_replicate=2,dp_shard=2,ep=2 \
      --output "$folder/mpi" --checkpoint "$folder/saved" --checkpoint-every 4 >"$folder/mpi.log" 2>&1 ||
      fail "$(cat "$folder/mpi.log")"
    same threads mpi
    rm -r "$folder/saved/step-8" "$folder/saved/latest"
    train second --ranks 3 --steps 8 --checkpoint "$folder/saved" --resume
    grep -q "step 4 of 8" "$folder/second.log" || fail "$(cat "$folder/second.log")"
    same threads second
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
