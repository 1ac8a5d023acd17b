"""A launch hands the driver what Triton's own way would, in less time; on a GPU that is not there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import triton
from triton import knobs

from w2s_fast.testing import launching

OLDEST = Path(sys.prefix) / "triton-3.6"
#: Tests that are run under it too.
_SOME = "fuse_logits or profiler or device"


def _common() -> Any:
    return importlib.import_module("w2s_fast.kernels.common")


def _fuse() -> Any:
    return importlib.import_module("w2s_fast.kernels.logit_fusion.fuse")


def _told(value: Any) -> Any:
    """An argument as another call's can be compared with it: tensors are made anew."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(map(_told, value)) if isinstance(value, tuple) else value


def _seen(started: list[launching.Started]) -> list[Any]:
    found = [(made.grid, made.kernel, made.binary, made.device, _told(made.args)) for made in started]
    started.clear()
    return found


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", launching.calls())
def test_the_driver_gets_what_triton_gives_it(name: str, monkeypatch: pytest.MonkeyPatch):
    call = launching._launcher_of(launching.calls()[name])
    with launching.stand_in() as gpu:
        call()  # Triton's way, which compiles
        first = _seen(gpu.started)
        with monkeypatch.context() as patch:
            for function in launching._compiled_here():
                patch.setattr(function, "run", None)  # nobody is asked to compile again
            call()
            planned = _seen(gpu.started)
        monkeypatch.setattr(_common(), "elsewhere", _common().plainly)
        call()
        assert first == planned == _seen(gpu.started) and first
        assert all(made[0][0] > 0 and made[0][1:] == (1, 1) for made in first)


def test_what_is_compiled_for_differs_from_call_to_call():
    """Another dtype, an address that is not aligned, a stride that is 1 or no multiple of 16: another binary each."""
    rows = torch.randn(4, 1025)
    whole = torch.randn(4, 1024)
    given = [
        (whole, whole), (whole.bfloat16(), whole.bfloat16()), (rows[:, 1:], whole), (rows[:, :1024], whole),
        (whole[:, :1], whole[:, :1]),
    ]  # fmt: skip

    def binaries(gpu: launching.StandIn) -> list[str]:
        for base, other in given:
            _fuse().launch_fuse_logits(_fuse().one_expert(base, other, other), torch.float32, False)
        found = [made.binary for made in gpu.started]
        gpu.started.clear()
        return found

    with launching.stand_in() as gpu:
        first, planned = binaries(gpu), binaries(gpu)
        assert first == planned
        assert len(set(first)) >= 4


def test_a_profiler_is_told_of_every_launch():
    call = launching._launcher_of(launching.calls()["fuse_logits"])

    def seen(about: Any) -> None:
        pass

    with launching.stand_in() as gpu:
        call()
        call()
        knobs.runtime.launch_enter_hook.add(seen)
        try:
            call()
        finally:
            knobs.runtime.launch_enter_hook.remove(seen)
        call()
        assert [made.described for made in gpu.started[1:]] == [False, True, False]


def test_a_launch_goes_to_the_device_of_its_tensors():
    """And leaves the current device as it was; each device has its own compiled kernels."""
    base = torch.randn(4, 64)
    fusion = importlib.import_module("w2s_fast.kernels.logit_fusion.fusion")
    given = fusion.fusion_tuple(fusion.one_expert(base, base, base))

    def start(index: int) -> None:
        like = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index))
        args = (given, 64, 1, torch.empty(4, 64), None, None)
        _common().launch(_fuse()._fuse_kernel, 4, like, *args, TILES=1, BLOCK=1024)

    with launching.stand_in() as gpu:
        for index in (0, 1, 1, 0):
            start(index)
            assert gpu.device == 0
        assert [made.device for made in gpu.started] == [0, 1, 1, 0]
        assert {device for _, device in _common()._plans} == {0, 1} and gpu.switched == 4


@pytest.mark.slow(60)
@pytest.mark.skipif(not OLDEST.exists(), reason="Triton 3.6 is not beside this environment (make install)")
@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="this is it")
def test_the_same_under_the_oldest_triton():
    path = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", _SOME]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
