"""The C++ kernels under AddressSanitizer and UBSan: all samples, forward and backward, and 2,000 hostile calls.

    python .ci/sanitize.py            every instruction set that this machine has
    python .ci/sanitize.py --quick    the widest one, a third of the samples, 400 calls: a step of .ci/run

Builds into build/sanitize/<target>, apart from the extension in use, and compiles again what changed. Exits with the
number of reports and of calls that neither gave the reference's result nor one clear error. tests/test_layouts.py makes
the same calls without a sanitizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402  how the sources are compiled is stated there

# All checks of UBSan take as long to compile as the rest; the quick form has those of arithmetic and of arrays.
FULL = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
QUICK = ["-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fno-sanitize-recover=all"]
FLAGS = ["-g1", "-fno-omit-frame-pointer", "-w", "-Wno-psabi"]


def built(name: str, quick: bool) -> Path:
    """The library for one instruction set."""
    folder = ROOT / "build" / "sanitize" / (f"{name}-quick" if quick else name)
    sanitizers = QUICK if quick else FULL
    level = ["-O0" if quick else "-O1"]
    objects, _ = setup.compile_cpu(folder, setup.TARGETS[name], [*sanitizers, *FLAGS], level, level)
    library = folder / "_ops.so"
    if not library.exists() or any(o.stat().st_mtime > library.stat().st_mtime for o in objects):
        setup.link(objects, str(library), [*sanitizers, *setup.torch_libraries()])
    return library


def run(library: Path, *options: str) -> int:
    """The calls in a process that loads the sanitizer first."""
    preload = []
    for name in ("libasan.so", "libstdc++.so"):  # the second so that the first finds what throws exceptions
        find = [setup.compiler() or "c++", f"-print-file-name={name}"]
        preload.append(subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip())
    last = library.with_name("last.txt")
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "W2S_FAST_OPS": str(library),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "w2s_fast.testing.hostile", "--last", str(last), *options]
    found = subprocess.run(command, env=env, check=False).returncode
    if found:
        print(f"sanitize: exit {found} at {last.read_text(encoding='utf-8').strip()}", file=sys.stderr)
    return found


def main() -> int:
    """Build and run; how many runs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", choices=[name for name in setup.TARGETS if name != "all"], action="append")
    given = parser.parse_args()
    if shutil.which(setup.compiler() or "c++") is None:
        sys.exit("sanitize: no C++ compiler was found")
    found = setup.instruction_sets()
    options = ["--calls", "400", "--samples", "3"] if given.quick else ["--calls", "2000"]
    failed = 0
    for name in given.target or (found[:1] if given.quick else found):
        start = time.perf_counter()
        library = built(name, given.quick)
        print(f"sanitize: {name} built in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        failed += run(library, *options) != 0
        print(f"sanitize: {name} run in {time.perf_counter() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
