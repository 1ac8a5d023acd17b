"""Power-law rehearsal (arXiv 2401.10393): earlier tasks come back at a rate that falls as a power of their age.

While task t is learned, ``rho n_t`` of the samples of an epoch come from earlier tasks, task j with probability
proportional to ``(t - j)^-alpha`` (`w2s_fast.data.PowerLawRehearsalSampler`; the paper's exponent and share are not
known to us, 1 and 0.5 are our choice). Uniform rehearsal is at least as good where all tasks count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from ...data import PowerLawRehearsalSampler
from ...data.rehearsal import Kind
from ._fit import Loss, classify, fit


def train_tasks(
    model: nn.Module, tasks: Sequence[Any], optimizer: torch.optim.Optimizer, *, epochs: int, batch_size: int,
    alpha: float = 1.0, rho: float = 0.5, kind: Kind = "power", loss: Loss = classify, seed: int = 0,
    after_task: Callable[[int, nn.Module], None] = lambda task, model: None, **loader: Any,
) -> list[float]:  # fmt: skip
    """Learn datasets one after the other while rehearsing the earlier ones; the loss of every step.

    Args:
        model, optimizer: the user's.
        tasks: map-style datasets.
        epochs: of every task.
        alpha, rho, kind: see `PowerLawRehearsalSampler`.
        after_task: called with the task's number and the model when its training has ended.
        loader: for the DataLoader.
    """
    sampler = PowerLawRehearsalSampler(list(tasks), alpha=alpha, rho=rho, kind=kind, seed=seed)
    batches: DataLoader[Any] = DataLoader(ConcatDataset(tasks), batch_size, sampler=sampler, **loader)
    found: list[float] = []
    for task in range(len(tasks)):
        sampler.set_phase(task)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            found += fit(model, batches, optimizer, loss)
        after_task(task, model)
    return found
