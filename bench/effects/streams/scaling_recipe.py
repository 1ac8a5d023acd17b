"""Qwen2.5's scaling laws (arXiv 2412.15115): a power law of the best rate is recovered from noisy sweeps.

The optimum ``0.3 N^-0.35 D^0.12`` of 12 pairs (N, D), seven rates each around it, losses of a quadratic in log rate
with noise of 0.002: `optimum` for every pair, then `fit_power_law`. The regime is that of the method's text.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from w2s_fast.methods.streams.scaling_recipe import fit_power_law, optimum

from ..protocol import Claim

CLAIMS = [
    Claim("the exponent of N is off by at most 0.02", "error of a", "fitted", 0.02, 0.0, "lower"),
    Claim("the exponent of D is off by at most 0.02", "error of b", "fitted", 0.02, 0.0, "lower"),
]


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    draw, points = torch.Generator().manual_seed(seed), []
    for n, d in itertools.product((4e7, 1.6e8, 6e8, 2.5e9), (1e9, 1e10, 1e11)):
        best = 0.3 * n**-0.35 * d**0.12
        shift = 0.5 * (torch.rand(1, generator=draw).item() - 0.5)  # the sweep is not centred on the optimum
        rates = [best * 2 ** (step + shift) for step in range(-3, 4)]
        noise = 0.002 * torch.randn(7, generator=draw)
        losses = [2 + 0.05 * math.log(r / best) ** 2 + e for r, e in zip(rates, noise.tolist(), strict=True)]
        points.append(((n, d), optimum(rates, losses)))
    law = fit_power_law(points)
    return {"fitted": {"a": law.exponents[0], "b": law.exponents[1], "error of a": abs(law.exponents[0] + 0.35),
                       "error of b": abs(law.exponents[1] - 0.12), "log constant": law.log_constant}}  # fmt: skip
