#!/bin/sh
# SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
# SPDX-License-Identifier: Apache-2.0
#
# parity.sh PYTHON DRIVER: runs parity.py with the interpreter in the environment variable TESSERA_PARITY_PYTHON, or
# with PYTHON. Exit status 77: skipped, the reason is printed.

set -eu
python="${TESSERA_PARITY_PYTHON:-$1}"
if ! command -v "$python" >/dev/null 2>&1; then
  echo "skipped: there is no interpreter '$python' (set TESSERA_PARITY_PYTHON to one with torch)"
  exit 77
fi
exec "$python" -B "$(dirname "$0")/parity.py" "$2"
