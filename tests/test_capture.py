"""A step can be captured in a CUDA graph: nothing waits for the device, nothing is copied to it from pageable memory.

A meta tensor stands for a GPU's: it has no values, so whoever reads one fails, and the public functions take the way
that they take on a GPU. The launchers of all samples run in the same way in tests/test_specialisations.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import w2s_fast
from w2s_fast import library
from w2s_fast.testing import launching
from w2s_fast.testing.samples import Sample, all_samples, tensors, with_grad
from w2s_fast.testing.selection import covering

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("one process tests this", allow_module_level=True)

#: Ops that are called once, before the steps: they may look at a weight.
SETUP = {"fold_kv_projection"}


class NoCopies(TorchDispatchMode):
    """Refuses an operation between a CPU tensor with dimensions and one that stands for a GPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)}
        if places == {"cpu", "meta"}:
            raise RuntimeError(f"{func} copies from the CPU to the device")
        return found


class NoLists(TorchFunctionMode):
    """Refuses a tensor on the device made from numbers of the host, whose memory is pageable."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if made and found.is_meta and not isinstance(args[-1], Tensor):
            raise RuntimeError(f"{func} copies numbers to the device")
        return found


@contextmanager
def captured() -> Iterator[None]:
    """What a CUDA graph's capture would refuse is an error."""
    with NoLists(), NoCopies():
        yield


def _on_device(value: Any) -> Any:
    def one(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)

    moved = tree_map_only(Tensor, one, value)
    return tree_map_only(w2s_fast.SparseSupport, lambda support: copy.deepcopy(support).to("meta"), moved)


def _step(sample: Sample, dtype: torch.dtype) -> None:
    args, kwargs = _on_device(sample.inputs(dtype))
    with captured():
        if not sample.grad:
            with torch.no_grad():
                sample.call(args, kwargs)
            return
        (args, kwargs), leaves = with_grad((args, kwargs))
        outputs = [t for t in tensors(sample.call(args, kwargs)) if t.requires_grad]
        if outputs:
            torch.autograd.grad([t.sum() for t in outputs], leaves, allow_unused=True)


def _samples() -> list[Sample]:
    return covering([s for s in all_samples() if s.op not in SETUP], lambda s: [s.op], 100)


@pytest.mark.parametrize("sample", _samples(), ids=lambda s: s.id)
def test_nothing_is_read_back(sample: Sample):
    _step(sample, sample.dtypes[0])


def test_a_decoding_step():
    """From the models' logits to the token, with every kind of weights and filters."""
    base, expert, anti = (torch.empty(4, 900, device="meta") for _ in range(3))
    heat, u = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    with captured(), torch.no_grad():
        for weights in (1.0, torch.empty(4, 1, device="meta"), "dynamic"):
            for filters in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
                out = w2s_fast.fused_sample(
                    base, [expert], anti, weights, temperature=heat, uniform=u, plausible=("top_p", 0.9), **filters
                )
                assert out.token.shape == (4,)


@pytest.mark.slow(30)
@pytest.mark.parametrize("weights", [0.7, "dynamic"])
def test_a_decoding_step_to_the_driver(weights: float | str, monkeypatch: pytest.MonkeyPatch):
    """The same with its launchers and launches, on a GPU that is not there: tensors without values reach the driver,
    none of the host does, and a second step launches the same kernels without compiling."""
    pytest.importorskip("triton")

    def run(op: library.Op, backend: str, flat: tuple[Any, ...]) -> Any:
        assert op.triton is not None
        return op.triton(*flat)

    monkeypatch.setattr(library.Op, "run", run)
    base, expert, anti = (torch.empty(4, 900, device="meta") for _ in range(3))
    heat, u = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    with launching.stand_in() as gpu:

        def step() -> list[str]:
            with captured(), torch.no_grad():
                w2s_fast.fused_sample(
                    base, [expert], anti, weights, temperature=heat, uniform=u, top_k=5, top_p=0.9, min_p=0.1
                )
            given = [t for made in gpu.started for t in tree_leaves(made.args) if isinstance(t, Tensor)]
            assert given and all(t.is_meta for t in given)
            made = [made.binary for made in gpu.started]
            gpu.started.clear()
            return made

        first = step()
        for function in launching._compiled_here():
            monkeypatch.setattr(function, "run", None)
        assert step() == first and len(first) >= 3


def test_who_waits_is_seen():
    x = torch.empty(3, device="meta")
    for waits in (lambda: bool(x.all()), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)), captured():
            waits()
    for copies in (lambda: x + torch.ones(3), lambda: torch.ones(3).to("meta"), lambda: x.new_tensor([1.0, 2.0])):
        with pytest.raises(RuntimeError), captured():
            copies()
