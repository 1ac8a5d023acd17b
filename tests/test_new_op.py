"""The skeleton of a new op works before anything is changed: its samples agree with the reference, forward and back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from w2s_fast.testing.new_op import LAYERS, ROOT, write

RUN = """
import torch, w2s_fast
from w2s_fast.testing.compare import compare
from w2s_fast.testing.samples import all_samples
found = [s for s in all_samples() if s.op == "row_scale"]
assert len(found) == 13 and w2s_fast.__file__.startswith(ROOT)
for sample in found:
    for dtype in sample.dtypes:
        compare(sample, "reference", dtype)
from w2s_fast.bench import domain, harness
call = domain.domains()["row_scale"].draw(__import__("random").Random(1), 1)
case = call.case()
inputs = case.inputs(torch.Generator().manual_seed(1), torch.device("cpu"))
for way in call.ways().values():
    assert case.error(way(*inputs), harness.answer(case.reference, inputs)) <= 1.0
from w2s_fast.bench.case import load
names = [case.name for case in load("cpu", ops=["row_scale"], full=True)]
assert names == ["R1024-D4096-fp32", "R1024-D4096-fp32-fwdbwd"]
op = w2s_fast.library.OPS["row_scale"]
assert op.schema == "(Tensor x, Tensor scale) -> Tensor"
assert op.triton.why_not((torch.ones(1, 1), torch.ones(1))) is None
print("fine")
"""


@pytest.fixture
def tree(tmp_path):
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a source tree")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for folder in ("w2s_fast", "kernels", "bench", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def test_the_skeleton_works(tree: Path):
    made = write(tree, "diffusion", "row_scale")
    assert len(made) == len(LAYERS) + 2
    with pytest.raises(FileExistsError):
        write(tree, "diffusion", "row_scale")
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    code = RUN.replace("ROOT", repr(str(tree)))
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tree, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.strip() == "fine", run.stderr[-2000:]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_cpp_skeleton_compiles(tree: Path):
    write(tree, "diffusion", "row_scale")
    flags = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Icsrc"]
    host = [f"-isystem{Path(torch.__file__).parent / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for source, options in (("row_scale_kernel.cpp", ["-DW2S_COPY=64"]), ("row_scale.cpp", host)):
        command = ["c++", *flags, *options, f"csrc/cpu/diffusion/{source}"]
        run = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert run.returncode == 0 and "warning" not in run.stderr, run.stderr[-2000:]


def test_a_new_family_gets_its_folders(tree: Path):
    made = {str(path.relative_to(tree)) for path in write(tree, "brand_new", "first")}
    assert {"w2s_fast/reference/brand_new/__init__.py", "w2s_fast/ops/brand_new/first.py"} <= made
    assert {"csrc/cpu/brand_new/first_kernel.cpp", "bench/domains/brand_new.py"} <= made
    compile((tree / "bench" / "domains" / "brand_new.py").read_text(), "brand_new.py", "exec")
    assert "from .ops.brand_new.first import first" in (tree / "w2s_fast" / "__init__.py").read_text()
