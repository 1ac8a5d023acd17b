"""Certified training as the methods here share it: radius schedule, loop, and what becomes of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...nn import IntervalModule, bound


class Schedule(NamedTuple):
    """Epochs, those of the ramp of the radius (first, length), batch and learning rate; x 0.2 at 70 % and 90 %."""

    epochs: int = 40
    first: int = 1
    length: int = 20
    batch: int = 64
    rate: float = 2e-3


class Stage(NamedTuple):
    """Where a step is: the radius, its share of the largest, and whether the ramp is still on."""

    eps: float
    share: float
    ramp: bool


#: (interval module of the model, x, y, stage) -> loss
Loss = Callable[[IntervalModule, Tensor, Tensor, Stage], Tensor]
Ramp = Callable[[int, int, int], float]


def linear(step: int, first: int, last: int) -> float:
    """Share of the largest radius: 0 at the step ``first``, 1 from ``last`` on, linear between."""
    return float(step >= last) if step <= first or step >= last else (step - first) / (last - first)


def smoothed(step: int, first: int, last: int) -> float:
    """The same, but fourth power over the first quarter, then linear with the slope reached (auto_LiRPA's schedule)."""
    if step <= first or step >= last:
        return float(step >= last)
    middle = first + int(0.25 * (last - first))
    if middle == first:
        return linear(step, first, last)
    power = float(middle - first) ** 3
    alpha = 1 / ((last - middle) * 4 * power + (middle - first) * power)
    if step < middle:
        return alpha * (step - first) ** 4
    start = alpha * (middle - first) ** 4
    return start + (1 - start) * (step - middle) / (last - middle)


class Trainer:
    """Adam on ``loss(x, y, stage)``, gradient norm at most 10; batches are drawn by the seed."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor, Stage], Tensor], eps: float, schedule: Schedule,
        seed: int, ramp: Ramp,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.eps, self.schedule, self.ramp = model, loss, eps, schedule, ramp
        self.draw = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), schedule.rate)
        self.done = 0

    def stage(self, step: int, steps: int) -> Stage:
        """Of the step ``step`` (from 1), with ``steps`` an epoch."""
        first, last = self.schedule.first * steps, (self.schedule.first + self.schedule.length) * steps
        share = self.ramp(step, first, last)
        return Stage(share * self.eps, share, step <= last)

    def epoch(self, x: Tensor, y: Tensor) -> float:
        """One pass over the data; the mean loss."""
        self.model.train()
        batch, steps = self.schedule.batch, len(x) // self.schedule.batch
        fallen = sum(self.done >= int(share * self.schedule.epochs) for share in (0.7, 0.9))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate * 0.2**fallen
        order = torch.randperm(len(x), generator=self.draw)
        total = 0.0
        for i in range(steps):
            rows = order[i * batch : (i + 1) * batch]
            value = self.loss(x[rows], y[rows], self.stage(self.done * steps + i + 1, steps))
            self.optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            total += value.item()
        self.done += 1
        return total / steps


def train(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, eps: float, schedule: Schedule, seed: int, ramp: Ramp,
    tick: Callable[[float], None] = lambda _: None,
) -> float:  # fmt: skip
    """All epochs of the schedule; seconds taken. ``tick`` gets the loss of every epoch."""
    trainer = Trainer(model, partial(loss, bound(model)), eps, schedule, seed, ramp)
    begin = time.perf_counter()
    for _ in range(schedule.epochs):
        tick(trainer.epoch(x, y))
    return time.perf_counter() - begin
