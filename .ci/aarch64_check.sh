#!/usr/bin/env bash
# The C++ kernels compiled for aarch64 (the portable vectors) and held to the samples under qemu's emulation of the plainest
# ARMv8 core. No torch for aarch64 is needed: the machine's own drives them. Not a step of .ci/run.
#   bash .ci/aarch64_check.sh [--op NAME ...] [--quick]
# Needs Debian's g++-aarch64-linux-gnu and qemu-user, and an environment with torch and the extension built (make install).
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" >/dev/null || { echo "aarch64 check: no $tool (apt install g++-aarch64-linux-gnu qemu-user)" >&2; exit 2; }
done
python=${PYTHON:-.venv/bin/python}
CXX=aarch64-linux-gnu-g++ PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$python" -W ignore .ci/aarch64_check.py "$@"
