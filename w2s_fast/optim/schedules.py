"""Schedules of continual pre-training (papers 12, 78 and 41), as torch LRSchedulers with closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from ..data._hash import key_of, uniform

CoolDown = Literal["cosine", "inv_sqrt", "linear"]
COOL_DOWNS = ("cosine", "inv_sqrt", "linear")


class ClosedFormLR(LRScheduler):
    """A learning rate that is ``max_lr * factor(step)``; every group keeps its share of the largest group's rate.

    ``max_lr`` is the peak of the largest group, or None for the groups' ``initial_lr`` (their rate when the first
    scheduler was made). An optimizer that comes from a finished run still has that run's last rate: give ``max_lr``.
    Only ``param_groups`` are touched, so the optimizer may hold sharded parameters (FSDP2).

    Raises:
        ValueError, TypeError: naming `max_lr`.
    """

    def __init__(self, optimizer: Optimizer, max_lr: float | None, last_epoch: int) -> None:
        if max_lr is not None and last_epoch == -1:
            peak = checks.number(self._op, "max_lr", max_lr, low=0.0, open_low=True)
            present = [float(group["lr"]) for group in optimizer.param_groups]
            largest = max(present)
            for group, rate in zip(optimizer.param_groups, present, strict=True):
                group["initial_lr"] = peak * (rate / largest if largest else 1.0)
        super().__init__(optimizer, last_epoch)

    @property
    def _op(self) -> str:
        return f"optim.{type(self).__name__}"

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """The groups' rates at the present step; torch's schedulers call this."""
        share = self.factor(self.last_epoch)
        return [base * share for base in self.base_lrs]


def _steps(op: str, warmup: Any, total: Any) -> tuple[int, int]:
    total = checks.integer(op, "total", total, low=1)
    return checks.integer(op, "warmup", warmup, low=0, high=total), total


class RewarmCosineLR(ClosedFormLR):
    """Re-warm, then re-decay over the new data (arXiv 2403.08763).

    ``max_lr t / warmup`` for ``t < warmup``, then
    ``min + (max_lr - min) / 2 (1 + cos(pi (t - warmup) / (total - warmup)))``, ``min`` from ``total`` on.

    Args:
        optimizer: its groups keep their ratio.
        warmup: steps; the paper takes 1 % of ``total``.
        total: steps of the phase.
        max_lr: see `ClosedFormLR`.
        min_ratio: ``min / max_lr``.
        last_epoch: as in torch.

    Raises:
        ValueError, TypeError: naming `min_ratio`.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import RewarmCosineLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-5)
        >>> schedule = RewarmCosineLR(optimizer, warmup=10, total=1000, max_lr=3e-4)
        >>> round(3e-4 * schedule.factor(130), 10)
        0.0002903297
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup: int, total: int, max_lr: float | None = None, min_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:  # fmt: skip
        self.warmup, self.total = _steps(self._op, warmup, total)
        self.min_ratio = checks.number(self._op, "min_ratio", min_ratio, low=0.0, high=1.0)
        super().__init__(optimizer, max_lr, last_epoch)

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step."""
        if step < self.warmup:
            return step / self.warmup
        if step >= self.total:
            return self.min_ratio
        done = (step - self.warmup) / (self.total - self.warmup)
        return self.min_ratio + (1 - self.min_ratio) / 2 * (1 + math.cos(math.pi * done))


class InfiniteLR(ClosedFormLR):
    """Warm up, cool down to a constant rate that may last for ever, and anneal whenever a model is wanted (2403.08763).

    ``max_lr t / warmup`` up to ``warmup``; a cool-down to ``const = const_ratio max_lr`` at step ``cooldown``; then
    constant. With ``u = (t - warmup) / (cooldown - warmup)`` the cool-down is

    - cosine: ``const + (max_lr - const) / 2 (1 + cos(pi u))``;
    - inv_sqrt: ``max_lr + (const - max_lr) h(u) / h(1)``, ``h(u) = 1 / sqrt(1 + alpha u) - 1``;
    - linear: ``max_lr + (const - max_lr) u``.

    `start_annealing` at step s begins ``r (min / r)^((t - s) / n)`` for n steps, r the rate at s (``const`` once the
    cool-down is over), and ``min = min_ratio max_lr`` from then on. New data go on at ``const`` without re-warming:
    anneal a copy.

    Args:
        optimizer: its groups keep their ratio.
        warmup: steps.
        cooldown: the step at which the constant rate begins.
        kind: ``"cosine"``, ``"inv_sqrt"`` or ``"linear"``.
        const_ratio, min_ratio: of ``max_lr``; the defaults are 1.65e-4 and 3e-5 for 3e-4.
        alpha: of inv_sqrt.
        max_lr: see `ClosedFormLR`.
        last_epoch: as in torch.

    Raises:
        ValueError, TypeError: naming `warmup`, `cooldown`, `kind`, `const_ratio`, `min_ratio`, `alpha`.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import InfiniteLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        >>> schedule = InfiniteLR(optimizer, warmup=10, cooldown=250)
        >>> round(3e-4 * schedule.factor(130), 10), round(3e-4 * schedule.factor(600), 10)
        (0.0002325, 0.000165)
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup: int, cooldown: int, kind: CoolDown = "cosine", const_ratio: float = 0.55,
        min_ratio: float = 0.1, alpha: float = 10.0, max_lr: float | None = None, last_epoch: int = -1,
    ) -> None:  # fmt: skip
        self.warmup = checks.integer(self._op, "warmup", warmup, low=0)
        self.cooldown = checks.integer(self._op, "cooldown", cooldown, low=self.warmup)
        self.kind = checks.choice(self._op, "kind", kind, COOL_DOWNS)
        self.const_ratio = checks.number(self._op, "const_ratio", const_ratio, low=0.0, high=1.0, open_low=True)
        self.min_ratio = checks.number(self._op, "min_ratio", min_ratio, low=0.0, high=1.0, open_low=True)
        self.alpha = checks.number(self._op, "alpha", alpha, low=0.0, open_low=True)
        self.annealing: list[float] | None = None  # first step, steps, factor at the first step
        super().__init__(optimizer, max_lr, last_epoch)

    def start_annealing(self, steps: int) -> None:
        """Anneal from the present step on, over ``steps`` steps; at any step, also during warm-up or cool-down.

        Raises:
            ValueError, TypeError: naming `steps`.
            RuntimeError: if it has begun already.
        """
        steps = checks.integer(self._op, "steps", steps, low=1)
        if self.annealing is not None:
            checks.fail(self._op, "start_annealing", "called once", "a second call", error=RuntimeError)
        self.annealing = [self.last_epoch, steps, self._endless(self.last_epoch)]

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step."""
        if self.annealing is None or step < self.annealing[0]:
            return self._endless(step)
        first, steps, start = self.annealing
        if not start or step >= first + steps:
            return self.min_ratio
        return float(start * (self.min_ratio / start) ** ((step - first) / steps))

    def _endless(self, step: int) -> float:
        if step < self.warmup:
            return step / self.warmup
        if step >= self.cooldown:
            return self.const_ratio
        u = (step - self.warmup) / (self.cooldown - self.warmup)
        if self.kind == "cosine":
            return self.const_ratio + (1 - self.const_ratio) / 2 * (1 + math.cos(math.pi * u))
        share = u if self.kind == "linear" else self._h(u) / self._h(1)
        return 1 + (self.const_ratio - 1) * share

    def _h(self, u: float) -> float:
        return 1 / math.sqrt(1 + self.alpha * u) - 1


class WSDLR(ClosedFormLR):
    """Warm-up, stable, decay (Llama-3-SynE, arXiv 2407.18743).

    ``max_lr t / warmup`` for ``t < warmup``, ``max_lr`` up to ``stable_ratio total``, then
    ``max_lr max(floor, (total - t) / (total - stable_ratio total))``. The paper's default is a constant rate:
    ``stable_ratio=1``.

    Args:
        optimizer: its groups keep their ratio.
        total: steps.
        warmup: steps.
        stable_ratio: in [0, 1].
        floor: share of ``max_lr``.
        max_lr: see `ClosedFormLR`.
        last_epoch: as in torch.

    Raises:
        ValueError, TypeError: naming `stable_ratio`, `floor`.
    """

    def __init__(
        self, optimizer: Optimizer, *, total: int, warmup: int = 0, stable_ratio: float = 1.0, floor: float = 0.1,
        max_lr: float | None = None, last_epoch: int = -1,
    ) -> None:  # fmt: skip
        self.warmup, self.total = _steps(self._op, warmup, total)
        self.stable_ratio = checks.number(self._op, "stable_ratio", stable_ratio, low=0.0, high=1.0)
        self.floor = checks.number(self._op, "floor", floor, low=0.0, high=1.0)
        super().__init__(optimizer, max_lr, last_epoch)

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step."""
        if step < self.warmup:
            return step / self.warmup
        stable = self.stable_ratio * self.total
        if step <= stable or self.stable_ratio == 1:
            return 1.0
        return max(self.floor, (self.total - step) / (self.total - stable))


class ContextPhase(NamedTuple):
    """One phase: its steps, the longest sequence, the base of the rotary embedding, the rate's share of the peak."""

    steps: int
    length: int
    rope_base: float
    lr_ratio: float = 1.0


class ContextPhaseSchedule(ClosedFormLR):
    """Context that grows in phases (Qwen2.5, arXiv 2412.15115): length, rotary base and learning rate by step.

    The last phase lasts for ever. `length` and `rope_base` are those of the present step; `sequence_length` draws the
    length of one sequence: the longest with probability ``share``, else uniformly one of ``shorter`` (Turbo: 40 % at
    the present maximum). ``w2s_fast.methods.streams.scaling_recipe.set_rope_base`` gives a model its base.

    Args:
        optimizer: its groups keep their ratio.
        phases: (steps, length, rope_base, lr_ratio) each.
        share, shorter: of `sequence_length`.
        max_lr: see `ClosedFormLR`.
        last_epoch: as in torch.

    Raises:
        ValueError, TypeError: naming `share`, `phases`, steps of a phase, length of a phase, rope_base of a phase,
            lr_ratio of a phase.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import ContextPhase, ContextPhaseSchedule
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
        >>> phases = [ContextPhase(900, 4096, 1e4), ContextPhase(100, 32768, 1e6)]
        >>> schedule = ContextPhaseSchedule(optimizer, phases)
        >>> schedule.phase_at(899).length, schedule.phase_at(900).length
        (4096, 32768)
    """

    def __init__(
        self, optimizer: Optimizer, phases: Sequence[ContextPhase | tuple[float, ...]], *, share: float = 0.4,
        shorter: Sequence[int] = (), max_lr: float | None = None, last_epoch: int = -1,
    ) -> None:  # fmt: skip
        self.phases = [ContextPhase(*phase) for phase in phases]  # type: ignore[arg-type]
        if not self.phases:
            checks.fail(self._op, "phases", "at least one", "none")
        for phase in self.phases:
            checks.integer(self._op, "steps of a phase", phase.steps, low=1)
            checks.integer(self._op, "length of a phase", phase.length, low=1)
            checks.number(self._op, "rope_base of a phase", phase.rope_base, low=0.0, open_low=True)
            checks.number(self._op, "lr_ratio of a phase", phase.lr_ratio, low=0.0)
        self.share = checks.number(self._op, "share", share, low=0.0, high=1.0)
        self.shorter = tuple(shorter)
        super().__init__(optimizer, max_lr, last_epoch)

    def phase_at(self, step: int) -> ContextPhase:
        """The phase of a step."""
        for phase in self.phases[:-1]:
            step -= phase.steps
            if step < 0:
                return phase
        return self.phases[-1]

    @property
    def length(self) -> int:
        """The longest sequence at the present step."""
        return self.phase_at(self.last_epoch).length

    @property
    def rope_base(self) -> float:
        """The base of the rotary embedding at the present step."""
        return self.phase_at(self.last_epoch).rope_base

    def sequence_length(self, step: int, sequence: int, seed: int = 0) -> int:
        """Length of one sequence of a step, a function of (seed, step, sequence): the same on all ranks."""
        longest = self.phase_at(step).length
        fitting = [n for n in self.shorter if n < longest]
        draws = uniform(key_of(seed, "length", step, sequence), np.arange(2))
        if not fitting or draws[0] < self.share:
            return longest
        return fitting[min(int(draws[1] * len(fitting)), len(fitting) - 1)]

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step."""
        return self.phase_at(step).lr_ratio
