"""AST (arXiv 2407.20584): 2:4 retraining with a mask that moves and settles, and the dense model as teacher.

A pre-trained Llama of width 48 (`bench.effects.adapted`) is pruned to 2:4 and learns docstrings for 80 more steps:
with the first mask; with it and distillation (2/3 of the loss); with both and a mask that is renewed every 10 steps,
the decay of pruned weights growing to 0.03 over 20 steps. The rate is chosen on dev for each. *Moved* is the share of
entries that flip at renewals, over all of them, by that share at a decay of 0.001.
"""

from __future__ import annotations

from typing import Any

from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods.adapters import ast

from .. import adapted
from ..adapted import LENGTH, Arm, Plan
from ..protocol import Choice, Claim

STEPS, RAMP, PUSH, RATES = 80, 20, 3e-2, (3e-4, 1e-3, 3e-3)
CLAIMS = [
    Claim("AST beats the fixed mask by 0.03 nats", "loss", "AST", "fixed mask", 0.03, "lower"),
    Claim("AST is at most 0.1 nats behind the dense model", "loss", "AST", "dense", -0.1, "lower"),
    Claim("the moving mask helps: AST beats a fixed mask, distilled", "loss", "AST", "fixed mask, distilled", 0.0,
          "lower"),
    Claim("a decay of 0.03 lets a quarter of the mask move that moves at 0.001", "moved", "AST", 0.25, 0.0, "lower"),
]  # fmt: skip


def retrained(share: float, renew_every: int, push: float = 0.0) -> Arm:
    def arm(model: Any, recipe: Recipe) -> Trained:
        return ast.train(model, None, adapted.rows("general"), recipe=recipe, share=share, ramp=RAMP,
                         push=push, renew_every=renew_every, length=LENGTH)  # fmt: skip

    return arm


def flips(seed: int, rate: float, push: float) -> float:
    """Shares of entries that flipped, all renewals together."""
    found, own = [0.0], ast.renew
    ast.renew = lambda *args: found.append(own(*args)) or found[-1]
    try:
        adapted.trained(plan()._replace(arms={"": retrained(2 / 3, 10, push)}), "", seed, STEPS, rate)
    finally:
        ast.renew = own
    return sum(found)


ARMS: dict[str, Arm] = {"fixed mask": retrained(0.0, 0), "fixed mask, distilled": retrained(2 / 3, 0),
                        "AST": retrained(2 / 3, 10, PUSH)}  # fmt: skip


def plan() -> Plan:
    return Plan(ARMS, {arm: {"rate": RATES} for arm in ARMS}, adapted.base, "general", STEPS)


def choices() -> dict[str, Choice]:
    return adapted.choices(plan())


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = adapted.measure(plan(), seed, chosen, start="dense")
    pruned = adapted.base(seed)
    ast.mask(pruned)
    found["one shot"] = adapted.columns(pruned, "general")
    rate = chosen["AST"]["rate"]
    found["AST"]["moved"] = flips(seed, rate, PUSH) / flips(seed, rate, 1e-3)
    return found
