"""RS2 (repeated random sampling, arXiv 2305.18424): every epoch trains on another random part of the data.

Round e trains one pass over ``floor(r n)`` items; `w2s_fast.data.RepeatedRandomSubsetSampler` chooses them, without
replacement over rounds by default, so that every item is seen once in 1/r rounds. The learning rate is computed for
the ``rounds * ceil(r n / b)`` steps that are taken: it decays fully in the shorter run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...data import RepeatedRandomSubsetSampler
from ...optim import RewarmCosineLR
from ._fit import Loss, classify, fit


def total_steps(sampler: RepeatedRandomSubsetSampler, rounds: int, batch_size: int) -> int:
    """Updates of the whole run, for the schedule."""
    return rounds * math.ceil(len(sampler) / batch_size)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The paper's schedule: a cosine over all steps, without warm-up."""
    return RewarmCosineLR(optimizer, warmup=0, total=steps, min_ratio=1e-3)


def train(
    model: nn.Module, dataset: Any, optimizer: torch.optim.Optimizer, *, fraction: float, rounds: int, batch_size: int,
    loss: Loss = classify, schedule: Callable[[torch.optim.Optimizer, int], Any] | None = cosine,
    replacement: bool = False, labels: Any = None, seed: int = 0, rank: int | None = None, world_size: int | None =
    None, **loader: Any,
) -> list[float]:  # fmt: skip
    """Train ``model`` on a new random part of ``dataset`` in each of ``rounds``; the loss of every step.

    Args:
        model, dataset, optimizer: the user's; batches are moved to the model's device.
        fraction: of the dataset a round, in (0, 1].
        batch_size: of a rank.
        loss: ``loss(model, batch)``; default: cross-entropy of ``(x, y)``.
        schedule: ``schedule(optimizer, steps)`` makes the scheduler of the whole run; None for a constant rate.
        replacement, labels, seed, rank, world_size: see `RepeatedRandomSubsetSampler`.
        loader: for the DataLoader.
    """
    sampler = RepeatedRandomSubsetSampler(
        len(dataset), fraction, replacement=replacement, labels=labels, seed=seed, rank=rank, world_size=world_size,
        batch_size=batch_size if world_size else 1,
    )  # fmt: skip
    batches = DataLoader(dataset, batch_size, sampler=sampler, **loader)
    scheduler = schedule(optimizer, total_steps(sampler, rounds, batch_size)) if schedule else None
    found: list[float] = []
    for one in range(rounds):
        sampler.set_epoch(one)
        found += fit(model, batches, optimizer, loss, scheduler=scheduler)
    return found
