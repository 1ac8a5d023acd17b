"""DVERGE (arXiv 2009.14720): an ensemble whose members are fooled by different inputs.

The distilled sample of member i for a source x_s and a target x_t is the point within eps of x_s whose features at a
layer of i are nearest to those of x_t: it looks like x_t to member i. Every other member learns to give it the label
of x_s: ``sum_{j != i} CE(f_i(x'_j), y_s)`` is the loss of member i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import checks
from ...attacks import PGD, frozen, outputs
from ...data._hash import key_of, uniform
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ._robust import PIXELS, Clip, after, batches_of, cross_entropy

#: ``features(model, x)``: of a layer.
Features = Callable[[Any, Tensor], Tensor]


class _Layer(nn.Module):
    """A layer's features as outputs, of the same parameters."""

    def __init__(self, model: nn.Module, features: Features) -> None:
        super().__init__()
        self.model, self.features = model, features
        self.sample_dims = getattr(model, "sample_dims", 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.model, x)


def distilled(
    model: nn.Module, features: Features, source: Tensor, target: Tensor, eps: float, *, steps: int = 10,
    clip: Clip = PIXELS,
) -> Tensor:  # fmt: skip
    """Points within eps of ``source`` with the features of ``target``: momentum sign descent from the source."""
    layer = _Layer(model, features)
    with torch.no_grad(), frozen(layer):
        goal = layer(target)
    attack = PGD(layer, eps, alpha=eps / steps, steps=steps, loss="distance", targeted=True, momentum=1.0,
                 start="none", clip=clip)  # fmt: skip
    return attack(source, goal)


def others(samples: Tensor, members: int) -> Tensor:
    """Of samples ``[G members, N, *]``, the others' of each member's group ``[G members, (members - 1) N, *]``."""
    groups = samples.unflatten(0, (-1, members))
    parts = [torch.cat([groups[:, j] for j in range(members) if j != i], 1) for i in range(members)]
    return torch.stack(parts, 1).flatten(0, 1)


def train(
    model: Sequence[nn.Module] | nn.ModuleList, data: Any, *, recipe: Recipe, layers: Sequence[str] = (),
    eps: float = 0.07, attack_steps: int = 10, redraw: int = 0, clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Train two or more naturally trained members together, in place.

    Args:
        model: the members, of any architectures.
        data: of ``(x, y)``; of each batch the second half are the targets of the first.
        layers: names of submodules whose outputs are matched, one drawn at a time; those before a ReLU are the
            paper's. Default: every Linear and convolution but the last.
        eps, attack_steps: of the distillation.
        redraw: updates between draws of a layer; 0: an epoch of a sized ``data``, else every update.

    Raises:
        ValueError: naming `model`.
    """
    members = nn.ModuleList(model)
    if len(members) < 2:
        checks.fail("methods.dverge", "model", "two or more members", len(members))
    names = [list(layers) or _before_last(member) for member in members]
    batches = batches_of(data, recipe, run)
    turn = redraw or (len(batches) if hasattr(batches, "__len__") else 1)

    def loss(members: Any, batch: Any, step: int) -> Tensor:
        half = len(batch[0]) // 2
        x, target, y = batch[0][:half], batch[0][half : 2 * half], batch[1][:half]
        at = uniform(key_of(recipe.seed, "dverge"), np.array([step // turn]))[0]
        seen = []
        for own, member in zip(names, members, strict=True):
            layer = after(own[int(at * len(own))])
            seen.append(distilled(member, layer, x, target, eps, steps=attack_steps, clip=clip))
        rows, y = others(torch.stack(seen), len(seen)), y.repeat(len(seen) - 1)
        values = [cross_entropy(outputs(m, part), y) for m, part in zip(members, rows, strict=True)]
        return (len(seen) - 1) * torch.stack(values).mean(1).sum()

    return run_loop(members, loss, batches, recipe, **run)


def _before_last(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)][:-1]
