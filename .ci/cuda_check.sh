#!/usr/bin/env bash
# Builds the extension with nvcc against a CUDA build of torch, loads it, and reads the kernels' registers and spills.
# No GPU is needed. Usage: .ci/cuda_check.sh DIRECTORY   (a virtual environment is made there, several GB; kept if
# it already holds one). Skipped where there is no nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?usage: .ci/cuda_check.sh DIRECTORY}

if ! command -v nvcc >/dev/null; then
  echo "CUDA build check: SKIPPED (no nvcc on this machine)"
  exit 0
fi

mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
python="$directory/bin/python"
if ! "$python" -c 'import torch; assert torch.version.cuda' 2>/dev/null; then
  # the oldest that is supported: what its headers and libraries have, later ones have too
  "${PYTHON:-python3}" -m venv "$directory"
  "$python" -m pip install --quiet --disable-pip-version-check \
    torch==2.11.0 "ninja" "setuptools>=77" "pybind11>=2.12" packaging numpy
fi

# nvcc may be a wrapper, so it is asked where it lives. Headers and libraries that a bare nvcc lacks come with torch;
# those wheels hold no unversioned libcudart.so to link with.
CUDA_HOME=$(nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
CUDA_HOME=$(cd "$CUDA_HOME" && pwd)
wheels=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
mkdir -p "$directory/link"
ln -sf "$wheels"/lib/libcudart.so.13 "$directory/link/libcudart.so"
export CUDA_HOME
export CPATH="$wheels/include${CPATH:+:$CPATH}"
export LIBRARY_PATH="$directory/link:$wheels/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
export LD_LIBRARY_PATH="$wheels/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export W2S_FAST_BUILD=require TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0a;10.0}"

# A copy, so that the extension built for the CPU build of torch stays in place.
source="$directory/source"
rm -rf "$source"
mkdir -p "$source"
tar --exclude='*.so' --exclude='__pycache__' -cf - setup.py pyproject.toml csrc kernels bench w2s_fast | tar -xf - -C "$source"
for extra in README.md LICENSE; do if [ -e "$extra" ]; then cp "$extra" "$source"; fi; done
report=$(pwd)/tests/cuda/resources.py
golden=$(pwd)/tests/golden/cuda_resources.csv
cd "$source"
log="$directory/build.log"
"$python" setup.py build_ext --inplace >"$log" 2>&1 || { grep -m 20 -iE 'error|FAILED' "$log"; tail -n 40 "$log"; exit 1; }
"$python" - <<'PY'
import torch
import w2s_fast

assert w2s_fast.extension.ERROR is None, w2s_fast.extension.ERROR
for name in ("w2s_fast::dynamic_sample_cuda", "w2s_fast::sparse_lowrank_decode_cuda"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{name} has no CUDA kernel"
    print(f"{name}: CUDA kernel registered (torch {torch.__version__})")
PY
"$python" "$report" "$(echo w2s_fast/_ops*.so)" "$golden"
echo "CUDA build check: passed"
