#!/usr/bin/env bash
# Our plugins in Avalanche's own strategies and benchmarks: an environment of its own, then tests/test_avalanche.py. Not a
# step of .ci/run: it installs half a gigabyte.
#   bash .ci/avalanche_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment (default: a temporary one)
# A package index's torchvision is built for CUDA and does not load beside a CPU build of torch; Avalanche wants its
# transforms alone, so there its operators are declared by name and nothing more.
. "$(dirname "$0")/beside.sh"

if [ ! -x "$python" ]; then
  beside avalanche-lib "torch torchvision" "${TORCHVISION:-torchvision==0.28.0}" pillow avalanche-lib==0.6.0
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
PYTHONPATH=$PWD:$folder/stand-in "$python" -m pytest -q -p no:cacheprovider tests/test_avalanche.py "$@"
