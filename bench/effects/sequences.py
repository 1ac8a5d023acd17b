"""Rows of token ids for the language methods, and how well a model solves arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common import language
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.language import Example
from w2s_fast.methods._common.loop import train

from . import arithmetic, llama


def whole(ids: Tensor, prompt: int) -> list[Example]:
    """Rows ``[N, S]`` whose tokens from ``prompt`` on count."""
    return [Example(row[:prompt], row[prompt:]) for row in ids.tolist()]


def fine_tuned(model: Any, given: list[Example], recipe: Any) -> Any:
    """A copy trained on the completions."""
    copy = llama.clone(model)
    loader = shuffled(given, recipe.batch, seed=recipe.seed, collate=language.collate)
    train(copy, language.cross_entropy, loader, recipe)
    return copy.eval()


def examples(problems: Tensor, stated: Tensor | None = None) -> list[Example]:
    """Questions with the solutions that state these running values, by default the right ones."""
    ids = torch.cat((arithmetic.questions(problems), arithmetic.solutions(problems, stated)), 1)
    return whole(ids, arithmetic.questions(problems).shape[1])


def accuracy(model: Any, problems: Tensor, temperature: float, seed: int, *, every_step: bool = False) -> float:
    """Share of problems whose answer (or every step) is right."""
    draw, length = torch.Generator().manual_seed(10_000 + seed), arithmetic.STEP * (problems.shape[1] - 1) + 1
    made = arithmetic.sample(model.eval(), arithmetic.questions(problems), length, temperature, draw)
    grade = arithmetic.grade(problems, made)
    return (grade.steps.all(1) if every_step else grade.right).float().mean().item()


def unseen(part: str, seed: int, count: int, steps: int, **how: Any) -> Tensor:
    """Problems of the dev or the test part: other draws than any training, and than each other."""
    draw = torch.Generator().manual_seed({"dev": 20_000, "test": 30_000}[part] + seed)
    return arithmetic.draw(count, steps, draw, **how)
