"""Preference pairs from real text: two spans follow a prompt, a property of the text says which is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Properties with a number between 0 and 1 for a text.
REWARDS: dict[str, Callable[[str], float]] = {
    "letters": lambda t: sum(c.isalpha() or c == " " for c in t) / max(1, len(t)),
    "short lines": lambda t: min(1.0, 10 * t.count("\n") / max(1, len(t))),
}


def rows(tok: Any, ids: Tensor, reward: str, count: int, generator: torch.Generator, *, prompt: int = 16,
         response: int = 32) -> list[dict[str, list[int]]]:  # fmt: skip
    """Random prompts and spans of a stream, ordered by ``REWARDS[reward]``, as the methods take them."""
    spans, judge = torch.arange(response), REWARDS[reward]
    starts = torch.randint(len(ids) - prompt - response, (3, count), generator=generator)
    prompts = ids[starts[0][:, None] + torch.arange(prompt)].tolist()
    first, second = (ids[start[:, None] + spans].tolist() for start in starts[1:])
    made = []
    for p, a, b in zip(prompts, first, second, strict=True):
        better, worse = (a, b) if judge(tok.decode(a)) >= judge(tok.decode(b)) else (b, a)
        made.append({"prompt": p, "chosen": better, "rejected": worse})
    return made


def mean_reward(tok: Any, completions: list[list[int]], reward: str) -> float:
    """Mean of a property over completions."""
    return sum(REWARDS[reward](tok.decode(ids)) for ids in completions) / len(completions)
