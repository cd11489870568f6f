# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the chain of multi-token prediction with PyTorch's automatic differentiation on the CPU, in double.

The model is written with torch's own modules in the masked form that training codes use: ids and targets rolled by k,
invalid pairs (`positions[i + k] != positions[i] + k`) ignored by the cross entropy. Its block mixes rows of a document
by a masked average, as chain_case.hpp's does. Losses and gradients go to a file that the driver reads and compares.

    parity.py DRIVER

Exit status: 0 all equal, 1 a difference, 77 torch or numpy is missing (the reason is printed).
"""

import os
import subprocess
import sys
import tempfile

try:
    import numpy  # noqa: F401, what torch writes bytes with
    import torch
    from torch import nn
except Exception as reason:  # a broken installation raises more than ImportError
    print(f"skipped: torch and numpy are needed, importing them failed: {reason}")
    sys.exit(77)

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


class Depth(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.hnorm, self.enorm, self.shared_head_norm = (nn.RMSNorm(d, eps=1e-6) for _ in range(3))
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.mix = nn.Linear(d, d, bias=False)
        self.shift = nn.Parameter(torch.empty(d))

    def parameters_in_order(self):
        return [self.hnorm.weight, self.enorm.weight, self.shared_head_norm.weight, self.eh_proj.weight,
                self.mix.weight, self.shift]


def case(path, depths, d, vocabulary, sequences, embedding_first, seed):
    generator = torch.Generator().manual_seed(seed)
    embedding, head = nn.Embedding(vocabulary, d), nn.Linear(d, vocabulary, bias=False)
    layers = [Depth(d) for _ in range(depths)]
    parameters = [embedding.weight, head.weight] + [p for layer in layers for p in layer.parameters_in_order()]
    with torch.no_grad():
        for p in parameters:
            p.normal_(generator=generator).mul_(0.5)
            if p.ndim == 1:
                p.add_(1.0)
    lengths = [length for documents in sequences for length in documents]
    rows = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    document = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    targets = torch.roll(ids, -1)
    targets[::7] = -100
    hidden = torch.randn(rows, d, generator=generator, requires_grad=True)
    factors = [0.3 / depths / rows / (k + 1) for k in range(depths)]

    total, losses, h = torch.zeros(()), [], hidden
    for k, layer in enumerate(layers, start=1):
        shifted = torch.roll(ids, -k)
        valid = (torch.roll(positions, -k) == positions + k) & (torch.arange(rows) + k < rows)
        a, e = layer.hnorm(h), layer.enorm(embedding(shifted))
        u = layer.eh_proj(torch.cat([e, a] if embedding_first else [a, e], dim=-1))
        # Averages over the valid rows of the same document up to here; invalid rows are the last of theirs.
        mask = (document[:, None] == document[None, :]) & torch.tril(torch.ones(rows, rows, dtype=torch.bool))
        weights = mask.double() / mask.sum(-1, keepdim=True)
        h = u + torch.tanh(layer.mix(weights @ u) + 0.1 * positions[:, None] * layer.shift)
        wanted = torch.roll(targets, -k).masked_fill(~valid, -100)
        loss = nn.functional.cross_entropy(head(layer.shared_head_norm(h)), wanted, ignore_index=-100,
                                           reduction="sum")
        losses.append(loss.item())
        total = total + factors[k - 1] * loss
    total.backward()

    offsets = [0]
    for documents in sequences:
        offsets.append(offsets[-1] + sum(documents))
    integers = [[depths, d, vocabulary, rows, len(sequences), int(embedding_first)], ids, targets, positions, offsets]
    doubles = parameters + [hidden, torch.tensor(factors), torch.tensor(losses)] + [p.grad for p in parameters]
    with open(path, "wb") as file:
        for values in integers:
            file.write(torch.as_tensor(values).to(torch.int32).numpy().tobytes())
        for values in doubles + [hidden.grad]:
            file.write(values.detach().contiguous().numpy().tobytes())


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "case")
        for depths in (1, 2, 3):
            for embedding_first in (False, True):
                for seed, sequences in enumerate(([[40]], [[9, 1, 12], [17], [2, 3]])):
                    print(f"D = {depths}, {'embedding' if embedding_first else 'hidden'} first, {sequences}", flush=True)
                    case(path, depths, 16, 33, sequences, embedding_first, seed)
                    failed += subprocess.run([sys.argv[1], path]).returncode != 0
    print("equal" if failed == 0 else f"{failed} cases differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
