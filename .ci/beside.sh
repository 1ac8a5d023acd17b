# Sourced by checks of packages that do not fit into the environment of the tests: FOLDER is the first argument of the
# check, a temporary one without it; `beside` fills it, and $python is its interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-}
[ -n "$folder" ] || { folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; }
shift || true
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=$folder/bin/python

# beside NAME "LEFT OUT" PACKAGES...: torch and what our tests need; PACKAGES without what they ask for; then what NAME asks
# for, but for what is left out.
beside() {
  local name=$1 left_out=$2
  shift 2
  "${PYTHON:-python3}" -m venv "$folder"
  "$python" -m pip install --quiet "${TORCH:-torch==2.13.0}" numpy packaging "typer>=0.12" "rich>=13" "pytest>=8" \
    "setuptools>=77,<81" wheel ninja "triton>=3.6" "pybind11>=2.12"
  "$python" -m pip install --quiet --no-deps "$@"
  "$python" - "$name" "$left_out" > "$folder/requirements.txt" <<'LIST'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

name, left_out = sys.argv[1], sys.argv[2].split()
for one in map(Requirement, requires(name) or []):
    if one.name not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(one.name + ("[" + ",".join(one.extras) + "]" if one.extras else "") + str(one.specifier))
LIST
  "$python" -m pip install --quiet -r "$folder/requirements.txt"
  [ -f w2s_fast/_build.json ] || "$python" setup.py build_ext --inplace
}
