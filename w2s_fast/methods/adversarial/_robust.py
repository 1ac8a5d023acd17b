"""What the methods share: values of samples to one loss, divergences of outputs, inner features, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import LOSSES, PGD, Stacked
from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

#: ``make(model, x, y, share)``: adversarial examples for the share (0 to 1) of the radius that a ramp has reached.
Maker = Callable[[Any, Tensor, Any, float], Tensor]
#: ``loss(model, x, x_adv, y)``: a value a sample, or a scalar.
Robust = Callable[[Any, Tensor, Tensor, Any], Tensor]
Clip = tuple[float, float] | None
PIXELS = (0.0, 1.0)

cross_entropy = LOSSES["ce"]


def total(values: Tensor) -> Tensor:
    """Mean over the samples, sum over stacked models; a scalar as it is."""
    return values if values.ndim == 0 else values.mean(-1).sum()


def divergence(z: Tensor, z_adv: Tensor) -> Tensor:
    """``KL(softmax(z) || softmax(z_adv))`` of every sample, with gradients of both, by two kinds of `kd_loss`."""
    forward = kd_loss(z_adv, [("logits", z)], kind="fkl", outputs=("kd",))[1]["kd"]
    reverse = kd_loss(z, [("logits", z_adv)], kind="rkl", outputs=("kd",))[1]["kd"]  # the same value
    return forward + (reverse - reverse.detach())


def pgd_maker(eps: float, *, share_of_step: float | None = None, **attack: Any) -> Maker:
    """`PGD` of the radius ``share * eps``; ``share_of_step``: length of a step over the radius."""

    def make(model: Any, x: Tensor, y: Any, share: float) -> Tensor:
        radius = share * eps
        alpha = None if share_of_step is None else share_of_step * radius
        return PGD(model, radius, alpha=alpha, **attack)(x, y)

    return make


def after(name: str) -> Callable[[Any, Tensor], Tensor]:
    """``features(model, x)``: what the submodule of that name returns."""

    def features(model: Any, x: Tensor) -> Tensor:
        if isinstance(model, Stacked):
            stacked: Tensor = model.call(features, x)
            return stacked
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append(out))
        try:
            model(x)
        finally:
            hook.remove()
        return seen[-1]

    return features


def batches_of(data: Any, recipe: Recipe, run: dict[str, Any]) -> Any:
    """A map-style dataset shuffled; whatever is iterated over already as it is."""
    if hasattr(data, "__getitem__") and not isinstance(data, (list, tuple)):
        return shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return data


def train_by(
    model: nn.Module, data: Any, loss: Robust, recipe: Recipe, *, make: Maker, ramp: float = 0.0, **run: Any
) -> Trained:
    """Minimise ``loss(model, x, x_adv, y)`` over batches ``(x, y, ...)`` with ``x_adv = make(model, x, y, share)``.

    Args:
        model: also one wrapped in DistributedDataParallel, or `w2s_fast.attacks.Stacked` with batches ``[S, N, *]``.
        data: a DataLoader or anything to iterate over, or a map-style dataset. What stands behind x in a batch is y:
            one thing, or a tuple of several.
        ramp: share of the updates over which the radius rises linearly. From radii on that a fresh network cannot
            learn, training without one may end at chance.
    """
    steps = max(1.0, ramp * recipe.steps)

    def value(model: nn.Module, batch: Any, step: int) -> Tensor:
        x, y = batch[0], batch[1] if len(batch) == 2 else tuple(batch[1:])
        x_adv = make(model, x, y, min(1.0, (step + 1) / steps))
        return total(loss(model, x, x_adv, y))

    return run_loop(model, value, batches_of(data, recipe, run), recipe, **run)


def labels(y: Any) -> Tensor:
    """The labels, the first of what stands behind x."""
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def counted(y: Tensor, classes: int) -> Tensor:
    """How many of each class there are ``[..., classes]``."""
    return torch.nn.functional.one_hot(y, classes).sum(-2)
