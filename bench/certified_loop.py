"""The epochs of certified training that both sides of the comparison run, and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods.certified.ibp import PIXELS, Stage
from ..nn import bound
from .effects.data import Split, digits

Ramp = Callable[[float, float, float], float]


class Schedule(NamedTuple):
    """Epochs, those of the ramp of the radius (first, length), batch and learning rate; x 0.2 at 70 % and 90 %."""

    epochs: int = 40
    first: int = 1
    length: int = 20
    batch: int = 64
    rate: float = 2e-3


def data() -> tuple[Split, Split]:
    """Training (1437) and test digits (360), the same always."""
    parts = digits(0)
    return Split(*(torch.cat(pair) for pair in zip(parts["train"], parts["dev"], strict=True))), parts["test"]


def verified_error(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Share of samples without a certificate (sound in floating point) at radius eps, pixels within [0, 1]."""
    return 1 - float(bound(model.eval()).verified(x, y, eps, clip=PIXELS).double().mean())


def figure(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    made: Any = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(made)
    return made


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
