"""Prototypes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import wide
from ..cases.prototype_distance import _ours, _product, agreement
from ..domain import Domain, Random, Sizes


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    p = random(sizes["K"], sizes["D"])
    x = random.placed(0.5 * p[random.integers(sizes["K"], sizes["N"])].float() + random(sizes["N"], sizes["D"]).float())
    return x, p


DOMAINS = [
    Domain(
        "prototype_distance", {"N": (64, 16_384), "K": (10, 10_000), "D": (32, 1024)}, _inputs,
        ways=lambda sizes: {"ours": _ours, "eager": _product},
        flops=lambda sizes: 2.0 * sizes["N"] * sizes["K"] * sizes["D"],
        elements=lambda sizes: float(sizes["N"] * sizes["K"]), compare=agreement,
    ),
    Domain(
        "class_stats", {"N": (64, 16_384), "K": (10, 1000), "D": (32, 1024)},
        lambda random, sizes: (random(sizes["N"], sizes["D"]), random.integers(sizes["K"], sizes["N"])),
        ways=lambda sizes: {
            "ours": lambda x, y: w2s_fast.class_stats(x, y, sizes["K"]).sums,
            "eager": lambda x, y: (F.one_hot(y, sizes["K"]).to(wide(x).dtype).t() @ wide(x)).double(),
        },
        flops=lambda sizes: 2.0 * sizes["N"] * sizes["K"] * sizes["D"],
        elements=lambda sizes: float(sizes["N"] * max(sizes["K"], sizes["D"])),
    ),
]  # fmt: skip
