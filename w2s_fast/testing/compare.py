"""Runs a sample on one backend and holds it to the reference under the accuracy policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import backend as use_backend
from .accuracy import Errors, measure, pooled
from .samples import Sample, tensors, to_double, with_grad

#: Draws that decide where the first one is beyond the policy.
DRAWS = 8


class Mismatch(AssertionError):
    """An op's result breaks the policy."""


def compare(sample: Sample, backend: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> float:
    """Run ``sample`` and return the largest share of the allowed error that was used (at most 1).

    Where one draw of the inputs is beyond the policy, the errors of `DRAWS` draws together decide.

    Raises:
        Mismatch: an output or gradient beyond the policy, naming it.
    """
    first = dict(_draw(sample, backend, dtype, device, seed))
    if all(errors.worst <= 1.0 for errors in first.values()):
        return max((errors.worst for errors in first.values()), default=0.0)
    draws = [first] + [dict(_draw(sample, backend, dtype, device, seed + i)) for i in range(1, DRAWS)]
    worst = 0.0
    for name in first:
        found = pooled([draw[name] for draw in draws])
        if not found.worst <= 1.0:
            raise Mismatch(
                f"{sample.id} {dtype} {name}: {found.worst:.3g} times the allowed error over {DRAWS} draws: {found}; "
                f"the first draw alone {first[name].worst:.3g}"
            )
        worst = max(worst, found.worst)
    return worst


def _draw(
    sample: Sample, backend: str, dtype: torch.dtype, device: str, seed: int
) -> Iterator[tuple[str, Errors]]:
    """The errors of every output and gradient for one draw of the inputs, by name."""
    args, kwargs = sample.inputs(dtype, device, seed)
    args64, kwargs64 = to_double((args, kwargs))
    with torch.no_grad():
        with use_backend(backend):
            ours = sample.call(args, kwargs)
        if sample.verify is not None:
            sample.verify(args64, kwargs64, ours)
        else:
            with use_backend("reference"):
                eager, exact = sample.call(args, kwargs), sample.call(args64, kwargs64)
            yield from _errors(sample, "output", tensors(ours), tensors(eager), tensors(exact), dtype)
    if sample.grad:
        yield from _errors(sample, "gradient", *_gradients(sample, backend, args, kwargs), dtype)


def _gradients(sample: Sample, backend: str, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients in all inputs: ours, eager's, float64's."""
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
    return ours, eager, exact


def _errors(
    sample: Sample, what: str, ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Errors]]:
    for index, (a, e, r) in enumerate(zip(ours, eager, exact, strict=True)):
        if a.is_floating_point():
            own, kind = (a.dtype, "forward") if what == "output" else (dtype, "gradient")
            yield f"{what} {index}", measure(a, e, r, own, kind)
        elif not torch.equal(a, r):
            where = f"{sample.id} {dtype} {what} {index}"
            raise Mismatch(f"{where}: {int((a != r).sum())} of {a.numel()} integers differ")
