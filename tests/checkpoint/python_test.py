#!/usr/bin/env python3
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and exports open with the Python package safetensors, and what it writes loads here.

Usage: python_test.py EXECUTABLE, the room test of checkpoint. Exit status 77: skipped, the reason is printed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

try:
    import numpy
    import safetensors
    from safetensors.numpy import load_file, save_file
except ImportError as error:
    print(f"skipped: python lacks a package ({error}); set TESSERA_PARITY_PYTHON to one with safetensors and numpy")
    sys.exit(77)


def run(executable: str, folder: pathlib.Path, case: str) -> None:
    environment = {**os.environ, "TESSERA_PYTHON_FOLDER": str(folder)}
    subprocess.run([executable, f"--test-case=python: {case}", "--no-skip=false"], env=environment, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run(sys.argv[1], folder, "a checkpoint to read")
        expected = numpy.arange(12, dtype=numpy.float32).reshape(4, 3)
        ids = numpy.array([1, -2, 3], dtype=numpy.int64)

        found = {}
        for path in sorted((folder / "run/step-3").glob("*.safetensors")):
            found.update(load_file(path))
            with safetensors.safe_open(path, framework="numpy") as file:
                assert file.metadata()["format"] == "tessera", file.metadata()
        manifest = json.loads((folder / "run/step-3/manifest.json").read_text(encoding="utf-8"))
        chunks = {t["name"]: t["chunks"] for t in manifest["tensors"]}
        whole = numpy.concatenate([found[c["entry"]] for c in chunks["w"]])
        assert whole.dtype == numpy.float32 and (whole == expected).all(), whole
        assert (found["ids"] == ids).all(), found["ids"]
        assert manifest["train_state"]["step"] == 3

        exported = load_file(folder / "export/model.safetensors")
        assert set(exported) == {"model.w.weight", "model.ids"}, exported.keys()
        assert (exported["model.w.weight"] == expected).all() and (exported["model.ids"] == ids).all()
        with safetensors.safe_open(folder / "export/model.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}

        (folder / "model").mkdir()
        values = numpy.arange(12, dtype=numpy.float32).reshape(3, 2, 2) + 0.5
        save_file({f"experts.{e}.w": values[e] for e in range(3)}, folder / "model/model.safetensors")
        run(sys.argv[1], folder, "a model to load")
    print("python reads what was written here, and the other way round")


if __name__ == "__main__":
    main()
