"""Registers and stack of the CUDA kernels in a built extension, against tests/golden/cuda_resources.csv.

    python tests/cuda/resources.py w2s_fast/_ops.abi3.so tests/golden/cuda_resources.csv [--update]

A stack frame means spilled registers or an array in local memory: either fails, and so does a table that changed.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

Row = tuple[str, str, int, int, int]
HEADER = ("arch", "kernel", "registers", "stack_bytes", "static_shared_bytes")


def cuobjdump() -> str:
    """The tool of the toolkit, or the one that comes with Triton."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(place) for place in places if place.exists()), shutil.which("cuobjdump"))
    if found is None:
        sys.exit("resources.py: no cuobjdump in CUDA_HOME/bin or in triton")
    return found


def kernel_name(mangled: str) -> str:
    """The last identifier of a mangled nested name, without the file's hash."""
    names, rest = [], mangled.removeprefix("_ZN")
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        start = match.end()
        names.append(rest[start : start + length])
        rest = rest[start + length :]
    return names[-1] if names else mangled


def rows(text: str) -> list[Row]:
    """(arch, kernel, registers, stack, static shared) of each function that cuobjdump lists."""
    found, arch, name = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = kernel_name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append((arch, name, registers, stack + local, shared))
    return sorted(found)


def main(library: str, golden: str, update: bool = False) -> None:
    dump = subprocess.run([cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    table = rows(dump.stdout)
    for row in (HEADER, *table):
        print("  ".join(f"{value!s:<24}" for value in row).rstrip())
    if not table:
        sys.exit("resources.py: no CUDA kernel in the extension")
    if spilled := [row for row in table if row[3]]:
        sys.exit(f"resources.py: spills or local arrays in {spilled}")
    if update:
        with open(golden, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *table])
        return
    with open(golden, newline="", encoding="utf-8") as file:
        expected = sorted((a, k, int(r), int(s), int(m)) for a, k, r, s, m in list(csv.reader(file))[1:])
    if changed := sorted(set(table) ^ set(expected)):
        sys.exit(f"resources.py: differs from {golden} (--update writes it): {changed}")


if __name__ == "__main__":
    main(*[a for a in sys.argv[1:] if a != "--update"], update="--update" in sys.argv)
