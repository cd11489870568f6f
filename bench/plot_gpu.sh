#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# Draws TFLOPS of the whole layer against expert granularity d / n from bench/results/gpu_layer.json into
# bench/results/gpu_layer.svg, and the bandwidth between GPUs against tokens and SMs from gpu_ranks_2.json and gpu_ranks_4.json
# into gpu_ranks.svg. Needs python3 and gnuplot.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/results"
python3 - <<'PYTHON' >gpu_layer.dat
import json

SIZES = {"7B_n256": (1536, 256, "7B"), "30B_n256": (4096, 256, "30B n256"), "30B_n512": (4096, 512, "30B n512"),
         "30B_n1024": (4096, 1024, "30B n1024"), "120B_n1024": (4096, 1024, "120B"),
         "Qwen3_30B_T8192": (2048, 768, "Qwen3 T8192"), "Qwen3_30B_T32768": (2048, 768, "Qwen3 T32768"),
         "Mixtral_T8192": (4096, 14336, "Mixtral")}
figures = {}
dense = 0.0
for case in json.load(open("gpu_layer.json"))["benchmarks"]:
    name, part = case["name"].split("/")[:2]
    figures.setdefault(name, {})[part] = case["tflops"]
    dense = case["tflops"] / case["of_dense"]
for name, (d, n, label) in sorted(SIZES.items(), key=lambda item: item[1][0] / item[1][1]):
    print(f'{d / n:.3f} {figures[name]["forward"]:.1f} {figures[name]["backward"]:.1f} "{label}" {dense:.1f}')
PYTHON
gnuplot <<'GNUPLOT'
set terminal svg size 760,420 font "sans,12" background "white"
set output "gpu_layer.svg"
set logscale x 2
set xrange [0.2:24]
set yrange [0:850]
set xlabel "expert granularity d / n"
set ylabel "TFLOPS"
set key bottom left
set grid
plot "gpu_layer.dat" using 1:5 with lines lc rgb "#888888" dt 2 title "dense cuBLAS 8192^3", \
     "" using 1:2 with points pt 7 ps 1 lc rgb "#1f77b4" title "forward", \
     "" using 1:3 with points pt 5 ps 1 lc rgb "#d62728" title "backward", \
     "" using 1:2:4 with labels right offset -1,0.4 font "sans,9" noenhanced notitle
GNUPLOT
rm gpu_layer.dat

# Blocks of a file are told apart by two empty lines.
python3 - <<'PYTHON' >gpu_ranks.dat
import json

OPERATIONS = ("dispatch", "combine_expert_rows", "combine_summed_rows")
for ranks in (2, 4):
    cases = [case["name"].split("/iterations:")[0].split("/") + [case["wire_gb_per_s"]]
             for case in json.load(open(f"gpu_ranks_{ranks}.json"))["benchmarks"] if "wire_gb_per_s" in case]
    for fields in (1, 2):  # against tokens, against SMs
        for operation in OPERATIONS:
            for name, *at, rate in cases:
                if name == operation and len(at) == fields:
                    print(at[-1].split(":")[1], rate)
            print("\n")
PYTHON
gnuplot <<'GNUPLOT'
set terminal svg size 900,380 font "sans,12" background "white"
set output "gpu_ranks.svg"
set multiplot layout 1,2
set grid
set yrange [0:400]
set ylabel "GB/s sent by a rank"
set key bottom right font "sans,10"
set logscale x 2
set xlabel "tokens of a rank (E 256, K 8, d 7168)"
set xrange [100:10000]
plot 370 with lines lc rgb "#888888" dt 2 title "what the link carries", \
     "gpu_ranks.dat" index 0 with linespoints pt 7 ps 0.7 lc rgb "#1f77b4" title "dispatch, 2 GPUs", \
     "" index 6 with linespoints pt 6 ps 0.7 lc rgb "#1f77b4" dt 3 title "4 GPUs", \
     "" index 1 with linespoints pt 5 ps 0.7 lc rgb "#d62728" title "combine from expert rows, 2 GPUs", \
     "" index 7 with linespoints pt 4 ps 0.7 lc rgb "#d62728" dt 3 title "4 GPUs", \
     "" index 2 with linespoints pt 9 ps 0.7 lc rgb "#2ca02c" title "combine from summed rows, 2 GPUs", \
     "" index 8 with linespoints pt 8 ps 0.7 lc rgb "#2ca02c" dt 3 title "4 GPUs"
unset logscale x
set xlabel "SMs, at 4096 tokens"
set xrange [0:136]
plot 370 with lines lc rgb "#888888" dt 2 notitle, \
     "gpu_ranks.dat" index 3 with linespoints pt 7 ps 0.7 lc rgb "#1f77b4" notitle, \
     "" index 9 with linespoints pt 6 ps 0.7 lc rgb "#1f77b4" dt 3 notitle, \
     "" index 4 with linespoints pt 5 ps 0.7 lc rgb "#d62728" notitle, \
     "" index 10 with linespoints pt 4 ps 0.7 lc rgb "#d62728" dt 3 notitle, \
     "" index 5 with linespoints pt 9 ps 0.7 lc rgb "#2ca02c" notitle, \
     "" index 11 with linespoints pt 8 ps 0.7 lc rgb "#2ca02c" dt 3 notitle
GNUPLOT
rm gpu_ranks.dat
