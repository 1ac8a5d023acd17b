"""`make gpu-pack`: what it compiles, a process elsewhere finds without a compiler once the pack is settled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

_READ = """
from unittest import mock
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from w2s_fast.bench.gpu import pack
from w2s_fast.testing import aot
target = GPUTarget("cuda", 90, 32)
with mock.patch.object(CUDABackend, "add_stages", side_effect=AssertionError("compiled")):
    for launch in pack.launches(90, 3):
        source, options = aot._bind(launch, target)
        try:
            print(triton.compile(source, target=target, options=options).metadata.name)
        except AssertionError as error:
            print(error)
"""


def _run(code: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **changes}
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow(15)
def test_a_pack_serves_elsewhere(tmp_path: Path):
    made = _run(["-m", "w2s_fast.bench.gpu.pack", str(tmp_path / "made"), "--limit", "2"])
    assert made.returncode == 0, made.stderr[-2000:]
    about = json.loads((tmp_path / "made" / "pack.json").read_text())
    assert (about["kernels"], about["failed"], about["arch"]) == (2, 0, 90) and about["bytes"] < 1 << 20
    shutil.move(tmp_path / "made", tmp_path / "moved")
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert _run(["-m", "w2s_fast.bench.gpu.pack", str(tmp_path / "moved"), "--settle"]).returncode == 0
    read = _run(["-c", _READ], TRITON_CACHE_DIR=str(tmp_path / "moved" / "triton"))
    assert read.returncode == 0, read.stderr[-2000:]
    assert [name == "compiled" for name in read.stdout.split()] == [False, False, True]  # the third was not packed
