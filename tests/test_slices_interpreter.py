"""Rows that several programs share: cut into short slices, a step a launch, against the reference."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

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
