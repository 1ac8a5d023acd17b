"""A mean teacher: the exponential moving average of a model's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ... import checks


class MeanTeacher:
    """A copy whose parameters follow ``p <- momentum p + (1 - momentum) q``; buffers (batch statistics) are the
    student's.

    Args:
        momentum: in [0, 1].

    Raises:
        ValueError, TypeError: naming `momentum`.
    """

    def __init__(self, student: nn.Module, momentum: float = 0.999) -> None:
        self.momentum = checks.number("methods.MeanTeacher", "momentum", momentum, low=0.0, high=1.0)
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.seen = 0

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """After a step of the student."""
        for own, new in zip(self.model.parameters(), student.parameters(), strict=True):
            own.lerp_(new.to(own.device), 1 - self.momentum)
        for kept, there in zip(self.model.buffers(), student.buffers(), strict=True):
            kept.copy_(there)

    def follow(self, student: nn.Module, step: int) -> None:
        """`update` if the student has made a step since the last call: for a loss that knows the step's number only."""
        if step > self.seen:
            self.update(student)
        self.seen = step

    def state_dict(self) -> dict[str, Any]:
        """The copy's, and the step that was seen last."""
        return {"model": self.model.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.seen = state["seen"]
