"""GRAPE (arXiv 2502.04194): learn from the response that the target finds likeliest, not from the strongest writer.

Three writers, rules with slips, answer every instruction, a chain of three sums, twice: from left to right (15 % of the
answers wrong), the same with the term before the value (10 %), from the last term to the first (2 %: the strongest).
The target, pre-trained on the first way until a fifth of its samples are right, learns for two epochs from one response
an instruction. Right final answers to 512 unseen instructions, whatever the way. The paper's premise is built in: one
writer writes as the target does, and it is not the strongest. The rate is chosen for each arm and size on dev.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common.language import Example
from w2s_fast.methods.preference import grape

from .. import arithmetic, llama, sequences
from ..protocol import Choice, Claim, choose

STEPS, LARGEST, SLIP, BATCH, EPOCHS, ANSWERS = 3, 9, 3, 32, 2, 2
#: way of writing and share of wrong answers
WRITERS = {"left to right": 0.15, "term before value": 0.10, "last term first": 0.02}
ARMS, SIZES, RATES = ("GRAPE", "strongest writer", "random"), (512,), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FULL = {"SIZES": (512, 1024), "RATES": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
CLAIMS = [
    Claim(f"GRAPE beats {other} at {size} instructions", f"sampled, {size}", "GRAPE", other)
    for size in SIZES for other in ARMS[1:]
]  # fmt: skip


def instructions(count: int, draw: torch.Generator) -> Tensor:
    """Problems whose terms can be added in any order, with a slip, without leaving 0 to 99."""
    made, margin = arithmetic.draw(count, STEPS, draw, LARGEST), STEPS * LARGEST + SLIP
    made[:, 0] = torch.randint(margin, 100 - margin, (count,), generator=draw)
    return made


def write(way: str, slips: float, given: Tensor, draw: torch.Generator) -> Tensor:
    """A writer's answers; a slip is one step wrong by 1 to 3, carried on to a wrong answer."""
    count = (len(given), 1)
    if way == "last term first":
        given = torch.cat((given[:, :1], given[:, 1:].flip(1)), 1)
    size = torch.randint(1, SLIP + 1, count, generator=draw) * (2 * torch.randint(2, count, generator=draw) - 1)
    place = torch.randint(1, STEPS + 1, count, generator=draw)
    slipped = (torch.rand(count, generator=draw) < slips) & (torch.arange(STEPS + 1) >= place)
    made = arithmetic.solutions(given, arithmetic.values(given) + size * slipped)
    if way == "term before value":  # 05+47=52; for 47+05=52;
        order = torch.tensor([3, 4, 2, 0, 1, 5, 6, 7, 8])
        made = torch.cat((made[:, :-1].unflatten(1, (STEPS, arithmetic.STEP))[..., order].flatten(1), made[:, -1:]), 1)
    return made


def rows(given: Tensor, draw: torch.Generator) -> list[dict[str, Any]]:
    """Every instruction with ``ANSWERS`` of every writer."""
    made = [write(way, slips, given, draw).tolist() for way, slips in WRITERS.items() for _ in range(ANSWERS)]
    asked = arithmetic.questions(given).tolist()
    return [{"prompt": p, "completions": list(c)} for p, *c in zip(asked, *made, strict=True)]


@lru_cache(maxsize=1)
def target() -> Any:
    """Trained on true solutions from left to right, 50 steps a round, until a fifth of its samples are right."""
    size, draw = llama.Size(64, 2, 4), torch.Generator().manual_seed(0)

    def make() -> Any:
        model = llama.llama(size, len(arithmetic.CHARACTERS), 0, positions=64)
        unseen = instructions(512, torch.Generator().manual_seed(40_000))

        def loss(step: int) -> Tensor:
            given = instructions(BATCH, draw)
            asked, made = arithmetic.questions(given), write("left to right", 0.0, given, draw)
            labels = torch.cat((torch.full_like(asked, -100), made), 1)
            return model(input_ids=torch.cat((asked, made), 1), labels=labels, use_cache=False).loss

        for _ in range(20):
            llama.fit(model, loss, 50, 0.02)
            if sequences.accuracy(model, unseen, 1.0, 0) >= 0.2:
                break
        return model

    return llama.kept_model("effects-grape-target", [torch.__version__, STEPS, LARGEST, SLIP, size], make)


def run(arm: str, size: int, rate: float, seed: int, on: str) -> dict[str, float]:
    draw = torch.Generator().manual_seed(seed)
    given = rows(instructions(size, draw), draw)
    if arm == "GRAPE":
        which = [row["index"] for row in grape.select(target(), None, given, batch=256)]
    elif arm == "random":
        which = torch.randint(len(WRITERS) * ANSWERS, (size,), generator=draw).tolist()
    else:
        which = (len(WRITERS) * ANSWERS - 1 - torch.randint(ANSWERS, (size,), generator=draw)).tolist()
    chosen = [Example(row["prompt"], row["completions"][i]) for row, i in zip(given, which, strict=True)]
    model = sequences.fine_tuned(target(), chosen, llama.recipe(EPOCHS * size // BATCH, rate, batch=BATCH, seed=seed))
    unseen = instructions(512, torch.Generator().manual_seed({"dev": 20_000, "test": 30_000}[on] + seed))
    own = sum(i < ANSWERS for i in which) / size
    return {f"sampled, {size}": sequences.accuracy(model, unseen, 1.0, seed),
            f"greedy, {size}": sequences.accuracy(model, unseen, 0.0, seed),
            f"share of the target's own way, {size}": own}  # fmt: skip


def choices() -> dict[str, Choice]:
    def dev(arm: str, size: int) -> Choice:
        return choose(lambda rate, seed, on: run(arm, size, rate, seed, on)[f"sampled, {size}"], {"rate": RATES})

    return {f"{arm}, {size}": dev(arm, size) for arm in ARMS for size in SIZES}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    def both(arm: str) -> dict[str, float]:
        parts = [run(arm, size, chosen[f"{arm}, {size}"]["rate"], seed, "test") for size in SIZES]
        return {name: value for part in parts for name, value in part.items()}

    return {arm: both(arm) for arm in ARMS}
