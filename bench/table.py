#!/usr/bin/env python3
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Prints Google Benchmark's JSON files as Markdown tables. Usage: bench/table.py FILE[.json]..."""

import json
import sys

SCALE = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}


def print_gpu(path: str, cases: list) -> None:
    """Cases timed by events, which count TFLOPS, or bytes as a share of a copy's. A label is the kernel of a case."""
    columns = [
        ("µs", lambda case: f"{case['us']:.0f}" if case["us"] >= 1000 else f"{case['us']:.1f}"),
        ("alone", lambda case: f"{case['alone_us']:.1f}" if "alone_us" in case else ""),
        ("TFLOPS", lambda case: f"{case['tflops']:.0f}" if "tflops" in case else ""),
        ("of dense cuBLAS", lambda case: f"{case['of_dense']:.2f}" if "of_dense" in case else ""),
        ("GB/s", lambda case: f"{case['gb_per_s']:.0f}" if "gb_per_s" in case else ""),
        ("wire GB/s", lambda case: f"{case['wire_gb_per_s']:.0f}" if "wire_gb_per_s" in case else ""),
        ("of a copy", lambda case: f"{case['share_of_copy']:.2f}" if "share_of_copy" in case else ""),
        ("kernel", lambda case: case.get("label", "")),
    ]
    cases = [case for case in cases if not case.get("error_occurred")]
    columns = [(title, text) for title, text in columns if any(text(case) for case in cases)]
    print(f"\n`{path}`\n\n| case | {' | '.join(title for title, _ in columns)} |\n|{'---|' * (len(columns) + 1)}")
    for case in cases:
        name = case["name"].split("/iterations:")[0]
        print(f"| `{name}` | {' | '.join(text(case) for _, text in columns)} |")


def main() -> None:
    for path in sys.argv[1:]:
        if not path.endswith(".json"):
            path += ".json"
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        if "dense_8192_tflops" in report["context"]:
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
