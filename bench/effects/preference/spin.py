"""SPIN (arXiv 2401.01335): self-play improves a fine-tuned model without a new human answer.

The model is trained on chains of two sums whose writers forget 45 % of the carries and borrows, then fine-tuned on the
right solutions of 256 problems; then three rounds on the same 256, the last at a fifth of the rate. Accuracy of
sampled solutions to 1,024 unseen problems, every step right. There is no contest with continued fine-tuning: at p = p_t
SPIN's expected gradient is lambda / 2 times that of fine-tuning on the same answers, so none is to be expected; its
accuracy is measured beside it. Rate and lambda on dev.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.preference import spin

from .. import arithmetic, llama, sequences
from ..protocol import Choice, Claim, choose

STEPS, ANSWERS, FORGOTTEN, ROUNDS = 2, 256, 0.45, 3
GRID = {"rate": (3e-4, 5e-4), "lam": (1.0, 5.0)}
FULL = {"GRID": {"rate": (1e-4, 3e-4, 5e-4, 1e-3), "lam": (0.2, 1.0, 5.0)}}
CLAIMS = [
    Claim("three rounds improve the fine-tuned model, sampled", "sampled", "SPIN", "SFT"),
    Claim("by 5 points", "sampled", "SPIN", "SFT", 0.05),
]


def forgetful(problems: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Running values of writers who keep the tens as they were in a ``share`` of the steps."""
    stated = [problems[:, 0]]
    for term in problems[:, 1:].unbind(1):
        true = stated[-1] + term
        slip = torch.rand(len(term), generator=draw) < share
        stated.append(torch.where(slip, 10 * (stated[-1] // 10) + true % 10, true).clamp(0, 99))
    return torch.stack(stated, 1)


@lru_cache(maxsize=1)
def base() -> Any:
    """Trained on the forgetful writers; the same for all seeds, from the cache."""
    size, draw, steps = llama.Size(64, 2, 4), torch.Generator().manual_seed(0), 1500

    def make() -> Any:
        model = llama.llama(size, len(arithmetic.CHARACTERS), 0, positions=64)

        def loss(_: int) -> Tensor:
            problems = arithmetic.draw(32, STEPS, draw)
            asked = arithmetic.questions(problems)
            ids = torch.cat((asked, arithmetic.solutions(problems, forgetful(problems, FORGOTTEN, draw))), 1)
            labels = ids.clone()
            labels[:, : asked.shape[1]] = -100
            return model(input_ids=ids, labels=labels, use_cache=False).loss

        llama.fit(model, loss, steps, 0.02)
        return model

    return llama.kept_model("effects-spin-base", [torch.__version__, STEPS, FORGOTTEN, size, steps], make)


@lru_cache(maxsize=8)
def tuned(seed: int) -> tuple[Any, list[Any]]:
    """The fine-tuned model, and the human answers."""
    human = sequences.examples(arithmetic.draw(ANSWERS, STEPS, torch.Generator().manual_seed(seed)))
    recipe = Recipe(ANSWERS // 32, 3e-4, batch=32, schedule="linear", warmup=0.1, clip=None, seed=seed)
    return sequences.fine_tuned(base(), human, recipe), human


def score(model: Any, seed: int, on: str) -> dict[str, float]:
    problems = sequences.unseen(on, seed, 1024, STEPS)
    return {name: sequences.accuracy(model, problems, t, seed, every_step=True)
            for name, t in (("sampled", 1.0), ("greedy", 0.0))}  # fmt: skip


def self_play(seed: int, on: str, rate: float, lam: float) -> dict[str, float]:
    first, human = tuned(seed)
    model = llama.clone(first)
    recipe = Recipe(32, rate, batch=32, schedule="linear", warmup=0.1, clip=None, seed=seed)
    spin.train(model, None, [e._asdict() for e in human], recipe=recipe, rounds=ROUNDS, lam=lam,
               max_new_tokens=arithmetic.STEP * STEPS + 1)  # fmt: skip
    return score(model, seed, on)


def choices() -> dict[str, Choice]:
    return {"SPIN": choose(lambda **setting: self_play(**setting)["sampled"], GRID)}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    first, human = tuned(seed)
    again = Recipe(32 * ROUNDS, 2e-3, batch=32, schedule="linear", warmup=0.1, clip=None, seed=seed)
    return {
        "SFT": score(first, seed, "test"), "SPIN": self_play(seed, "test", **chosen["SPIN"]),
        "continued SFT": score(sequences.fine_tuned(first, human, again), seed, "test"),
    }  # fmt: skip
