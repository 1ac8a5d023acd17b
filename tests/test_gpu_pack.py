"""`make gpu-pack`: what it compiles, a process elsewhere finds without a compiler once the pack is settled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import triton
from w2s_fast.bench.gpu import pack

_READ = """
import importlib
from unittest import mock
from triton.backends.nvidia.compiler import CUDABackend
from w2s_fast.bench.gpu import pack
from w2s_fast.testing import launching
common = importlib.import_module("w2s_fast.kernels.common")
recorded = pack.launches(90, 3)
with launching.stand_in() as gpu, mock.patch.object(CUDABackend, "add_stages", side_effect=AssertionError("compiled")):
    for launch in recorded:
        try:
            common.planned(launch.kernel, 1, launch.args, dict(launch.options))
            print(gpu.started[-1].kernel)
        except AssertionError as error:
            print(error)
"""


def _run(code: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **changes}
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, check=False)


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pack.json").read_text())


@pytest.mark.slow(15)
def test_a_pack_serves_elsewhere(tmp_path: Path):
    """What was packed is launched without compiling, also where the pack was moved to."""
    made = _run(["-m", "w2s_fast.bench.gpu.pack", str(tmp_path / "made"), "--limit", "2"])
    assert made.returncode == 0, made.stderr[-2000:]
    about = _about(tmp_path / "made")
    assert (about["kernels"], about["failed"], about["left"], about["arch"]) == (2, 0, 0, 90)
    assert about["bytes"] < 1 << 20 and {path.name for path in (tmp_path / "made").iterdir()} == {
        "pack.json", pack.ARCHIVE, *(["w2s_fast"] if about["libraries"] else [])
    }  # fmt: skip
    shutil.move(tmp_path / "made", tmp_path / "moved")
    settled = _run(["-m", "w2s_fast.bench.gpu.pack", str(tmp_path / "moved"), "--settle"])
    assert settled.returncode == 0 and "2 kernels settled" in settled.stdout and not settled.stderr, settled.stderr
    read = _run(["-c", _READ], TRITON_CACHE_DIR=str(tmp_path / "moved" / "triton"))
    assert read.returncode == 0, read.stderr[-2000:]
    assert [name == "compiled" for name in read.stdout.split()] == [False, False, True]  # the third was not packed


def _wheel(path: Path, library: bytes, changed: str = "") -> Path:
    """A wheel of this Triton, of some of its files, with another compiled library."""
    root = Path(triton.__file__).parent.parent
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("triton/__init__.py", "triton/runtime/cache.py", "triton/compiler/compiler.py"):
            archive.writestr(name, (root / name).read_bytes() + (b"#" if name == changed else b""))
        archive.writestr("triton/_C/libtriton.so", library)
    return path


def test_a_pack_for_another_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The keys are those of the wheel that is named, and a pack of another's says so where it is settled."""
    from triton.runtime import cache

    own = (Path(triton.__file__).parent / "_C" / "libtriton.so").read_bytes()
    assert pack.key_of(_wheel(tmp_path / "same.whl", own)) == cache.triton_key()
    other = _wheel(tmp_path / "other.whl", b"compiled for another Python")
    assert pack.key_of(other) != cache.triton_key() and pack.key_of(other).startswith(triton.__version__)
    with pytest.raises(ValueError, match=r"wheel must be of Triton .*compiler\.py differs"):
        pack.key_of(_wheel(tmp_path / "changed.whl", own, "triton/compiler/compiler.py"))

    for name, wheel in (("mine", None), ("theirs", other)):
        (tmp_path / name / "triton").mkdir(parents=True)
        with pack.compiled_for(wheel):
            about = {"made_for": pack.made_for(90), "arch": 90, "wheel": wheel and wheel.name, "triton": "3"}
        (tmp_path / name / "pack.json").write_text(json.dumps(about))
        assert pack.unpacked(tmp_path / name) == 0
        assert ("another Triton (wheel other.whl)" in capsys.readouterr().err) == (name == "theirs")


def test_time_for_compiling_may_be_up():
    assert pack.fill([None, None], 90, 1, seconds=-1) == (0, 0)
