"""What a launch costs in the terms of a model: instructions of its loops and programs a multiprocessor can hold.

    python -m w2s_fast.testing.sass --module logit_fusion.sample [--arch 90]

Counted from compiled code, not measured: a loop's length is the number of machine instructions from its first to the
branch back, whatever path is taken inside. docs/gpu.md puts such figures together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import aot

_LABEL, _BRANCH = re.compile(r"^(\.L_x_\w+):"), re.compile(r"\bBRA(?:\.\S+)?(?: \S+,)? `\((\.L_x_\w+)\)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+")
#: Registers, shared memory and warps of one multiprocessor.
_FILE, _WARPS, _SHARED = 65536, 64, {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Cost(NamedTuple):
    """Of one launch: all instructions, the lengths of its loops, and programs that fit a multiprocessor at a time."""

    instructions: int
    loops: list[int]
    resident: int


def loops(text: str) -> tuple[int, list[int]]:
    """(instructions, lengths of loops) of the output of ``nvdisasm -c``."""
    count, at, found = 0, dict[str, int](), []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            at[label[1]] = count
        if not _INSTRUCTION.match(line):
            continue
        count += 1
        back = _BRANCH.search(line)
        if back and back[1] in at and count - at[back[1]] > 1:  # a branch to itself ends the code
            found.append(count - at[back[1]])
    return count, found


def resident(row: aot.Row) -> int:
    """Programs of a launch on one multiprocessor at a time, by registers, warps and shared memory."""
    registers = -(-row.registers // 8) * 8 * 32 * row.warps
    shared = _SHARED[row.arch] // (row.shared + 1024)
    return min(_FILE // registers, _WARPS // row.warps, shared, 32)


def cost(job: aot.Job, arch: int) -> tuple[aot.Row, Cost]:
    """Resources and cost of one launch."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    source, options = aot._bind(job.recorded, GPUTarget("cuda", arch, 32))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        dump = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    row = aot.compile_one(job, arch)
    return row, Cost(*loops(dump.stdout), resident(row))


def main() -> None:
    """Print a line a launch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--module", action="append", required=True)
    parser.add_argument("--arch", type=int, default=90)
    given = parser.parse_args()
    for job in aot.jobs(given.module):
        row, found = cost(job, given.arch)
        print(
            f"{row.module},{row.case},{row.kernel}: {row.warps} warps, {row.registers} registers, "
            f"{row.spills} spilled, {row.shared} B shared, {found.resident} programs an SM, "
            f"{found.instructions} instructions, loops {found.loops}",
            flush=True,
        )


if __name__ == "__main__":
    main()
