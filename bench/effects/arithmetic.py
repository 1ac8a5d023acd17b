"""Arithmetic with a verifier: chains of additions and subtractions, solved step by step, one character a token.

A problem is a start and signed terms, ``[count, 1 + steps]``; its running value stays within 0 to 99. Numbers have two
digits, so that every question and every solution of one number of steps has one length and a batch needs no padding:

    question  47+05-08:                 3 steps + 3 tokens
    solution  47+05=52;52-08=44;⏎       9 steps + 1 tokens, the last one `END`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHARACTERS = "\n0123456789+-=;:"
END = 0  # the id that ends a solution
PLUS, MINUS, EQUALS, NEXT, ASK = (CHARACTERS.index(c) for c in "+-=;:")
STEP = 9  # tokens of a step: 47+05=52;


def draw(count: int, steps: int, generator: torch.Generator, largest: int = 9) -> Tensor:
    """Random problems ``[count, 1 + steps]`` with terms of 1 to ``largest`` (at most 49) in size."""
    value = torch.randint(100, (count,), generator=generator)
    columns = [value]
    for _ in range(steps):
        term = torch.randint(1, largest + 1, (count,), generator=generator)
        term *= 2 * torch.randint(2, (count,), generator=generator) - 1
        # the other sign where the value would leave its range
        term = torch.where((value + term < 0) | (value + term > 99), -term, term)
        value = value + term
        columns.append(term)
    return torch.stack(columns, 1)


def values(problems: Tensor) -> Tensor:
    """Running values ``[count, 1 + steps]``; the last column is the answer."""
    return problems.cumsum(1)


def encode(texts: list[str]) -> Tensor:
    """Ids of texts of one length: ``[count, length]``."""
    return torch.tensor([[CHARACTERS.index(c) for c in text] for text in texts])


def decode(ids: Tensor) -> list[str]:
    """The inverse of `encode`."""
    return ["".join(CHARACTERS[i] for i in row) for row in ids.tolist()]


def _number(value: Tensor) -> list[Tensor]:
    return [value // 10 + 1, value % 10 + 1]


def _sign(term: Tensor) -> Tensor:
    return torch.where(term < 0, MINUS, PLUS)


def questions(problems: Tensor) -> Tensor:
    """Ids ``[count, 3 steps + 3]``."""
    start, *terms = problems.unbind(1)
    parts = _number(start)
    for term in terms:
        parts += [_sign(term), *_number(term.abs())]
    return torch.stack([*parts, torch.full_like(start, ASK)], 1)


def solutions(problems: Tensor, stated: Tensor | None = None) -> Tensor:
    """Ids ``[count, 9 steps + 1]`` of the solutions that state the running values ``stated``, by default the true ones.

    A step starts from the value stated before it; so with a wrong value in the middle the arithmetic after it can still
    be right, and the answer wrong.
    """
    stated = values(problems) if stated is None else stated
    parts: list[Tensor] = []
    for i in range(1, problems.shape[1]):
        term = problems[:, i]
        parts += [*_number(stated[:, i - 1]), _sign(term), *_number(term.abs())]
        parts += [torch.full_like(term, EQUALS), *_number(stated[:, i]), torch.full_like(term, NEXT)]
    return torch.stack([*parts, torch.full_like(parts[0], END)], 1)


class Grade(NamedTuple):
    """steps ``[count, steps]``: the step stands in the true solution; answer ``[count]``: -1 if unreadable; right."""

    steps: Tensor
    answer: Tensor
    right: Tensor


def grade(problems: Tensor, made: Tensor) -> Grade:
    """Check solutions ``made [count, at least 9 steps]`` step by step, and the answer by itself."""
    steps = problems.shape[1] - 1
    made, truth = made[:, : STEP * steps], solutions(problems)[:, : STEP * steps]
    tens, ones = made[:, -3], made[:, -2]
    readable = (tens >= 1) & (tens <= 10) & (ones >= 1) & (ones <= 10)
    answer = torch.where(readable, 10 * (tens - 1) + ones - 1, -1)
    found = (made == truth).unflatten(1, (steps, STEP)).all(2)
    return Grade(found, answer, answer == values(problems)[:, -1])


def rows(prompts: Tensor, responses: Tensor) -> list[dict[str, list[int]]]:
    """As the methods take them: token ids."""
    return [{"prompt": p, "completion": c} for p, c in zip(prompts.tolist(), responses.tolist(), strict=True)]


@torch.no_grad()
def sample(
    model: Any, prompts: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``length`` tokens after each of ``prompts [count, any]`` from a model of transformers; greedy at temperature 0.

    The prompts may end anywhere, also within a solution: to value a step, sample what follows it.
    """
    from w2s_fast.integrations.transformers import CachedModel

    reader, made = CachedModel(model), []
    logits = reader.start(prompts)
    for i in range(length):
        logits = logits.float()
        if temperature > 0:
            made.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0])
        else:
            made.append(logits.argmax(-1))
        if i + 1 < length:
            logits = reader.step(made[-1])
    return torch.stack(made, 1)
