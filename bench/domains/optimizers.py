"""Steps of optimizers on one matrix, against the order of operations of the papers' code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..domain import Domain, Random, Sizes, Way

STEP, RATE, SCALE, LIMIT, B1, B2, EPS = 10, 1e-2, 0.25, 1.01, 0.9, 0.999, 1e-6


def _inputs(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    m, n = sizes["O"], sizes["I"]
    rank = min(sizes["R"], m, n)
    p, grad = random(m, n), random(m, n)
    draw = torch.randn(n, rank, generator=random.generator, device=random.device)
    basis = torch.linalg.qr(draw)[0]
    low = grad.float() @ basis
    return p, grad, basis, 0.3 * low, 0.01 * low.square() + 1e-4, low.norm().reshape(())


def _official(p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, before: Tensor) -> tuple[Tensor, ...]:
    """Fira's step, every matrix of the formulas formed."""
    grad = grad.to(basis.dtype)
    low = grad @ basis
    M, V = M * B1 + (1 - B1) * low, V * B2 + (1 - B2) * low.square()
    psi = M / (V.sqrt() + EPS)
    phi = psi.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
    outside = (grad - SCALE * (low @ basis.t())) * phi
    size = outside.norm()
    growth = (size / (before + 1e-8)).clamp_min(LIMIT) / LIMIT
    update = SCALE * (psi @ basis.t()) + outside / growth
    rate = RATE * (1 - B2**STEP) ** 0.5 / (1 - B1**STEP)
    return (p.to(basis.dtype) - rate * update).to(p.dtype), M, V, size / growth


def _ways(sizes: Sizes) -> dict[str, Way]:
    def ours(p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        return w2s_fast.projected_step(
            p, grad, basis, M, V, step=STEP, lr=RATE, betas=(B1, B2), eps=EPS, scale=SCALE, outside="column",
            previous=before, limit=LIMIT,
        )  # fmt: skip

    return {"ours": ours, "eager": _official}


DOMAINS: list[Domain] = [
    Domain(
        "projected_step", {"O": (64, 4096), "I": (64, 4096), "R": (8, 256)}, _inputs, _ways,
        flops=lambda sizes: 4.0 * sizes["O"] * sizes["I"] * sizes["R"],
        elements=lambda sizes: float(sizes["O"] * sizes["I"]),
        cases={"O1024-I2736-R256": {"O": 1024, "I": 2736, "R": 256}},
        bytes=lambda sizes: 16.0 * sizes["O"] * sizes["I"],
        prediction="two products instead of three and four passes over the matrix instead of 21: 2x and more; in place "
        "(bench/cases/optimizers.py) one copy of p less",
    )
]  # fmt: skip
