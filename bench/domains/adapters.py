"""A frozen layer with a LoRA or DoRA adapter, from a token to a small training batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..domain import Domain, Random, Sizes

RANK, SCALE = 16, 2.0


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    inside, outside = sizes["I"], sizes["O"]
    weight, A = (random(rows, inside, scale=inside**-0.5) for rows in (outside, RANK))
    return random(sizes["N"], inside), weight, A, random(outside, RANK, scale=0.1), random(outside, scale=0.1, offset=1)


def _layer(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    return (F.linear(x, weight) + F.linear(F.linear(x, A), B) * SCALE) * gain


DOMAINS = [
    Domain(
        "lora_linear", {"N": (1, 2048), "O": (128, 4096), "I": (128, 4096)}, _inputs,
        ways=lambda sizes: {
            "ours": lambda x, weight, A, B, gain: w2s_fast.lora_linear(x, weight, A, B, scale=SCALE, gain=gain),
            "eager": _layer,
        },
        flops=lambda sizes: 2.0 * sizes["N"] * (sizes["O"] * sizes["I"] + RANK * (sizes["O"] + sizes["I"])),
        elements=lambda sizes: float(max(sizes["N"] * max(sizes["O"], sizes["I"]), sizes["O"] * sizes["I"])),
        trained=(0, 2, 3, 4),
        cases={f"N{n}-1024x1024": {"N": n, "O": 1024, "I": 1024} for n in (1, 16, 512)},
        bytes=lambda sizes: 4.0 * (sizes["N"] * (sizes["O"] + sizes["I"]) + sizes["O"] * sizes["I"]),
        prediction="two large products of four: level on Intel, whose library runs them at our rate, 1.6 to 2 on AMD, "
        "where it runs them at half of it; one row is bound by reading the weight",
    ),
]  # fmt: skip
