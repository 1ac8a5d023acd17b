"""Multi-level training (arXiv 2404.07999): a V-cycle against training from scratch at equal work, documentation.

A Llama of four layers over 512 tokens of the standard library's documentation; its half in width and depth. Work is
the matmul FLOPs of a token, a step of the large model being one unit. V-cycle: warm-up of the large model, coalesce,
train the small one, de-coalesce, interpolate with alpha 0.5, the rest of the units on the large model with a fresh
optimizer. Arms: scratch; "restarted", which breaks off after the same warm-up and starts its optimizer and schedule
again; the V-cycle. Each arm's rate is chosen on dev.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch

from w2s_fast.methods._common.loop import train as run_loop
from w2s_fast.methods.growth import coalesce, decoalesce, smaller
from w2s_fast.methods.growth.multi_level import fit

from ..llama import Size
from ..protocol import Choice, Claim, choose
from ..supervised import VOCABULARY
from ..transformer import blocks, loss, losses
from ._text import ids, model, recipe

SIZE, BATCH, LENGTH = Size(64, 4, 2), 6, 64
UNITS, BEFORE, INNER = 120, 12, 150
INNER_RATE = 2.0
RATES = (1e-2, 2e-2, 4e-2)
FULL = {"RATES": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)}
ARMS = ("scratch", "restarted", "v-cycle")
CLAIMS = [
    Claim("at equal work 0.02 nats a token below scratch", "loss", "v-cycle", "scratch", 0.02, "lower"),
    Claim("and below the same schedule without the small model", "loss", "v-cycle", "restarted", 0.02, "lower"),
    Claim("widening keeps the function: logits to 1e-4", "widening error", "v-cycle", 1e-4, 0.0, "lower"),
    Claim("coalescing undoes de-coalescing: weights to 1e-6", "identity error", "v-cycle", 1e-6, 0.0, "lower"),
]


def matmuls(size: Size) -> int:
    """Weights that a token is multiplied by; the head is the embedding."""
    return size.layers * (4 * size.width**2 + 9 * size.width**2) + VOCABULARY * size.width


#: Units that a step of the small model costs.
SMALL = matmuls(Size(SIZE.width // 2, SIZE.layers // 2, 1)) / matmuls(SIZE)


@lru_cache(maxsize=64)
def run(arm: str, rate: float, seed: int, on: str) -> float:
    net, steps = model(SIZE, seed, LENGTH), UNITS - round(INNER * SMALL)
    data = [(part,) for part in blocks(ids("train"), UNITS * BATCH, 50 + seed).split(BATCH)]
    if arm == "scratch":
        run_loop(net, loss, data, recipe(UNITS, rate, seed, BEFORE))
    elif arm == "restarted":
        run_loop(net, loss, data, recipe(BEFORE, rate, seed, BEFORE).but(warmup=1.0, schedule="constant"))
        run_loop(net, loss, data, recipe(UNITS - BEFORE, rate, seed, BEFORE))
    else:
        fit(net, loss, data, recipe(steps, rate, seed, BEFORE), inner=INNER, inner_rate=INNER_RATE,
            first=BEFORE / steps)  # fmt: skip
    return losses(net, blocks(ids(on), 512, 7)).mean().item()


@torch.no_grad()
def exactness(seed: int) -> dict[str, float]:
    """The largest difference of logits by widening, and of weights by widening and coalescing."""
    net = model(SIZE, seed, LENGTH).eval()
    half = smaller(net.config, depth=1)
    small = coalesce(net, half).eval()
    wide = decoalesce(small, net.config).eval()
    rows = blocks(ids("dev"), 8, 7)
    back = coalesce(wide, half)
    identity = max((p - q).abs().max().item() for p, q in zip(small.parameters(), back.parameters(), strict=True))
    return {"widening error": (wide(rows).logits - small(rows).logits).abs().max().item(), "identity error": identity}


def choices() -> dict[str, Choice]:
    return {arm: choose(partial(run, arm), {"rate": RATES}, better="lower") for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: {"loss": run(arm, chosen[arm]["rate"], seed, "test")} for arm in ARMS}
    found["v-cycle"] |= exactness(seed)
    return found
