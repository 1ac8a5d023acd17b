"""PubDef (arXiv 2310.17645): train on attacks made once on public models, which transfer; white-box ones stay open.

The adversary who does not see the model attacks a public one and transfers. So a few public models, of different kinds
of training, are attacked beforehand, several times each; the loss is ``sum_s lambda_s CE(f(x_s), y)`` over the clean
input and every source's, lambda normalised. It keeps the clean accuracy of no defence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ... import checks
from ...attacks import PGD, Attack, outputs
from ...data._hash import below, key_of
from .._common.batches import sized
from .._common.classify import WithTargets, as_list, inputs_of, labels_of
from .._common.loop import Recipe, Trained, moved
from .._common.loop import train as run_loop
from ._robust import PIXELS, Clip, batches_of, cross_entropy, total

OP = "methods.pubdef"
Pick = Literal["all", "mix"]


def stored(
    sources: Sequence[nn.Module], data: Any, attack: Callable[[Any], Attack], *, copies: int = 4, batch: int = 256
) -> Tensor:
    """Examples of every source ``[N, sources, copies, *]`` in the order of a map-style dataset, on the CPU."""
    sized(data)
    found = []
    for source in sources:
        device, attacked = next(source.parameters()).device, attack(source)
        parts = [moved((inputs_of(part), labels_of(part)), device) for part in DataLoader(data, batch)]
        made = [torch.cat([attacked(x, y).cpu() for x, y in parts]) for _ in range(copies)]
        found.append(torch.stack(made, 1))
    return torch.stack(found, 1)


def multi_source_loss(values: Tensor, weights: Tensor | None = None, worst: int = 0) -> Tensor:
    """One value a sample from ``[..., sources]``, the clean first: the weighted mean, or that of the ``worst`` largest.

    Raises:
        ValueError: naming `worst`.
    """
    checks.integer(OP, "worst", worst, low=0, high=values.shape[-1])
    share = torch.ones_like(values) if weights is None else weights.to(values).expand_as(values)
    if worst:
        values, order = values.topk(worst, -1)
        share = share.gather(-1, order)
    return (share * values).sum(-1) / share.sum(-1)


def train(
    model: nn.Module, sources: Sequence[nn.Module], data: Any, *, recipe: Recipe, eps: float = 8 / 255,
    attack_steps: int = 10, copies: int = 4, pick: Pick = "all", worst: int = 0, weights: Tensor | None = None,
    clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Attack the public models once, then train ``model`` on what came out.

    Args:
        sources: public models, best one of each kind: clean, L-infinity, L2, corruptions.
        data: a map-style dataset of ``(x, y)``.
        eps, attack_steps, clip: of the attacks, PGD from random starts.
        copies: examples of each source and sample; one is drawn an update.
        pick: "all" sources in every update, or a "mix": one drawn an update, beside the clean input.
        worst: only that many of a sample's inputs count, those of the largest loss; 0 for all.
        weights: lambda ``[1 + sources]``; default equal.

    Raises:
        ValueError: naming `pick`, `worst`.
    """
    checks.choice(OP, "pick", pick, ("all", "mix"))
    draw = torch.Generator().manual_seed(recipe.seed)  # a run that goes on must have the same examples

    def attack(source: Any) -> Attack:
        return PGD(source, eps, steps=attack_steps, clip=clip, generator=draw)

    made = stored(as_list(list(sources)), data, attack, copies=copies)
    key, (_, kinds) = key_of(recipe.seed, "pubdef"), made.shape[:2]

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        (item, examples), counter = batch, np.array([2 * step, 2 * step + 1])
        x, y, copy = inputs_of(item), labels_of(item), int(below(key, counter[:1], copies)[0])
        one = int(below(key, counter[1:], kinds)[0])
        parts = [x, *examples[:, [one] if pick == "mix" else list(range(kinds)), copy].unbind(1)]
        values = torch.stack([cross_entropy(outputs(model, part), y) for part in parts], -1)
        share = weights if weights is None or pick == "all" else weights[[0, 1 + one]]
        return total(multi_source_loss(values, share, worst))

    return run_loop(model, loss, batches_of(WithTargets(data, made), recipe, run), recipe, **run)
