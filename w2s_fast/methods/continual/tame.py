"""TAME (arXiv 2210.03869): experts for tasks whose boundaries nobody tells, switched by the training loss.

An expert keeps its last training losses; the active one is left when its smoothed loss ``V <- alpha l + (1 - alpha)
V`` exceeds their ``mean + kappa std``. Then the expert with the least loss on the batch takes over, of those whose
loss is within their own bound (a new expert has none), or a new one is made. A selector learns from the kept samples
which expert answers an input. The paper's code was not published: window, alpha, kappa, share and the way of pruning
are our choice.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ... import checks
from .._common.batches import shuffled
from .._common.classify import logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


class Bound:
    """The losses of one expert: ``mean + kappa std`` (population) of the last ``window``, infinite until there are."""

    def __init__(self, window: int, kappa: float) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.kappa = kappa

    @property
    def value(self) -> float:
        """The bound."""
        if len(self.losses) < (self.losses.maxlen or 0):
            return float("inf")
        known = torch.tensor(self.losses, dtype=torch.float64)
        return (known.mean() + self.kappa * known.std(correction=0)).item()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD at a rate of 0.1."""
    return torch.optim.SGD(parameters, lr=0.1)


class Tame(nn.Module):
    """Experts that are copies of a classifier, and what decides which of them learns; `step` takes a batch.

    Args:
        model: a classifier; every expert begins with its present parameters.
        window, kappa, alpha: of the detection of a switch.
        keep: share of the samples kept for the selector, in (0, 1].
        density: share of an expert's weights that are left when it is left (the smallest go, for good); 1 for all.
        optimizer: ``optimizer(parameters)``, for every expert its own.
        loss: ``loss(logits, y)``, a scalar.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, model: nn.Module, *, window: int = 50, kappa: float = 3.0, alpha: float = 0.5, keep: float = 0.05,
        density: float = 1.0, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = sgd,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "methods.Tame"
        self.window, self.kappa = checks.integer(op, "window", window, low=1), checks.number(op, "kappa", kappa)
        self.alpha = checks.number(op, "alpha", alpha, low=0.0, high=1.0, open_low=True)
        self.keep = checks.number(op, "keep", keep, low=0.0, high=1.0, open_low=True)
        self.density = checks.number(op, "density", density, low=0.0, high=1.0, open_low=True)
        self.make, self.loss, self.generator = optimizer, loss, torch.Generator().manual_seed(seed)
        self.start, self.experts = copy.deepcopy(model).requires_grad_(False), nn.ModuleList()
        self.bounds: list[Bound] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.masks: list[dict[str, Tensor]] = []
        self.kept: list[tuple[Tensor, int]] = []
        self.switches: list[tuple[int, int]] = []  # (batch, expert that takes over)
        self.selector: nn.Module | None = None
        self.seen, self.smoothed = 0, 0.0
        self.active = self._new()

    def _new(self) -> int:
        self.experts.append(copy.deepcopy(self.start).requires_grad_(True))
        self.bounds.append(Bound(self.window, self.kappa))
        self.optimizers.append(self.make(list(self.experts[-1].parameters())))
        self.masks.append({})
        return len(self.experts) - 1

    def _loss(self, expert: int, x: Any, y: Tensor) -> Tensor:
        return self.loss(logits(self.experts[expert], x), y)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Decide who learns from a batch, then one update of that expert; its loss before it."""
        value = self._loss(self.active, x, y)
        first = not self.bounds[self.active].losses
        self.smoothed = value.item() if first else self.alpha * value.item() + (1 - self.alpha) * self.smoothed
        if self.smoothed > self.bounds[self.active].value:
            self._switch(x, y)
            value = self._loss(self.active, x, y)
            self.smoothed = value.item()
        optimizer = self.optimizers[self.active]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        self._apply_mask(self.active)
        self.bounds[self.active].losses.append(value.item())
        chosen = torch.rand(len(y), generator=self.generator) < self.keep
        self.kept += [(row, self.active) for row in x[chosen.to(x.device)].detach()]
        self.seen += 1
        return value.item()

    @torch.no_grad()
    def _switch(self, x: Tensor, y: Tensor) -> None:
        others = {j: self._loss(j, x, y).item() for j in range(len(self.experts)) if j != self.active}
        fit = {j: value for j, value in others.items() if value <= self.bounds[j].value}
        self._prune(self.active)
        self.active = min(fit, key=fit.__getitem__) if fit else self._new()
        self.switches.append((self.seen, self.active))

    @torch.no_grad()
    def _prune(self, expert: int) -> None:
        if self.density == 1:
            return
        weights = {name: p for name, p in self.experts[expert].named_parameters() if p.ndim > 1}
        flat = torch.cat([p.abs().flatten() for p in weights.values()])
        cut = flat.kthvalue(max(1, round((1 - self.density) * len(flat)))).values
        self.masks[expert] = self.masks[expert] or {name: p.abs() > cut for name, p in weights.items()}
        self._apply_mask(expert)

    @torch.no_grad()
    def _apply_mask(self, expert: int) -> None:
        named = dict(self.experts[expert].named_parameters())
        for name, mask in self.masks[expert].items():
            named[name].mul_(mask)

    def fit_selector(self, selector: nn.Module, recipe: Recipe, **run: Any) -> Trained:
        """Train a classifier of inputs into experts ``[N, experts]`` on the kept samples, for all later answers."""
        x, expert = torch.stack([row for row, _ in self.kept]), torch.tensor([e for _, e in self.kept])
        self.selector = selector
        data = shuffled(TensorDataset(x.cpu(), expert), recipe.batch, seed=recipe.seed)
        return run_loop(selector, lambda model, batch: cross_entropy(logits(model, batch[0]), batch[1]), data, recipe,
                        **run)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, C]`` of the expert that the selector names for each row; without one, of the active expert."""
        if self.selector is None:
            return logits(self.experts[self.active], x)
        expert = logits(self.selector, x).argmax(1)
        every = torch.stack([logits(one, x) for one in self.experts])
        return every[expert, torch.arange(len(x), device=x.device)]
