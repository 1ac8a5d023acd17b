"""TLEG (arXiv 2312.05614): descendants of 3 and 9 layers of one line of layers, documentation.

An auxiliary Llama of six layers (width 32) over 512 tokens of the standard library's documentation trains the two
sets of weights of the line; a descendant of another depth starts from it and trains all of its layers for some steps.
Stored: two layers. Arms: the line; "copy", one layer shared by the whole auxiliary model and copied (one layer
stored); "map", an ordinary model of six layers, layer l of L from its layer 6 l / L (six stored), both trained as
long; scratch. The rate of each arm's descendants is chosen on dev at depth 3.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from w2s_fast.methods._common.loop import train as run_loop
from w2s_fast.methods.growth.tleg import fit, linear_expand

from ..llama import Size
from ..protocol import Choice, Claim, choose
from ..transformer import blocks, loss, losses
from ._text import ids, model, recipe

WIDTH, AUXILIARY, DEPTHS, LENGTH, BATCH = 32, 6, (3, 9), 48, 6
STEPS, FIRST, AFTER = 150, 1e-2, 40
RATES = (3e-3, 1e-2, 3e-2)
ARMS = ("line", "copy", "map", "scratch")
CLAIMS = [
    Claim("3 layers: 0.4 nats below scratch after the same steps", "3 layers", "line", "scratch", 0.4, "lower"),
    Claim("9 layers: 0.4 nats below scratch after the same steps", "9 layers", "line", "scratch", 0.4, "lower"),
    Claim("3 layers, before any step: 1.5 nats below scratch", "3 layers, at first", "line", "scratch", 1.5, "lower"),
    Claim("3 layers: below one shared layer, copied", "3 layers", "line", "copy", 0.0, "lower"),
    Claim("9 layers: below one shared layer, copied", "9 layers", "line", "copy", 0.0, "lower"),
    Claim("9 layers: below layers of an ordinary model, six stored", "9 layers", "line", "map", 0.0, "lower"),
]


def network(layers: int, seed: int) -> Any:
    return model(Size(WIDTH, layers, 1), seed, LENGTH)


def data(count: int, seed: int) -> list[tuple[torch.Tensor]]:
    rows = blocks(ids("train"), count * BATCH, 50 + seed, LENGTH)
    return [(part,) for part in rows.split(BATCH)]


class Shared(nn.Module):
    """A model whose layers are all its first."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        for i in range(1, len(net.model.layers)):
            net.model.layers[i] = net.model.layers[0]

    def forward(self, **batch: Any) -> Any:
        return self.net(**batch)


@lru_cache(maxsize=32)
def ancestor(arm: str, seed: int) -> Any:
    """After the first training."""
    made = network(AUXILIARY, seed)
    steps = recipe(STEPS, FIRST, seed, 20)
    if arm == "line":
        fit(made, loss, data(STEPS, seed), steps)
    elif arm == "copy":
        run_loop(Shared(made), loss, data(STEPS, seed), steps)
    else:
        run_loop(made, loss, data(STEPS, seed), steps)
    return made


def descendant(arm: str, depth: int, seed: int) -> Any:
    if arm == "scratch":
        return network(depth, 1000 + seed)
    old = ancestor(arm, seed)
    if arm == "line":
        return linear_expand(old, depth)
    made = network(depth, seed)
    state = {name: t for name, t in old.state_dict().items() if ".layers." not in name}
    made.load_state_dict(state, strict=False)
    for i, layer in enumerate(made.model.layers):
        layer.load_state_dict(copy.deepcopy(old.model.layers[i * AUXILIARY // depth].state_dict()))
    return made


def run(arm: str, rate: float, seed: int, on: str, depth: int = 3) -> tuple[float, float]:
    """Nats a token before and after the descendant's steps."""
    made, rows = descendant(arm, depth, seed), blocks(ids(on), 384, 7, LENGTH)
    before = losses(made.eval(), rows).mean().item()
    run_loop(made, loss, data(AFTER, 500 + seed), recipe(AFTER, rate, seed, 10))
    return before, losses(made.eval(), rows).mean().item()


def choices() -> dict[str, Choice]:
    def score(arm: str, rate: float, seed: int, on: str) -> float:
        return run(arm, rate, seed, on)[1]

    return {arm: choose(partial(score, arm), {"rate": RATES}, better="lower") for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    for arm in ARMS:
        for depth in DEPTHS:
            before, after = run(arm, chosen[arm]["rate"], seed, "test", depth)
            found[arm] |= {f"{depth} layers": after, f"{depth} layers, at first": before}
    return found
