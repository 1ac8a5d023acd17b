"""Every sample of every op against its float64 reference, on each backend this machine has; opcheck; compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import w2s_fast
from w2s_fast import extension
from w2s_fast.library import Op
from w2s_fast.testing.compare import Mismatch, compare
from w2s_fast.testing.samples import Sample, all_samples, tensors
from w2s_fast.testing.selection import FULL, covering

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
CASES = [(sample, dtype) for sample in all_samples() for dtype in sample.dtypes]


def named(value: object) -> str:
    """What a test's name says of a parameter."""
    return value.id if isinstance(value, Sample) else str(value).removeprefix("torch.")


def op(case: Sample | tuple[Sample, torch.dtype]) -> list[object]:
    """What a part of the cases has to show of each op: itself, in each of its dtypes."""
    return [(case[0].op, case[1])] if isinstance(case, tuple) else [case.op]


def accuracy_cases() -> list[tuple[str, Sample, torch.dtype]]:
    """Every sample on the kernels in float32, and some of each op in each of the narrower dtypes (in full: all).

    Every comparison runs the reference; by itself it can only break a contract of the sample's own (`verify`).
    """
    wide, narrow = ([case for case in CASES if (case[1] == torch.float32) is yes] for yes in (True, False))
    chosen = wide + covering(narrow, op, 300)
    own = CASES if FULL or "cpp" not in BACKENDS else [case for case in CASES if case[0].verify is not None]
    return [("reference", *case) for case in own] + [("cpp", *case) for case in chosen if "cpp" in BACKENDS]


def test_the_extension_is_built():
    """The suite is run where there is a compiler; without the kernels most of it would test nothing."""
    assert extension.ERROR is None, extension.ERROR


@pytest.mark.parametrize("backend, sample, dtype", accuracy_cases(), ids=named)
def test_accuracy(backend: str, sample: Sample, dtype: torch.dtype):
    compare(sample, backend, dtype)


@pytest.mark.slow(30)
@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("isa", ["avx2"])
def test_accuracy_of_other_instruction_sets(isa: str):
    """A sample of every op in all its dtypes (in full: all samples), in a process where that set is chosen."""
    cases = [(sample, dtype) for backend, sample, dtype in accuracy_cases() if backend == "cpp"]
    chosen = [f"{__file__}::test_accuracy[cpp-{s.id}-{named(dtype)}]" for s, dtype in covering(cases, op, 1)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    run = subprocess.run(command, env={**os.environ, "W2S_FAST_CPU": isa}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("sample, dtype", CASES if torch.cuda.is_available() else CASES[:1], ids=named)
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


#: Samples whose calls are traced by AOTAutograd with dynamic shapes too; the other checks take a tenth of that.
TRACED = covering(all_samples(), op, 100)
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def _nan_appears(kernel: Callable[..., Any], args: tuple) -> bool:
    """In results or gradients: the check of a traced call compares them, and takes a NaN for a difference."""
    inputs = [t for t in tensors(args) if t.requires_grad]
    found = tensors(kernel(*args))
    carriers = [t for t in found if t.requires_grad]
    grads = torch.autograd.grad([t.sum() for t in carriers], inputs, allow_unused=True) if carriers else ()
    return any(t.isnan().any() for t in (*found, *grads) if t is not None and t.is_floating_point())


@pytest.mark.parametrize("sample", all_samples(), ids=named)
def test_opcheck(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    for called, args in _record(monkeypatch, sample, torch.float32):
        args = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() and sample.grad else t, args
        )
        kernel = getattr(torch.ops.w2s_fast, called.name).default
        traced = sample in TRACED and not _nan_appears(kernel, args)
        checks = (*QUICK, "test_aot_dispatch_dynamic") if traced else QUICK
        torch.library.opcheck(kernel, args, test_utils=checks)


@pytest.mark.parametrize("sample", covering(all_samples(), op, 120, seed=1), ids=named)
def test_compile(sample: Sample):
    args, kwargs = sample.inputs(torch.float32)
    expected = sample.call(args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, k: sample.call(a, k), fullgraph=True, backend="aot_eager")
    for got, want in zip(tensors(compiled(args, kwargs)), tensors(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def deterministic_cases() -> list[tuple[str, Sample]]:
    """Every sample on the kernels, some of each op on the reference, which is PyTorch twice."""
    chosen = {"reference": covering(all_samples(), op, 60, seed=2), "cpp": all_samples()}
    return [(backend, sample) for backend in BACKENDS for sample in chosen[backend]]


@pytest.mark.parametrize("backend, sample", deterministic_cases(), ids=named)
def test_deterministic(backend: str, sample: Sample):
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
