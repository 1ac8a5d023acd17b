"""Mixtures of two experts."""

from __future__ import annotations

from torch import Tensor

import w2s_fast

from ..cases.mixture import plain_dispersion, plain_mixed_ce
from ..domain import Domain, Random, Sizes


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    n, classes = sizes["n"], sizes["C"]
    return random(n, classes, scale=3.0), random(n, classes, scale=3.0), random.integers(classes, n), random.uniform(n)


DOMAINS = [
    Domain(
        "dispersion", {"n": (64, 262_144), "C": (2, 512)},
        lambda random, sizes: (random(sizes["n"], sizes["C"], scale=3.0),),
        ways=lambda sizes: {
            "ours": lambda logits: w2s_fast.dispersion(logits, detach=False), "eager": plain_dispersion,
        },
        flops=lambda sizes: 30.0 * sizes["n"] * sizes["C"], elements=lambda sizes: float(sizes["n"] * sizes["C"]),
        trained=(0,),
    ),
    Domain(
        "gated_mixed_ce", {"n": (64, 262_144), "C": (2, 512)}, _inputs,
        ways=lambda sizes: {"ours": w2s_fast.gated_mixed_ce, "eager": plain_mixed_ce},
        flops=lambda sizes: 60.0 * sizes["n"] * sizes["C"], elements=lambda sizes: 2.0 * sizes["n"] * sizes["C"],
        trained=(0, 1, 3), always=True,
    ),
]  # fmt: skip
