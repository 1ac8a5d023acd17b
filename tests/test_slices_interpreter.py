"""Rows that several programs share: cut into short slices, a step a launch, against the reference."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import w2s_fast
from w2s_fast.testing import launching
from w2s_fast.testing.compare import compare
from w2s_fast.testing.samples import Sample, all_samples
from w2s_fast.testing.selection import FULL, covering

pytest.importorskip("triton")
interpreted = pytest.mark.interp
OPS = ("linear_ce", "linear_fusion_cross_entropy", "kd_loss", "linear_kd")


def _slices():
    return importlib.import_module("w2s_fast.kernels.linear_loss.slices")


def _samples() -> list[Sample]:
    """Some of each op (in full: all)."""
    found = [s for s in all_samples() if s.op in OPS and torch.float32 in s.dtypes]
    return found if FULL else covering(found, lambda s: [s.op], 6, seed=2)


@interpreted
@pytest.mark.parametrize("sample", _samples(), ids=lambda s: s.id)
def test_a_row_in_slices(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    """Slices of at most 128 columns; the rows of the samples have up to a thousand."""
    monkeypatch.setattr(_slices(), "KEPT", 128)
    try:
        compare(sample, "triton", torch.float32)
    except RuntimeError as error:
        if "cannot serve this call" not in str(error):
            raise


@pytest.mark.parametrize("vocab", [0, 1, 1000, 32000, 32768, 32769, 50257, 128256, 151936, 256000])
@pytest.mark.parametrize("tensors", [1, 2, 3, 8])
def test_slices_cover_a_row(vocab: int, tensors: int):
    cut = _slices().slices_of(vocab, tensors)
    assert (cut.count - 1) * cut.width < max(vocab, 1) <= cut.count * cut.width and cut.width <= cut.block
    assert cut.block * tensors <= 2 * _slices().KEPT and cut.block & (cut.block - 1) == 0
    assert cut.count == 1 or cut.width % 16 == 0
    assert cut.warps in (4, 8, 16)


def test_steps_are_one_launch_where_programs_run_side_by_side(monkeypatch: pytest.MonkeyPatch):
    slices, launched = _slices(), []
    monkeypatch.setattr(slices, "launch", lambda kernel, programs, like, *args, **meta: launched.append(meta["STEP"]))
    monkeypatch.setattr(slices, "_multiprocessors", lambda device: 16)
    here, gpu = torch.empty(1), torch.empty(1, device="meta")
    short, long = slices.slices_of(1000), slices.slices_of(128256)
    for like, cut, steps in ((here, short, [-1]), (here, long, [0, 1]), (gpu, long, [-1])):
        launched.clear()
        slices.run_slices(None, 3, cut, 2, like)
        assert launched == steps


def _ends(slots: int, count: int, rows: int, exchanges: int, draw: random.Random) -> bool:
    """Whether all programs end that a device with so many places for them starts, in any order and at any pace."""
    waiting, running, published = list(range(rows * count)), [], [0] * rows
    while waiting or running:
        moved = False
        while waiting and len(running) < slots:
            waiting.pop(draw.randrange(len(waiting)))  # a device promises no order: what counts is who starts when
            ticket = rows * count - len(waiting) - 1
            running.append([ticket // count, 0])
            moved = True
        draw.shuffle(running)
        for program in list(running):
            row, passed = program
            if published[row] >= passed * count:  # what it waited for has come
                moved = True
                if passed == exchanges:
                    running.remove(program)
                else:
                    published[row] += 1
                    program[1] += 1
        if not moved:
            return False
    return True


@pytest.mark.parametrize("exchanges", [1, 2])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_nobody_waits_for_ever(count: int, exchanges: int):
    """As many places as a row has slices are enough, one fewer is not; `side_by_side` asks for two multiprocessors a
    slice, each of which has a place at least."""
    draw = random.Random(0)
    for slots in (count, count + 1, 2 * count, 132):
        assert all(_ends(slots, count, 7, exchanges, draw) for _ in range(20))
    assert not _ends(count - 1, count, 7, exchanges, draw)
    slices, cut = _slices(), _slices().Slices(count, 16, 16, 4)
    gpu = SimpleNamespace(is_cuda=True, device=SimpleNamespace(type="cuda", index=0))
    with mock.patch.object(slices, "_multiprocessors", lambda device: 2 * count):
        assert slices.side_by_side(gpu, cut)
    with mock.patch.object(slices, "_multiprocessors", lambda device: 2 * count - 1):
        assert not slices.side_by_side(gpu, cut)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler here")
def test_counters_are_new_in_every_call():
    """So that a CUDA graph clears them in every replay, with what a capture records."""
    common, call = importlib.import_module("w2s_fast.kernels.common"), _kd_of_a_long_row()
    with common.recording() as launches:
        call()
        call()
    tensors = [[t for t in launch.args if isinstance(t, torch.Tensor)] for launch in launches]
    counters = [[t for t in found if t.dtype == torch.int32] for found in tensors]
    assert len(counters) == 6 and all(len(found) == 1 and not found[0].any() for found in counters)  # three steps each
    assert counters[0][0].data_ptr() == counters[2][0].data_ptr() != counters[3][0].data_ptr()


def _kd_of_a_long_row() -> Callable[[], Any]:
    student, teacher = torch.zeros(2, 40000), torch.zeros(2, 40000)
    return launching._launcher_of(lambda: w2s_fast.kd_loss(student, [("logits", teacher)]))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler here")
@pytest.mark.parametrize("module, exchanges", [("linear_loss.ce", 1), ("linear_loss.kd", 2)])
def test_a_slice_waits_before_it_reads(module: str, exchanges: int):
    """In the PTX: a number in order of start; then for each exchange a barrier, a count that releases what was written,
    and polls that acquire what the others wrote."""
    import triton
    from triton.backends.compiler import GPUTarget

    from w2s_fast.testing import aot

    job = next(job for job in aot.jobs([module]) if job.recorded.options.get("SLICES", 1) > 1)
    source, options = aot._bind(job.recorded, GPUTarget("cuda", 90, 32))
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    words = ("atom.", "acquire", "bar.sync", "ld.global.cg")
    lines = [line for line in ptx.splitlines() if any(word in line for word in words)]
    counts = [i for i, line in enumerate(lines) if "atom." in line and "acq_rel" in line]
    assert "relaxed" in next(line for line in lines if "atom." in line) and len(counts) == exchanges
    assert all(".gpu." in line for line in lines if "atom." in line or "acquire" in line)  # more than this program's SM
    for i, end in zip(counts, [*counts[1:], len(lines)], strict=True):
        assert "bar.sync" in lines[i - 1]
        polls = [k for k in range(i + 1, end) if "acquire" in lines[k]]
        reads = [k for k in range(i + 1, end) if "ld.global.cg" in lines[k]]  # of what others wrote, not from L1
        assert polls and reads and any("bar.sync" in line for line in lines[polls[-1] : reads[0]])
    assert not any("ld.global.cg" in line for line in lines[: counts[0]])
