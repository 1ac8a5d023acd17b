"""Preference pairs from real text: two spans follow a prompt, a property of the text says which is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Properties with a number between 0 and 1 for a text.
REWARDS: dict[str, Callable[[str], float]] = {
    "letters": lambda t: sum(c.isalpha() or c == " " for c in t) / max(1, len(t)),
    "short lines": lambda t: min(1.0, 10 * t.count("\n") / max(1, len(t))),
}


class Pairs(NamedTuple):
    """``ids [2b, S]``: b prompts with the chosen response, then the same with the rejected one; labels with -100."""

    ids: Tensor
    labels: Tensor


def pairs(tok: Any, ids: Tensor, reward: str, count: int, generator: torch.Generator, *, prompt: int = 16,
          response: int = 32) -> Pairs:  # fmt: skip
    """Random prompts and spans of a stream, ordered by ``REWARDS[reward]``."""
    spans = torch.arange(response)
    starts = torch.randint(len(ids) - prompt - response, (3, count), generator=generator)
    prompts = ids[starts[0][:, None] + torch.arange(prompt)]
    first, second = ids[starts[1][:, None] + spans], ids[starts[2][:, None] + spans]
    judge = REWARDS[reward]
    better = torch.tensor([
        judge(a) >= judge(b) for a, b in zip(*(tok.decode_batch(x.tolist()) for x in (first, second)), strict=True)
    ])[:, None]  # fmt: skip
    whole = torch.cat((
        torch.cat((prompts, torch.where(better, first, second)), 1),
        torch.cat((prompts, torch.where(better, second, first)), 1),
    ))  # fmt: skip
    labels = whole.clone()
    labels[:, :prompt] = -100
    return Pairs(whole, labels)


def mean_reward(tok: Any, sequences: Tensor, prompt: int, reward: str) -> float:
    """Mean of a property over the continuations ``sequences[:, prompt:]``."""
    texts = tok.decode_batch(sequences[:, prompt:].tolist())
    return sum(REWARDS[reward](t) for t in texts) / len(texts)
