"""High-stakes reliability (arXiv 2205.01663): adversarial rounds make a filter harder to pass, at the same quality.

Digits, class 8 is unsafe; MLP 64-96-96-2, 300 steps of 64 at rate 0.1; 650 digits train, 250 set the threshold so that
95 % of the safe ones pass. Single pixels of unsafe digits are substituted until they pass: edits needed with the tool
(candidates by the gradient) and without; unsafe digits of the test part that pass as they are, of all. Five rounds of
attacking all unsafe training digits (6 edits at most), adding them and training anew; control: as many copies with four
random edits. Rate, steps and edits are the text's; nothing is chosen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods.adversarial.high_stakes import edit, threshold

from ..protocol import Claim
from ..robust import Batches, fit, group, mlp, parts

UNSAFE, ACCEPT, TRAINED, STEPS, RATE, ROUNDS, BUDGET = 8, 0.95, 650, 300, 0.1, 5, 6
CLAIMS = [
    Claim("five rounds: 1.4 times the edits with the tool", "edits, tool", "five rounds", "1.4 of base"),
    Claim("1.25 times those of random edits as training data", "edits, tool", "five rounds", "1.25 of control"),
    Claim("1.4 times the edits without the tool", "edits, no tool", "five rounds", "1.4 of base"),
    Claim("the tool finds them with fewer edits", "edits, tool", "five rounds", "no tool", 0.0, "lower"),
    Claim("at most 2 points more unsafe digits pass as they are", "missed", "five rounds", "base", -2.0, "lower"),
    Claim("at least 91 % of the safe test digits pass", "accepted", "five rounds", 91.0),
]


def score_of(stack: Any) -> Any:
    def score(x: Tensor) -> Tensor:
        z = stack(x)
        return z[..., 1] - z[..., 0]

    return score


def picked(x: Tensor, y: Tensor) -> Tensor:
    """The unsafe digits of every seed, as many as the seed with the fewest has."""
    least = int((y == UNSAFE).sum(1).min())
    return torch.stack([a[b == UNSAFE][:least] for a, b in zip(x, y, strict=True)])


def trained(x: Tensor, y: Tensor, seeds: tuple[int, ...]) -> Any:
    models = [mlp(64, 96, 96, 2, seed=500 + seed) for seed in seeds]
    batches = Batches(x, (y == UNSAFE).long(), [1000 + seed for seed in seeds])
    return fit(models, batches, [RATE] * len(seeds), STEPS)


@lru_cache(maxsize=4)
def table(seeds: tuple[int, ...]) -> dict[str, dict[str, list[float]]]:
    data = parts(seeds, "test")
    x, y, cal_x, cal_y = data.x[:, :TRAINED], data.y[:, :TRAINED], data.x[:, TRAINED:], data.y[:, TRAINED:]
    unsafe = picked(x, y)

    def level(stack: Any) -> Tensor:
        with torch.no_grad():
            scores = score_of(stack)(cal_x)
        return torch.tensor([threshold(s[b != UNSAFE], ACCEPT) for s, b in zip(scores, cal_y, strict=True)])[:, None]

    def judged(stack: Any) -> dict[str, list[float]]:
        score, t, held = score_of(stack), level(stack), picked(data.held_x, data.held_y)
        with torch.no_grad():
            passed = score(data.held_x) < t
        safe = data.held_y != UNSAFE
        fast = edit(score, held, t, budget=20)
        slow = edit(score, held, t, budget=40, tool=False, generator=torch.Generator().manual_seed(4))
        shares = [100 * (passed & part).sum(1) / part.sum(1) for part in (safe, ~safe)]
        return {"edits, tool": fast.edits.double().mean(1).tolist(), "accepted": shares[0].tolist(),
                "edits, no tool": slow.edits.double().mean(1).tolist(), "missed": shares[1].tolist()}  # fmt: skip

    def extended(more: list[Tensor]) -> tuple[Tensor, Tensor]:
        whole = torch.cat((x, *more), 1)
        return whole, torch.cat((y, torch.full((len(y), whole.shape[1] - y.shape[1]), UNSAFE)), 1)

    base = trained(x, y, seeds)
    found, more, stack = {"base": judged(base)}, list[Tensor](), base
    for turn in range(ROUNDS):
        more.append(edit(score_of(stack), unsafe, level(stack), budget=BUDGET).x)
        stack = trained(*extended(more), seeds)
        if turn == 0:
            found["one round"] = judged(stack)
    found["five rounds"] = judged(stack)
    draw, copies = torch.Generator().manual_seed(8), []
    for _ in range(ROUNDS):
        places = torch.rand(unsafe.shape, generator=draw).topk(4, largest=False).indices
        copies.append(unsafe.scatter(-1, places, (torch.rand(places.shape, generator=draw) < 0.5).float()))
    found["control"] = judged(trained(*extended(copies), seeds))
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    seeds = group(seed)
    at = seeds.index(seed)
    found = {arm: {name: values[at] for name, values in row.items()} for arm, row in table(seeds).items()}
    for factor, arm in ((1.4, "base"), (1.25, "control")):
        found[f"{factor} of {arm}"] = {name: factor * found[arm][name] for name in ("edits, tool", "edits, no tool")}
    found["no tool"] = {"edits, tool": found["five rounds"]["edits, no tool"]}
    return found
