"""`class_stats` against a loop over the classes and a product with one-hot labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation

CLASSES = 100


def _ours(x: Tensor, labels: Tensor) -> Tensor:
    return w2s_fast.class_stats(x, labels, CLASSES).sums


def _one_hot(x: Tensor, labels: Tensor) -> Tensor:
    return (F.one_hot(labels, CLASSES).to(x.dtype).t() @ x).double()


def _loop(x: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([x[labels == c].sum(0) for c in range(CLASSES)]).double()


def cases(device: str) -> list[Case]:
    """Features of a frozen vision transformer."""
    rows, width = 10_000, 768

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x = torch.randn(rows, width, generator=generator, device=device)
        return x, torch.randint(CLASSES, (rows,), generator=generator, device=device)

    return [
        Case(
            op="class_stats", name="N10000-K100-D768-fp32", dtype="float32", shape={"N": rows, "D": width},
            bytes=4.0 * rows * width, flops=float(rows * width),
            prediction="x read once with its sums in L2: 1.3 of a read; a product does 100 times the additions",
            inputs=inputs, ours=_ours, reference=_one_hot, rtol=1e-4, atol=1e-3,
            providers={"eager": eager(_one_hot), "compile": compiled(_one_hot), "loop": formulation(_loop)},
            hot=False,
        )
    ]  # fmt: skip
