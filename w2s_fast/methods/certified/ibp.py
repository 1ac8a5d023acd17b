"""Certified training by interval bounds (IBP, arXiv 1810.12715), by CROWN-IBP too (arXiv 1906.06316).

The loss is ``kappa CE(f(x), y) + (1 - kappa) CE(z, y)`` with z the worst-case margins over the box of radius eps: while
eps rises linearly to its largest value, kappa falls from 1 to 1/2. CROWN-IBP mixes its margins in,
``z = beta z_crown + (1 - beta) z_ibp``, beta from 1 to 0 over the same ramp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...nn import IntervalModule, bound
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained, moved, unsharded
from .._common.loop import train as run_loop

Clip = tuple[float, float] | None
PIXELS = (0.0, 1.0)


class Stage(NamedTuple):
    """Where a step is: the radius, its share of the largest, and whether the ramp is still on."""

    eps: float
    share: float
    ramp: bool


def linear(step: float, first: float, last: float) -> float:
    """Share of the largest radius: 0 at the step ``first``, 1 from ``last`` on, linear between."""
    return float(step >= last) if step <= first or step >= last else (step - first) / (last - first)


def smoothed(step: float, first: float, last: float) -> float:
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


def plain_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
    """Cross-entropy, no bounds."""
    return F.cross_entropy(module(x), y)


def ibp_loss(
    module: IntervalModule, x: Tensor, y: Tensor, stage: Stage, *, crown: bool = False, kappa: float = 0.5,
    clip: Clip = PIXELS,
) -> Tensor:  # fmt: skip
    """The paper's loss; ``crown``: with CROWN-IBP's margins as long as the ramp lasts; ``kappa``: after the ramp."""
    found = module.propagate(x, stage.eps, clip=clip, clean=True)
    z, kappa, beta = found.margins(y), 1 - (1 - kappa) * stage.share, 1 - stage.share
    if crown and beta > 0:
        z = beta * found.margins(y, "crown-ibp") + (1 - beta) * z
    return kappa * F.cross_entropy(found.logits, y) + (1 - kappa) * F.cross_entropy(z, y)


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, eps: float = 0.1, crown: bool = False, kappa: float = 0.5,
    first: float = 0.02, last: float = 0.5, clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Certified training of a classifier that `w2s_fast.nn.bound` takes.

    Args:
        data: a DataLoader, or a map-style dataset, of ``(x, y)``.
        eps: radius of the box, in units of x.
        crown: CROWN-IBP.
        first, last: where in the run the radius begins to rise and has risen, as shares of the updates.
        clip: lowest and highest value an input may have.
    """

    def loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
        return ibp_loss(module, x, y, stage, crown=crown, kappa=kappa, clip=clip)

    return train_by(model, data, loss, recipe, eps, first, last, **run)


def train_by(
    model: nn.Module, data: Any, loss: Any, recipe: Recipe, eps: float, first: float, last: float, *,
    ramp: Any = linear, **run: Any,
) -> Trained:  # fmt: skip
    """Minimise ``loss(bound(model), x, y, stage)`` while the radius rises.

    Raises:
        ValueError: naming `eps` or `parallel`.
    """
    unsharded("methods.certified", recipe, run.get("where"))
    checks.number("methods.certified", "eps", eps, low=0.0)
    batches = data
    if hasattr(data, "__getitem__") and not isinstance(data, (list, tuple)):
        batches = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    module = bound(model)
    begin, end = first * recipe.steps, last * recipe.steps

    def value(_: nn.Module, batch: Any, step: int) -> Tensor:
        share = ramp(step + 1, begin, end)
        found: Tensor = loss(module, batch[0], batch[1], Stage(share * eps, share, step + 1 <= end))
        return found

    return run_loop(model, value, batches, recipe, **run)


class Verified(NamedTuple):
    """Shares of the samples: right, and with a sound certificate; and how many there were."""

    accuracy: float
    verified: float
    count: int  # type: ignore[assignment]


@torch.no_grad()
def verify(
    model: nn.Module, loader: Iterable[Any], eps: float, *, clip: Clip = PIXELS,
    method: Literal["ibp", "crown-ibp", "crown"] = "crown-ibp",
) -> Verified:  # fmt: skip
    """How much of a loader of ``(x, y)`` the model gets right, and provably so within eps (sound in floating point)."""
    mode, device = model.training, next(model.parameters()).device
    module, right, sure, count = bound(model.eval()), 0, 0, 0
    for batch in loader:
        x, y = moved(batch, device)
        right += int((model(x).argmax(1) == y).sum())
        sure += int(module.verified(x, y, eps, clip, method).sum())
        count += len(y)
    model.train(mode)
    return Verified(right / max(1, count), sure / max(1, count), count)
