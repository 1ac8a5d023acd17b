"""Every sample of every op against its float64 reference, on each backend this machine has; opcheck; compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import w2s_fast
from w2s_fast import extension
from w2s_fast.library import Op
from w2s_fast.testing.compare import Mismatch, compare
from w2s_fast.testing.samples import Sample, all_samples, tensors
from w2s_fast.testing.selection import sampled

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
CASES = [
    pytest.param(sample, dtype, id=f"{sample.id}-{str(dtype)[6:]}")
    for sample in all_samples()
    for dtype in sample.dtypes
]
FIRST = [pytest.param(sample, id=sample.id) for sample in all_samples()]


def test_the_extension_is_built():
    """The suite is run where there is a compiler; without the kernels most of it would test nothing."""
    assert extension.ERROR is None, extension.ERROR


@pytest.mark.parametrize("sample, dtype", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(sample: Sample, dtype: torch.dtype, backend: str):
    compare(sample, backend, dtype)


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_accuracy_of_other_instruction_sets(isa: str):
    """A sample of every op in all its dtypes (all samples in a full run), in a process where that set is chosen."""
    samples = [s for op in sorted({s.op for s in all_samples()})
               for s in sampled([s for s in all_samples() if s.op == op], 1)]  # fmt: skip
    chosen = [f"{__file__}::test_accuracy[cpp-{s.id}-{str(dtype)[6:]}]" for s in samples for dtype in s.dtypes]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    run = subprocess.run(command, env={**os.environ, "W2S_FAST_CPU": isa}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("sample, dtype", CASES)
def test_accuracy_on_gpu(sample: Sample, dtype: torch.dtype):
    compare(sample, "auto", dtype, "cuda")


def _record(monkeypatch: pytest.MonkeyPatch, sample: Sample, dtype: torch.dtype) -> list[tuple[Op, tuple]]:
    """The dispatcher calls a sample makes, with their arguments."""
    calls: list[tuple[Op, tuple]] = []
    original = Op.run

    def spy(self: Op, backend: str, flat: tuple):
        calls.append((self, flat))
        return original(self, backend, flat)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "run", spy)
        args, kwargs = sample.inputs(dtype)
        sample.call(args, kwargs)
    return calls


#: opcheck compares outputs with NaN != NaN, so it cannot run on rows that have to be NaN
WITHOUT_NAN = [case for case in FIRST if case.values[0].name not in ("nan", "masked")]


@pytest.mark.parametrize("sample", WITHOUT_NAN)
def test_opcheck(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    for op, args in _record(monkeypatch, sample, torch.float32):
        args = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() and sample.grad else t, args
        )
        torch.library.opcheck(getattr(torch.ops.w2s_fast, op.name).default, args)


@pytest.mark.parametrize("sample", FIRST)
def test_compile(sample: Sample):
    args, kwargs = sample.inputs(torch.float32)
    expected = sample.call(args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, k: sample.call(a, k), fullgraph=True, backend="aot_eager")
    for got, want in zip(tensors(compiled(args, kwargs)), tensors(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sample", FIRST)
def test_deterministic(sample: Sample, backend: str):
    args, kwargs = sample.inputs(torch.float32)
    with w2s_fast.backend(backend):
        first, second = sample.call(args, kwargs), sample.call(args, kwargs)
    for a, b in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch):
    """A kernel that is off by a thousandth must be seen."""
    sample = next(s for s in all_samples() if s.id == "fuse_logits-plain")
    original = w2s_fast.fuse_logits
    monkeypatch.setattr(
        w2s_fast,
        "fuse_logits",
        lambda *a, **k: original(*a, **k) * (1.001 if w2s_fast.dispatch.STATE == "auto" else 1.0),
    )
    with pytest.raises(Mismatch):
        compare(sample, "auto", torch.float32)


def test_double_backward_is_refused():
    base = torch.randn(2, 5, requires_grad=True)
    expert = torch.randn(2, 5)
    (grad,) = torch.autograd.grad(w2s_fast.fuse_logits(base, [expert]).square().sum(), base, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()
