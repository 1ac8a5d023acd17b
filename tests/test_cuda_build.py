"""The CUDA C++ kernels compile for Hopper and Blackwell with no spill, and the table of their registers is kept.

No GPU and no CUDA build of torch: nvcc compiles against the headers of whatever torch is here. `.ci/cuda_check.sh`
goes on to link and load them, and compares the same table.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
HEADERS = Path(torch.__file__).parent / "include"


def resources(source: Path, arch: str, target: Path) -> list[tuple[int, int, int]]:
    """(stack, spill stores, registers) of each kernel that ptxas reports."""
    done = subprocess.run(
        ["nvcc", "-c", "-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
         f"-I{ROOT / 'csrc'}", f"-I{HEADERS}", f"-I{HEADERS / 'torch' / 'csrc' / 'api' / 'include'}", "-Xptxas", "-v",
         f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(target)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    assert frames and len(frames) == len(registers), done.stderr
    return [(int(f), int(s), int(r)) for (f, s), r in zip(frames, registers, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
@pytest.mark.parametrize("arch", ["90a"])  # .ci/cuda_check.sh compiles the other targets
def test_no_spills(source, arch, tmp_path):
    for stack, spills, registers in resources(source, arch, tmp_path / "kernel.o"):
        assert stack == 0 and spills == 0
        assert registers <= 128, "a block of 512 threads has 128 registers a thread"


def test_golden_table_names_every_target():
    with open(ROOT / "tests" / "golden" / "cuda_resources.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    text = "\n".join(source.read_text() for source in SOURCES)
    kernels = set(re.findall(r"^__global__ [^;{]*?(\w+_kernel)\(", text, re.M))
    assert {row["kernel"] for row in table} == kernels
    assert {row["arch"] for row in table} >= {"sm_90a", "sm_100"}
    assert all(int(row["stack_bytes"]) == 0 for row in table)


def test_clusters_hold_a_row():
    """V = 151,936 fits a portable cluster of 8 with one expert, and one of 16 with four."""
    from w2s_fast.ops.logit_fusion.cluster import row_does_not_fit
    from w2s_fast.reference.logit_fusion.arguments import Solve

    def reason(width, experts, blocks, dtype=torch.float32, anti_dtype=None):
        t = torch.empty(1, width, dtype=dtype, device="meta")
        a = torch.empty(1, width, dtype=anti_dtype or dtype, device="meta")
        given = Solve(t, [t] * experts, [a], 2.0, 16, -1, 1e-4, 0, 0, None, False, None, width)
        return row_does_not_fit(given, blocks)

    assert reason(151936, 1, 8) is None and reason(151936, 4, 16) is None
    assert "holds" in reason(500_000, 1, 16) and "experts" in reason(100, 5, 16)
    assert "dtype" in reason(100, 1, 16, torch.float64) and "dtype" in reason(100, 1, 16, anti_dtype=torch.float16)
