"""Runs a sample on one backend and holds it to the reference under the accuracy policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import backend as use_backend
from .accuracy import Errors, measure
from .samples import Sample, tensors, to_double, with_grad


class Mismatch(AssertionError):
    """An op's result breaks the policy."""


def compare(sample: Sample, backend: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> float:
    """Run ``sample`` and return the largest share of the allowed error that was used (at most 1).

    Raises:
        Mismatch: an output or gradient beyond the policy, naming it.
    """
    args, kwargs = sample.inputs(dtype, device, seed)
    args64, kwargs64 = to_double((args, kwargs))
    with torch.no_grad():
        with use_backend(backend):
            ours = sample.call(args, kwargs)
        if sample.verify is not None:
            sample.verify(args64, kwargs64, ours)
            worst = 0.0
        else:
            with use_backend("reference"):
                eager, exact = sample.call(args, kwargs), sample.call(args64, kwargs64)
            worst = _worst(sample, "output", tensors(ours), tensors(eager), tensors(exact), dtype, "forward")
    if sample.grad:
        worst = max(worst, _gradients(sample, backend, dtype, args, kwargs))
    return worst


def _gradients(sample: Sample, backend: str, dtype: torch.dtype, args: Any, kwargs: Any) -> float:
    found = []
    for name, inputs in (
        (backend, (args, kwargs)),
        ("reference", (args, kwargs)),
        ("reference", to_double((args, kwargs))),
    ):
        (a, k), leaves = with_grad(inputs)
        with use_backend(name):
            outputs = [t for t in tensors(sample.call(a, k)) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        loss: Tensor = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
        for output in outputs:
            upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
            finite = torch.isfinite(output)
            loss = loss + (torch.where(finite, output, 0.0).double() * upstream).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)])
    ours, eager, exact = found
    return _worst(sample, "gradient", ours, eager, exact, dtype, "gradient")


def _worst(
    sample: Sample,
    what: str,
    ours: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    dtype: torch.dtype,
    kind: str,
) -> float:
    worst = 0.0
    for index, (a, e, r) in enumerate(zip(ours, eager, exact, strict=True)):
        where = f"{sample.id} {dtype} {what} {index}"
        if not a.is_floating_point():
            if not torch.equal(a, r):
                raise Mismatch(f"{where}: {int((a != r).sum())} of {a.numel()} integers differ")
            continue
        errors: Errors = measure(a, e, r, a.dtype if kind == "forward" else dtype, kind)
        if not errors.worst <= 1.0:
            raise Mismatch(f"{where}: {errors.worst:.3g} times the allowed error: {errors}")
        worst = max(worst, errors.worst)
    return worst
