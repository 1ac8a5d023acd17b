"""An order by difficulty, as a whole or opened step by step (papers 41, 78 and 85)."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np
import torch

from .. import checks
from ._base import StreamSampler
from ._hash import Ints
from .permutation import permutation

Pacing = Literal["linear", "quadratic", "root", "exponential", "log", "step"]
PACINGS = ("linear", "quadratic", "root", "exponential", "log", "step")
ORDERS = ("easy", "hard", "random")


def pacing(kind: Pacing, step: int, steps: int, a: float = 0.8, b: float = 0.2) -> float:
    """Share of the data that is allowed at ``step`` of ``steps``: from ``b`` at the start to 1 at the fraction ``a``.

    With ``t = min(1, step / (a steps))`` and ``f = b + (1 - b) u``: linear ``u = t``, quadratic ``t^2``, root
    ``sqrt(t)``, exponential ``(e^(10 t) - 1) / (e^10 - 1)``, log ``1 + log(t + (1 - t) e^-10) / 10``, step ``[t = 1]``.

    Raises:
        ValueError, TypeError: naming `kind`, `a`, `b`.
    """
    op = "data.pacing"
    checks.choice(op, "kind", kind, PACINGS)
    a, b = checks.number(op, "a", a, low=0.0, high=1.0), checks.number(op, "b", b, low=0.0, high=1.0)
    t = 1.0 if step >= a * steps else step / (a * steps)
    u = {
        "linear": lambda: t,
        "quadratic": lambda: t * t,
        "root": lambda: math.sqrt(t),
        "exponential": lambda: math.expm1(10 * t) / math.expm1(10),
        "log": lambda: 1 + math.log(t + (1 - t) * math.exp(-10)) / 10,
        "step": lambda: float(t == 1),
    }[kind]()
    return b + (1 - b) * u


class CurriculumSampler(StreamSampler):
    """Items by score: all of them once in that order, or with a pacing drawn from the first ``g(s)`` at step s.

    Without ``pace`` an epoch is the sorted data (perplexity curriculum: scores = perplexity; prompts by reward
    variance, high first: scores = -variance). With one, an epoch has ``steps`` batches of ``batch_size`` a rank; the
    batch of step s is drawn uniformly from the ``max(1, floor(n pacing(s)))`` first items, without repeating one while
    there are enough. Scores that change (of the global model in every round of federated training) are given to
    `set_scores`.

    Args:
        scores: ``[n]`` numbers, low is easy; the same on all ranks.
        pace: a family of `pacing`.
        steps: batches of an epoch, with ``pace``.
        a, b: of `pacing`.
        order: ``"easy"`` first, ``"hard"`` first (anti-curriculum), or ``"random"`` (the pacing alone).
        seed, rank, world_size, batch_size, drop_last: see `StreamSampler`.

    Raises:
        ValueError, TypeError: naming `order`, `steps`.

    Example:
        >>> from w2s_fast.data import CurriculumSampler
        >>> list(CurriculumSampler([0.3, 0.1, 0.2]))
        [1, 2, 0]
    """

    def __init__(
        self, scores: Any, *, pace: Pacing | None = None, steps: int | None = None, a: float = 0.8, b: float = 0.2,
        order: Literal["easy", "hard", "random"] = "easy", seed: int = 0, rank: int | None = None,
        world_size: int | None = None, batch_size: int = 1, drop_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(seed=seed, rank=rank, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        self.order = checks.choice(self._op, "order", order, ORDERS)
        if (pace is None) != (steps is None):
            checks.fail(self._op, "steps", "given together with pace", steps)
        if pace is not None:
            pacing(pace, 0, 1, a, b)  # its own checks
            checks.integer(self._op, "steps", steps, low=1)
        self.pace: Pacing | None = pace
        self.steps, self.a, self.b = steps or 0, a, b
        self.set_scores(scores)

    def set_scores(self, scores: Any) -> None:
        """Another order, from the next iteration on.

        Raises:
            ValueError: naming `scores`.
        """
        values = torch.as_tensor(scores).detach().double().cpu().numpy()
        if values.ndim != 1 or not len(values) or np.isnan(values).any():
            what = "NaN" if values.ndim == 1 and len(values) else f"shape {values.shape}"
            checks.fail(self._op, "scores", "a vector of numbers", what)
        self._sorted: Ints = np.argsort(-values if self.order == "hard" else values, kind="stable").astype(np.int64)

    def _count(self) -> int:
        return len(self._sorted) if self.pace is None else self.steps * self._unit

    def _at(self, positions: Ints) -> Ints:
        n = len(self._sorted)
        if self.pace is None:
            return self._by_rank(positions)
        step, place = positions // self._unit, positions % self._unit
        found = np.empty_like(positions)
        for one in np.unique(step).tolist():
            here = step == one
            allowed = max(1, int(n * pacing(self.pace, one, self.steps, self.a, self.b)))
            order = permutation(allowed, self.seed, "curriculum", self.epoch, one)
            found[here] = self._by_rank(order(place[here] % allowed))
        return found

    def _by_rank(self, ranks: Ints) -> Ints:
        if self.order == "random":
            ranks = permutation(len(self._sorted), self.seed, "order", self.epoch)(ranks)
        return self._sorted[ranks]

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._sorted.tobytes()).hexdigest()[:16]
        rule = [self.pace, self.steps, self.a, self.b, self.order, digest]
        return {**super()._identity(), "rule": rule}
