"""Nearest prototypes against cdist and argmin, the product as one would write it, and the published loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation, wide


def _ours(x: Tensor, p: Tensor) -> Tensor:
    return w2s_fast.prototype_distance(x, p, return_distance=False).indices[:, 0]


def _cdist(x: Tensor, p: Tensor) -> Tensor:
    return torch.cdist(wide(x), wide(p)).argmin(1)


def _product(x: Tensor, p: Tensor) -> Tensor:
    return (2 * wide(x @ p.t()) - wide(p).square().sum(1)).argmax(1)


def _loop(x: Tensor, p: Tensor) -> Tensor:
    """A row at a time, as the released baseline classifies."""
    return torch.stack([(row - p).square().sum(1).argmin() for row in x])


def _mean_square(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    z = 2 * wide(x @ p.t()) - wide(p).square().sum(1) - wide(x).square().sum(1, keepdim=True)
    return F.cross_entropy(z / len(p), labels)


def _loss(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    found = w2s_fast.prototype_distance(x, p, labels, temperature=float(len(p)), return_distance=False).loss
    assert found is not None
    return found.mean()


def _graded(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, p: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(), p.detach().requires_grad_()]
        value = loss(*leaves, labels)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return call


def agreement(actual: Any, expected: Any) -> float:
    """The share of rows with another nearest prototype, of a thousandth: rounding decides between two as near."""
    if actual.shape != expected.shape:
        return float("inf")
    return 1e3 * float((actual != expected).double().mean()) if actual.numel() else 0.0


def _inputs(rows: int, classes: int, width: int, labelled: bool) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        p = torch.randn(classes, width, generator=generator, device=device)
        labels = torch.randint(classes, (rows,), generator=generator, device=device)
        x = 0.3 * p[labels] + torch.randn(rows, width, generator=generator, device=device)
        return (x, p, labels) if labelled else (x, p)

    return make


def _nearest(rows: int, classes: int, prediction: str, few: bool) -> Case:
    others = {"cdist": eager(_cdist), "product": eager(_product), "compile": compiled(_product)}
    return Case(
        op="prototype_distance",
        name=f"nearest-N{rows}-K{classes}-D768-fp32",
        dtype="float32",
        shape={"N": rows, "K": classes, "D": 768},
        bytes=4.0 * 768 * (rows + classes),
        flops=2.0 * rows * classes * 768,
        prediction=prediction,
        inputs=_inputs(rows, classes, 768, False),
        ours=_ours,
        reference=_cdist,
        providers={**others, "loop": formulation(_loop)} if few else others,
        compare=agreement,
        targets={"cdist": 1.5, "loop": 15.0, "product": 1.0, "compile": 1.0} if few else {"cdist": 1.0},
        hot=few,
    )


def cases(device: str) -> list[Case]:
    """The issue's size, a hundred thousand prototypes, and a training head."""
    del device
    return [
        _nearest(10_000, 100, "one product, scores in L2 looked at once; cdist has the same product, two passes of "
                 "roots over [N, K] and norms: 1.5 times; the loop 15 times. AMD EPYC, Zen 5: 5.1 times cdist, 1.9 "
                 "times the product and 1.8 times compiled; 2.8, 1.03 and 0.97 with the library's product", True),
        _nearest(1000, 100_000, "the same in 4 MiB, where [N, K] is 400 MB: 1.5 times cdist", False),
        Case(
            op="prototype_distance", name="loss-N4096-K1000-D512-fp32", dtype="float32",
            shape={"N": 4096, "K": 1000, "D": 512}, bytes=8.0 * 512 * (4096 + 1000), flops=8.0 * 4096 * 1000 * 512,
            prediction="3 products, as those of forward stay for backward, where the plain form has ten passes over 16 "
            "MB more: 1.2 times, and compiled 1.0 times where the product is the library's. AMD EPYC, Zen 5: 2.1 "
            "times eager and 1.5 times compiled; 1.03 and 0.97 with the library's product",
            inputs=_inputs(4096, 1000, 512, True), ours=_graded(_loss), reference=_graded(_mean_square),
            providers={"eager": eager(_graded(_mean_square)), "compile": compiled(_graded(_mean_square))},
            rtol=1e-3, atol=1e-6, targets={"eager": 1.0, "compile": 1.0}, mode="fwdbwd",
        ),
    ]  # fmt: skip
