#!/usr/bin/env bash
# Our plugins in Avalanche's own strategies and benchmarks: an environment of its own, then tests/test_avalanche.py. Not a
# step of .ci/run: it installs half a gigabyte.
#   bash .ci/avalanche_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment (default: a temporary one)
# A package index's torchvision is built for CUDA and does not load beside a CPU build of torch; Avalanche wants its
# transforms alone, so there its operators are declared by name and nothing more.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-}
[ -n "$folder" ] || { folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; }
shift || true
export PIP_DISABLE_PIP_VERSION_CHECK=1
python=$folder/bin/python

if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$python" -m pip install --quiet "${TORCH:-torch==2.13.0}" numpy packaging "typer>=0.12" "rich>=13" "pytest>=8" \
    "setuptools>=77,<81" wheel ninja "triton>=3.6" "pybind11>=2.12" pillow
  "$python" -m pip install --quiet --no-deps "${TORCHVISION:-torchvision==0.28.0}" avalanche-lib==0.6.0
  "$python" - > "$folder/requirements.txt" <<'LIST'
from importlib.metadata import requires

from packaging.requirements import Requirement

left_out = {"torch", "torchvision"}
for one in map(Requirement, requires("avalanche-lib") or []):
    if one.name not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(one.name + ("[" + ",".join(one.extras) + "]" if one.extras else "") + str(one.specifier))
LIST
  "$python" -m pip install --quiet -r "$folder/requirements.txt"
  [ -f w2s_fast/_build.json ] || "$python" setup.py build_ext --inplace
  if ! "$python" -c "import torchvision" 2>/dev/null; then
    mkdir "$folder/stand-in"
    cat > "$folder/stand-in/sitecustomize.py" <<'NAMES'
import torch

_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms", "qroi_align", *(f"{a}{b}{c}" for a, c in (("", ""), ("_", "_backward")) for b in (
        "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"))):
    _operators.define(f"{_name}() -> ()")
NAMES
  fi
fi
PYTHONPATH=$PWD:$folder/stand-in OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q -p no:cacheprovider tests/test_avalanche.py "$@"
