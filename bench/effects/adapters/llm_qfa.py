"""LLM-QFA (arXiv 2405.20202): a mean width that goes up and down, against widths drawn uniformly, for one model of all.

A Llama of width 48 that knows docstrings (`bench.effects.adapted`) is quantised to 2, 3 and 4 bits in groups of 16;
adapters of rank 3, one for each projection and width, learn code for 120 steps. Balanced: two waves of the mean width.
Nats a token at 2, 3 and 4 bits in all layers, and the mean of four mixtures; perplexities and what is forgotten of the
docstrings are means over the three widths (of their logarithms). The rate is chosen on dev, by the mean over the three.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.adapters import llm_qfa

from .. import adapted
from ..adapted import LENGTH
from ..protocol import Choice, Claim, choose
from ..text import Domain

GROUP, RANK, STEPS, PERIOD, MIXTURES, RATES = 16, 3, 120, 60, 4, (1e-2, 3e-2, 1e-1)
SEEDS = range(10)
CLAIMS = [
    Claim("at 2 bits in all layers the balanced schedule is better by 0.008 nats", "2 bits", "balanced", "uniform",
          0.008, "lower"),
    Claim("at 4 bits in all layers the balanced schedule is better", "4 bits", "balanced", "uniform", 0.0, "lower"),
    Claim("mixtures lose at most 0.01 nats by it", "mixed", "balanced", "uniform", -0.01, "lower"),
    Claim("training helps 2 bits", "2 bits", "balanced", "untrained", 0.0, "lower"),
]  # fmt: skip


def trained(seed: int, steps: int, rate: float = 1e-2, balanced: bool = True) -> tuple[Any, dict[str, float]]:
    """The model, and what its training took."""
    model = adapted.base(seed)
    recipe = Recipe(steps, rate, batch=4, warmup=0.1, floor=0.1, seed=seed)
    start = time.process_time()
    done = llm_qfa.train(model, None, adapted.rows("code"), recipe=recipe, balanced=balanced, period=PERIOD, rank=RANK,
                         group=GROUP, length=LENGTH)  # fmt: skip
    return model, adapted.costs(done, time.process_time() - start) if steps else {}


def loss(model: Any, bits: int | Sequence[int], on: str, domain: Domain = "code") -> float:
    llm_qfa.use(model, bits)
    return adapted.loss(model, domain, on)


def mean(model: Any, on: str, domain: Domain = "code") -> float:
    """Over the widths."""
    return sum(loss(model, bits, on, domain) for bits in llm_qfa.BITS) / len(llm_qfa.BITS)


def choices() -> dict[str, Choice]:
    def run(rate: float, seed: int, on: str, balanced: bool) -> float:
        return mean(trained(seed, STEPS, rate, balanced)[0], on)

    return {name: choose(lambda rate, seed, on, b=name == "balanced": run(rate, seed, on, b), {"rate": RATES},
                         better="lower") for name in ("uniform", "balanced")}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    models = {"untrained": trained(seed, 0)}
    models |= {name: trained(seed, STEPS, chosen[name]["rate"], name == "balanced") for name in chosen}
    draw = random.Random(9)
    mixtures = [draw.choices(llm_qfa.BITS, k=len(llm_qfa.layers(models["untrained"][0]))) for _ in range(MIXTURES)]
    found = {}
    for name, (model, costs) in models.items():
        found[name] = {f"{bits} bits": loss(model, bits, "test") for bits in llm_qfa.BITS}
        found[name]["mixed"] = sum(loss(model, mixture, "test") for mixture in mixtures) / MIXTURES
        found[name] |= {"perplexity": math.exp(mean(model, "test")), "dev perplexity": math.exp(mean(model, "dev"))}
        found[name] |= {"forgotten": mean(model, "test", "general") - adapted.known(seed), **costs}
    return found
