"""Stability gap (arXiv 2205.13452): evaluate after every update, and see what a switch of tasks does.

`ContinualEvaluator` evaluates all tasks begun so far in one forward pass on a fixed random part of their test sets and
keeps `w2s_fast.metrics.StreamMetrics`. Experience replay minimises ``a L_new + (1 - a) L_memory``. At a switch the new
task's gradient is large while that of the memory is near zero, its tasks being at their optimum: the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from ...data import KeyedPermutation, MixtureSampler
from ...data._hash import Ints
from ...metrics import StreamMetrics, segment_mean
from ._fit import Loss, classify, device_of, moved


def random_part(dataset: Any, count: int, seed: int) -> Subset[Any]:
    """``count`` items of a dataset (all where there are fewer), the same for the same seed."""
    import numpy as np

    places: Ints = np.arange(min(count, len(dataset)))
    return Subset(dataset, KeyedPermutation(len(dataset), seed, "part")(places).tolist())


class ContinualEvaluator:
    """Accuracies of every task begun, every ``period`` updates, in one forward of at most ``per_task`` samples a task.

    Args:
        tests: map-style datasets of ``(x, y)``, one a task.
        per_task: samples of each (the paper takes 1000).
        period: updates between evaluations.
        windows, beta: of `StreamMetrics`.
    """

    def __init__(
        self, tests: Sequence[Any], *, per_task: int = 1000, period: int = 1, windows: Sequence[int] = (10, 100),
        beta: int = 10, seed: int = 0,
    ) -> None:  # fmt: skip
        self.metrics = StreamMetrics(len(tests), windows=windows, beta=beta)
        self.history: list[list[float]] = []  # an accuracy a task begun, evaluation by evaluation
        parts = [random_part(test, per_task, seed) for test in tests]
        self._parts = [next(iter(DataLoader(part, len(part)))) for part in parts]
        self._begun: list[int] = []
        self._period, self._updates = period, 0

    def begin(self, task: int) -> None:
        """Training goes over to this task."""
        self.metrics.begin(task)
        self._begun.append(task)

    @torch.no_grad()
    def after_update(self, model: nn.Module) -> None:
        """Call after every update of the model, which keeps its mode."""
        self._updates += 1
        if self._updates % self._period:
            return
        training, device = model.training, device_of(model)
        model.eval()
        x = torch.cat([self._parts[task][0] for task in self._begun]).to(device)
        y = torch.cat([self._parts[task][1] for task in self._begun]).to(device)
        task_of = torch.cat([torch.full((len(self._parts[task][1]),), task) for task in self._begun]).to(device)
        found = segment_mean(model(x).argmax(-1) == y, task_of, self.metrics.tasks)
        model.train(training)
        self.metrics.update(found.total, found.number)
        self.history.append([found.mean[task].item() for task in self._begun])


def replay_loss(model: nn.Module, new: Any, memory: Any, share: float, loss: Loss = classify) -> Tensor:
    """``a L_new + (1 - a) L_memory``, a the share."""
    return share * loss(model, new) + (1 - share) * loss(model, memory)


def endless(dataset: Any, batch_size: int, seed: int = 0) -> Iterator[Any]:
    """Batches for ever, every item once before any comes again; for data and for a memory of parts (ConcatDataset)."""
    parts: list[Any] = list(dataset.datasets) if isinstance(dataset, ConcatDataset) else [dataset]
    sampler = MixtureSampler(parts, num_samples=1 << 40, seed=seed, rank=0, world_size=1)
    return iter(DataLoader(dataset, batch_size, sampler=sampler))


def train_task(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, memory: Sequence[Any],
    evaluator: ContinualEvaluator, *, task: int, steps: int, batch_size: int, share: float = 0.5,
    loss: Loss = classify, seed: int = 0,
) -> None:  # fmt: skip
    """Learn a task by experience replay from the earlier ones' memories, evaluated after every update."""
    evaluator.begin(task)
    device, new = device_of(model), endless(data, batch_size, seed)
    old = endless(ConcatDataset(memory), batch_size, seed + 1) if memory else None
    for _ in range(steps):
        batch = moved(next(new), device)
        value = loss(model, batch) if old is None else replay_loss(model, batch, moved(next(old), device), share, loss)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        evaluator.after_update(model)
