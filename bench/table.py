#!/usr/bin/env python3
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Prints Google Benchmark's JSON files as Markdown tables. Usage: bench/table.py FILE[.json]..."""

import json
import sys

SCALE = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}


def print_gpu(path: str, cases: list) -> None:
    """Cases that count their own TFLOPS, timed by events."""
    print(f"\n`{path}`\n\n| case | µs | TFLOPS | of dense cuBLAS |\n|---|---|---|---|")
    for case in cases:
        name = case["name"].split("/iterations:")[0]
        print(f"| `{name}` | {case['us']:.0f} | {case['tflops']:.0f} | {case.get('of_dense', 0):.2f} |")


def main() -> None:
    for path in sys.argv[1:]:
        if not path.endswith(".json"):
            path += ".json"
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        if "benchmarks" in report and any("tflops" in case for case in report["benchmarks"]):
            print_gpu(path, report["benchmarks"])
            continue
        print(f"\n`{path}`\n\n| case | µs | GFLOP/s | GB/s | million tokens or rows/s |\n|---|---|---|---|---|")
        for case in report["benchmarks"]:
            if case.get("run_type") != "iteration" or case.get("error_occurred"):
                continue
            micros = case["real_time"] * SCALE[case["time_unit"]]
            flops = f"{case['flops'] / 1e9:.0f}" if "flops" in case else ""
            bytes_rate = case.get("bytes", case.get("bytes_per_second"))
            rate = f"{bytes_rate / 1e9:.1f}" if bytes_rate else ""
            items_rate = case.get("tokens", case.get("items_per_second", case.get("items")))
            items = f"{items_rate / 1e6:.2f}" if items_rate else ""
            name = case["name"].removesuffix("/manual_time")
            print(f"| `{name}` | {micros:.0f} | {flops} | {rate} | {items} |")


if __name__ == "__main__":
    main()
