#!/usr/bin/env python3
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""The layer in PyTorch, on the shapes of layer_gpu_bench: softmax top-k, sort, gather, torch._grouped_mm, SwiGLU,
torch._grouped_mm, weighting, index_add. Prints TFLOPS (6 T K n d forward, 12 T K n d backward), eager and compiled.

    python3 bench/peers/torch_moe.py [--only NAME] [--no-compile] [--json FILE]
"""

import argparse
import json
import statistics

import torch

SHAPES = {  # T, d, n, E, K
    "7B_n256": (24576, 1536, 256, 128, 8),
    "30B_n256": (32768, 4096, 256, 256, 16),
    "30B_n512": (32768, 4096, 512, 128, 8),
    "30B_n1024": (32768, 4096, 1024, 64, 4),
    "120B_n1024": (32768, 4096, 1024, 128, 8),
    "Qwen3_30B_T8192": (8192, 2048, 768, 128, 8),
    "Qwen3_30B_T32768": (32768, 2048, 768, 128, 8),
    "Mixtral_T8192": (8192, 4096, 14336, 8, 2),
}


def layer(x, gate, up, down, top_k):
    logits = x.float() @ gate.t()
    weights, experts = torch.topk(torch.softmax(logits, dim=-1), top_k)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    order = torch.argsort(experts.flatten(), stable=True)
    offsets = torch.cumsum(torch.bincount(experts.flatten(), minlength=gate.shape[0]), 0).to(torch.int32)
    tokens = order // top_k
    h = torch._grouped_mm(x[tokens], up.transpose(1, 2), offs=offsets)
    g, u = h.chunk(2, dim=-1)
    y = torch._grouped_mm(torch.nn.functional.silu(g) * u, down.transpose(1, 2), offs=offsets)
    y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
    return torch.zeros_like(x).index_add(0, tokens, y)


def median_ms(call, repeats=15):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(name, compiled):
    T, d, n, E, K = SHAPES[name]
    make = lambda *size, scale=1.0: (torch.randn(*size, device="cuda") * scale)
    x = make(T, d).bfloat16().requires_grad_()
    gate = make(E, d, scale=d**-0.5).requires_grad_()
    up = make(E, 2 * n, d, scale=d**-0.5).bfloat16().requires_grad_()
    down = make(E, d, n, scale=n**-0.5).bfloat16().requires_grad_()
    dy = make(T, d).bfloat16()
    run = torch.compile(layer) if compiled else layer
    forward = median_ms(lambda: run(x, gate, up, down, K))

    def both():
        x.grad = gate.grad = up.grad = down.grad = None
        run(x, gate, up, down, K).backward(dy)

    backward = median_ms(both) - forward
    work = 6.0 * T * K * n * d
    return {
        "name": name,
        "compiled": compiled,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": work / forward * 1e-9,
        "backward_tflops": 2 * work / backward * 1e-9,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.capture_scalar_outputs = True
    results = []
    for name in SHAPES:
        if options.only not in name:
            continue
        for compiled in (False,) if options.no_compile else (False, True):
            try:
                results.append(measure(name, compiled))
            except torch.OutOfMemoryError as error:
                print(f"{name}: {error}")
                continue
            r = results[-1]
            kind = "compiled" if compiled else "eager"
            print(f"{name:20s} {kind:9s} {r['forward_tflops']:7.1f} {r['backward_tflops']:7.1f} TFLOPS", flush=True)
    if options.json:
        context = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "results": results}
        with open(options.json, "w") as file:
            json.dump(context, file, indent=1)


if __name__ == "__main__":
    main()
