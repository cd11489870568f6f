# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Compares what ranks hold of tensors under placements with torch.distributed.tensor: every element of every rank.

    dtensor.py build/tests/mesh/tessera_dtensor_driver

The reference splits a tensor of element numbers with the placements' own code, axis after axis from the left, and asks
for local shapes and global offsets. Needs torch with DTensor; no process group is made. Exit status: 0 all as expected,
1 a difference, 77 torch is missing or does not have the functions (the reason is printed).
"""

import subprocess
import sys

SKIPPED = 77

try:
    import torch
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as shape_and_offset
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard
    Shard._split_tensor, _StridedShard._split_tensor  # private, so they may move
except Exception as reason:  # a broken installation raises more than ImportError
    print(f"skipped: torch with DTensor is needed, importing it failed: {reason}")
    sys.exit(SKIPPED)


def numbers(text):
    return [int(word) for word in text.split(",")] if text else []


def placement(text):
    dim, pieces = (int(word) for word in text.split(":"))
    if dim < 0:
        return Replicate()
    return Shard(dim) if pieces == 1 else _StridedShard(dim, split_factor=pieces)


def main():
    lines = subprocess.run([sys.argv[1]], check=True, capture_output=True, text=True).stdout.splitlines()
    wrong = 0
    elements = 0
    for line in lines:
        sizes, shape, placements, coordinates, local_shape, held = line.split("|")
        sizes, shape, coordinates, local_shape, held = map(numbers, (sizes, shape, coordinates, local_shape, held))
        placements = [placement(text) for text in placements.split(",")]

        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for size, coordinate, one in zip(sizes, coordinates, placements):
            if not isinstance(one, Replicate):
                tensor = one._split_tensor(tensor, size, with_padding=False)[0][coordinate]
        expected_shape, offset = shape_and_offset(shape, sizes, coordinates, placements)
        first = 0
        for extent, index in zip(shape, offset):
            first = first * extent + index

        good = held == tensor.flatten().tolist() and local_shape == list(tensor.shape) == list(expected_shape)
        good = good and (not held or held[0] == first)
        elements += len(held)
        if not good:
            wrong += 1
            print(f"differs: {line}\n  torch has {list(tensor.shape)} at {offset}: {tensor.flatten().tolist()}")
    print(f"{len(lines)} local tensors, {elements} elements, {wrong} differ from torch {torch.__version__}")
    return 1 if wrong or not lines else 0


sys.exit(main())
