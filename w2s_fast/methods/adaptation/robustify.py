"""Efficiently robustify pre-trained models (arXiv 2309.07499): a small robust model teaches a part of a large one.

A small model is made robust at low cost; then a fraction of the large model's parameters is tuned without labels: on a
perturbed input to the small model's output, on the clean input to that of the large model as it was, ``KL(large_0(x)
|| large(x)) + KL(small(x') || large(x'))``. The paper's further heads, and their choice by uncertainty at test time,
are not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled
from .._common.classify import as_list, inputs_of, logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import generator
from .._common.views import noisy


def frozen_but(model: nn.Module, part: str) -> list[nn.Parameter]:
    """Let only parameters whose names begin with one of the comma-separated prefixes require gradients; the frozen
    ones.

    Raises:
        ValueError: naming `part`, if there are none.
    """
    prefixes = tuple(p.strip() for p in part.split(","))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    frozen = [p for name, p in named if not name.startswith(prefixes)]
    if len(frozen) == len(named):
        checks.fail("methods.robustify", "part", "the beginning of a parameter's name", repr(part))
    for p in frozen:
        p.requires_grad_(False)
    return frozen


def train(
    model: nn.Module, teacher: nn.Module, data: Any, *, recipe: Recipe, part: str = "", tau: float = 1.0,
    perturb: Callable[..., Tensor] = noisy, **run: Any,
) -> Trained:  # fmt: skip
    """Tune the large ``model`` in place; ``teacher`` is the small robust one.

    Args:
        data: map-style, inputs; labels are not looked at.
        part: what is tuned, the beginnings of names separated by commas; all of it if empty.
        tau: temperature of both losses.
        perturb: ``perturb(x, generator)``, the perturbations that matter.
    """
    (small,), (original,) = as_list(teacher), as_list(copy.deepcopy(model))
    draw, frozen = generator(recipe.seed, run.get("where")), frozen_but(model, part)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = inputs_of(batch)
        hard = perturb(x, draw)
        with torch.no_grad():
            told = torch.cat((logits(original, x), logits(small, hard)))
        made = logits(model, torch.cat((x, hard)))
        return 2 * kd_loss(made, [("logits", told)], tau=tau)[0]

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    try:
        return run_loop(model, loss, loader, recipe, also={"perturbed": draw, **run.pop("also", {})}, **run)
    finally:
        for p in frozen:
            p.requires_grad_(True)
