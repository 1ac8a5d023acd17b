"""Per-step advantages (arXiv 2406.14532): pairs at the pit are worth more data than fine-tuning on right solutions.

Problems are chains of four sums. The base model learnt from solutions half of whose steps are marked shortcuts, right
only where nothing is carried or borrowed: spurious steps, which stay in right solutions. It samples four solutions of
each new problem. The paper's comparison: DPO on pairs at the pit from 64 problems against fine-tuning on own right
solutions from 256, as many sequences a step; fine-tuning on the chosen step alone is the extra control. Accuracy of
sampled answers to 512 unseen problems. Rate for each arm on dev, of DPO the weight of the chosen steps' cross-entropy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common import language
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.language import Example
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.preference import per_step_advantage as method

from .. import arithmetic, llama, sequences
from ..protocol import Choice, Claim, choose

STEPS, SHORTCUTS, SAMPLES, UPDATES = 4, 0.5, 4, 32
QUESTION, SOLUTION, EQUALS = 3 * STEPS + 3, arithmetic.STEP * STEPS + 1, 5  # tokens; the place of = in a step
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
PIT, RIGHT, STEP_ALONE = "DPO on the pit, 64", "SFT on own right solutions, 256", "SFT on the pit's right step, 64"
GRIDS = {
    PIT: {"rate": RATES, "nll": (10.0, 100.0)}, RIGHT: {"rate": RATES}, STEP_ALONE: {"rate": RATES},
}  # fmt: skip
FULL = {"GRIDS": {
    PIT: {"rate": (2e-4, 5e-4, 1e-3, 2e-3, 4e-3), "nll": (1.0, 10.0, 100.0, 1000.0)},
    RIGHT: {"rate": (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)}, STEP_ALONE: {"rate": (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)},
}}  # fmt: skip
CLAIMS = [
    Claim("pairs at the pit from 64 problems beat own right solutions from 256 by 5 points", "sampled", PIT, RIGHT,
          0.05),
    Claim("and the pit's right step alone", "sampled", PIT, STEP_ALONE),
]  # fmt: skip


def shortened(problems: Tensor, draw: torch.Generator) -> Tensor:
    """Solutions half of whose steps are shortcuts, with a colon for =; they go on from their own value.

    A shortcut works on the last digit alone: 47+05:42 has no carry, 52-08:56 takes the smaller from the larger.
    """
    stated, short = arithmetic.values(problems), torch.rand(len(problems), STEPS, generator=draw) < SHORTCUTS
    for i in range(STEPS):
        before, term = stated[:, i], problems[:, i + 1]
        wrong = before - before % 10 + (before % 10 + term).abs() % 10
        stated[:, i + 1] = torch.where(short[:, i], wrong, (before + term).remainder(100))
    made = arithmetic.solutions(problems, stated)
    made[:, EQUALS :: arithmetic.STEP][short] = arithmetic.ASK
    return made


@lru_cache(maxsize=1)
def base() -> Any:
    """Trained on solutions with shortcuts; cached, the same for all seeds."""
    size, steps = llama.Size(64, 2, 4), 600

    def make() -> Any:
        model, draw = llama.llama(size, len(arithmetic.CHARACTERS), 0, positions=128), torch.Generator().manual_seed(0)

        def loss(_: int) -> Tensor:
            problems = arithmetic.draw(64, STEPS, draw)
            asked, made = arithmetic.questions(problems), shortened(problems, draw)
            labels = torch.cat((torch.full_like(asked, -100), made), 1)
            return model(input_ids=torch.cat((asked, made), 1), labels=labels, use_cache=False).loss

        llama.fit(model, loss, steps, 0.02)
        return model

    return llama.kept_model("effects-pit-base", [torch.__version__, STEPS, SHORTCUTS, size, steps], make)


@lru_cache(maxsize=64)
def material(seed: int, size: int) -> tuple[list[tuple[Example, Example]], list[Example]]:
    """Pairs at the pit, and own right solutions, from ``size`` problems."""
    problems = arithmetic.draw(size, STEPS, torch.Generator().manual_seed(seed + 1))
    asked = arithmetic.questions(problems)
    truth = {tuple(q): int(v) for q, v in zip(asked.tolist(), arithmetic.values(problems)[:, -1], strict=True)}

    def right(prompt: list[int], solution: list[int]) -> bool:
        part = solution[: SOLUTION - 1]
        if len(part) < SOLUTION - 1:
            return False
        tens, ones = part[-3], part[-2]
        return 1 <= tens <= 10 and 1 <= ones <= 10 and 10 * (tens - 1) + ones - 1 == truth[tuple(prompt)]

    def split(solution: list[int]) -> list[list[int]]:
        return [solution[i : i + arithmetic.STEP] for i in range(0, STEPS * arithmetic.STEP, arithmetic.STEP)]

    pairs = method.step_pairs(base(), None, asked.tolist(), right, split, samples=SAMPLES, max_new_tokens=SOLUTION,
                              seed=seed) if size == 64 else []  # fmt: skip
    many = asked.repeat_interleave(SAMPLES, 0)
    made = arithmetic.sample(base(), many, SOLUTION, 1.0, torch.Generator().manual_seed(seed)).tolist()
    own = [Example(p, s) for p, s in zip(many.tolist(), made, strict=True) if right(p, s)]
    return pairs, own


def run(arm: str, seed: int, on: str, rate: float, nll: float = 0.0) -> float:
    recipe = Recipe(UPDATES, rate, batch=64, schedule="linear", warmup=0.1, clip=None, seed=seed)
    if arm == PIT:
        model, pairs = llama.clone(base()), language.referenced(base(), material(seed, 64)[0])
        loader = shuffled(pairs, 32, seed=seed, collate=language.collate_pairs)
        train(model, lambda m, batch: method.loss(m, batch, beta=0.1, nll=nll), loader, recipe)
    else:
        given = material(seed, 256)[1] if arm == RIGHT else [good for good, _ in material(seed, 64)[0]]
        model = sequences.fine_tuned(base(), given, recipe)
    return sequences.accuracy(model, sequences.unseen(on, seed, 512, STEPS), 1.0, seed)


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda arm=arm, **setting: run(arm, **setting), grid) for arm, grid in GRIDS.items()}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    before = sequences.accuracy(base(), sequences.unseen("test", seed, 512, STEPS), 1.0, seed)
    return {"base model": {"sampled": before},
            **{arm: {"sampled": run(arm, seed, "test", **chosen[arm])} for arm in GRIDS}}  # fmt: skip
