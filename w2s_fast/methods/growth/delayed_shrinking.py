"""Delayed epsilon-shrinking (arXiv 2407.06167): a once-for-all network whose sub-networks join late and gently.

First the whole network is trained alone. From ``delay - ramp`` of the steps on, a step adds the smallest and two random
sub-networks, which learn from the whole one's detached logits, ``tau^2 CE(softmax(z / tau), z_s / tau)``, and from
nothing else. Their losses are weighted by ``beta = m (rate at delay / rate now) progress`` during the ramp, by m behind
it. A gradient outside a sub-network is exactly zero, so weights on losses do what masks on gradients do. Before the
sub-networks join, channels are sorted, so that the leading ones, which small networks take, matter most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ... import checks
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of, logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

OP = "methods.delayed_shrinking"


def shared(model: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """Weights of a sub-network: the leading part of the model's along every axis, as views with gradients.

    Args:
        small: a module of smaller sizes with the names of ``model``: of transformers ``type(model)(config)``, of
            fewer heads, channels or layers; its own weights are not used. A weight of several parts one behind the
            other (GPT-2's queries, keys and values) is cut as one, so there the heads must stay.

    Raises:
        ValueError: naming `small`, where a parameter is missing in the model or larger than there.
    """
    given, found = dict(model.named_parameters()), {}
    for name, p in small.named_parameters():
        if name not in given or given[name].ndim != p.ndim or any(a > b for a, b in zip(p.shape, given[name].shape,
                                                                                        strict=True)):  # fmt: skip
            checks.fail(OP, "small", "a smaller model of the same names", f"{name} {list(p.shape)}")
        found[name] = given[name][tuple(slice(n) for n in p.shape)]
    return found


class Subnet(nn.Module):
    """A sub-network as a module: it calls ``small`` with the weights of ``model``, which stays what is trained."""

    def __init__(self, model: nn.Module, small: nn.Module) -> None:
        super().__init__()
        shared(model, small)
        self.both = (model, small)  # a tuple: neither is a part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-network gives."""
        model, small = self.both
        return functional_call(small.train(model.training), shared(model, small), args, kwargs)

    @torch.no_grad()
    def own(self) -> nn.Module:
        """The sub-network with weights of its own, to be saved or deployed."""
        model, small = self.both
        for name, value in shared(model, small).items():
            small.get_parameter(name).copy_(value)
        return small


@torch.no_grad()
def sort_channels(inner: Sequence[nn.Linear], outer: nn.Linear) -> None:
    """Channels between Linear layers by the L1 norm of their outgoing weights, largest first; the function stays.

    Args:
        inner: the layers that give the channels (two where one gates the other).
        outer: the layer that takes them.
    """
    order = outer.weight.abs().sum(0).argsort(descending=True, stable=True)
    outer.weight.copy_(outer.weight[:, order])
    for layer in inner:
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])


def beta(step: int, recipe: Recipe, delay: float, ramp: float, multiplier: float = 1.0) -> float:
    """Weight of the sub-networks' losses at a step."""
    start, full = round((delay - ramp) * recipe.steps), round(delay * recipe.steps)
    if step < start:
        return 0.0
    if step >= full:
        return multiplier
    now = recipe.factor(step)
    return multiplier * recipe.factor(full) / now * (step - start + 1) / (full - start) if now else 0.0


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, smaller: Sequence[nn.Module] | None = None, delay: float = 0.56,
    ramp: float = 0.02, multiplier: float = 1.0, tau: float = 1.0, smoothing: float = 0.1, random_subnets: int = 2,
    sort: Callable[[nn.Module], None] | None = None, **run: Any,
) -> Trained:  # fmt: skip
    """Train a classifier and its sub-networks, in place.

    Args:
        model: any classifier.
        data: map-style, ``(x, y)``.
        recipe: its schedule must be one by name, because beta follows it.
        smaller: the sub-networks' modules (`shared`), the smallest first; None for those of ``model.subnets()``.
        delay, ramp: shares of the steps; multiplier: of beta.
        tau, smoothing: of the distillation; of the labels.
        random_subnets: drawn anew at each step from the others.
        sort: called with the model once, when the sub-networks join (`sort_channels`).

    Raises:
        ValueError: naming `smaller`, `delay`, `ramp` or `recipe`.
    """
    checks.number(OP, "delay", delay, low=0.0, high=1.0)
    checks.number(OP, "ramp", ramp, low=0.0, high=delay)
    if callable(recipe.schedule):
        checks.fail(OP, "recipe", "one whose schedule has a name", recipe.schedule)
    made = smaller if smaller is not None else getattr(model, "subnets", list)()
    if not made:
        checks.fail(OP, "smaller", "at least one smaller module", made)
    device = next(model.parameters()).device
    nets = [Subnet(model, small.to(device)) for small in made]
    start = round((delay - ramp) * recipe.steps)

    def loss(net: nn.Module, batch: Any, step: int, *, at: int) -> Tensor:
        known = logits(net, inputs_of(batch))
        total = cross_entropy(known, labels_of(batch), label_smoothing=smoothing)
        weight = beta(at + step, recipe, delay, ramp, multiplier)
        if weight:
            target, draw = (known.detach() / tau).softmax(-1), random.Random(f"{recipe.seed} {at + step}")
            for subnet in [nets[0], *draw.sample(nets[1:], min(random_subnets, len(nets) - 1))]:
                total = total + weight * tau**2 * cross_entropy(logits(subnet, inputs_of(batch)) / tau, target)
        return total

    folder = run.pop("checkpoint", None)
    place, losses, found = Path(folder) if folder is not None else None, list[float](), None
    key = [delay, ramp, multiplier, tau, smoothing, random_subnets]
    for name, at, steps in (("alone", 0, start), ("together", start, recipe.steps - start)):
        if name == "together" and sort is not None:
            sort(model)
        part = recipe.but(steps=steps, schedule=_from(recipe, at))
        loader = shuffled(data, recipe.batch, seed=recipe.seed + (at > 0), where=run.get("where"))
        found = run_loop(model, lambda net, batch, step, at=at: loss(net, batch, step, at=at), loader, part,
                         checkpoint=place and place / name, key=key, **run)  # fmt: skip
        losses += found.losses
    assert found is not None
    return Trained(losses, found.optimizers)


def _from(recipe: Recipe, at: int) -> Callable[[torch.optim.Optimizer, int], Any]:
    """The recipe's schedule from an update on."""
    return lambda optimizer, _: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.factor(at + step))
