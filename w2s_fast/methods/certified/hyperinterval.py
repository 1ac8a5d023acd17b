"""HyperInterval (arXiv 2405.15444): continual learning with interval embeddings through a hypernetwork.

A task owns a box of embeddings. The hypernetwork maps the box to intervals of the weights of a target network, they
map inputs to intervals of logits, on which it is trained; a regulariser keeps what earlier tasks own where it was.
All are true enclosures, sound in floating point where they certify (the released code sorts three forward passes of a
convolutional target, which encloses nothing).

The regulariser is the paper's ("all ends" of the weights' intervals and their middles stay), or only what carries a
certificate over ("inside": the new interval lies in the old one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks, interval_linear, interval_linear_iw
from ...ops.interval_bounds.inputs import Rounding
from .._common.batches import shuffled, sized
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop

Triple = tuple[Tensor, Tensor, Tensor]
Hold = Literal["all ends", "inside"]


class Hypernetwork(nn.Module):
    """Boxes of embeddings to intervals of the weights of an MLP with ReLUs of the widths ``sizes``.

    Its last bias starts as He's initialisation of the target, around which the embeddings move it.

    Args:
        sizes: inputs, hidden widths, outputs of the target.
        tasks, dim, hidden, gamma: how many boxes, their dimension, units of the hypernetwork, sum of a box's radii.
        nested: centres ``gamma / (2 D) cos e``, so that boxes of radius gamma / D around them intersect; otherwise e.
    """

    def __init__(
        self, sizes: Sequence[int], tasks: int, *, dim: int = 8, hidden: int = 32, gamma: float = 1.0,
        nested: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.tasks, self.dim, self.gamma, self.nested = tuple(sizes), tasks, dim, gamma, nested
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = [(torch.randn(n * k) * math.sqrt(2 / k), torch.zeros(n)) for k, n in pairwise(self.sizes)]
            start = torch.cat([p for pair in parts for p in pair])
            self.first, self.last = nn.Linear(dim, hidden), nn.Linear(hidden, len(start))
            self.embeddings = nn.ParameterList(torch.randn(dim) for _ in range(tasks))
            self.shares = nn.ParameterList(torch.ones(dim) for _ in range(tasks))
        with torch.no_grad():
            self.last.weight.mul_(0.3)
            self.last.bias.copy_(start)

    def boxes(self, which: Sequence[int], share: float = 1.0) -> Triple:
        """Lower end, centre and upper end of the tasks' boxes ``[len(which), D]``: radius gamma softmax(s)."""
        centre = torch.stack([self.embeddings[t] for t in which])
        radius = share * self.gamma * torch.stack([self.shares[t] for t in which]).softmax(1)
        if self.nested:
            centre = self.gamma / (2 * self.dim) * centre.cos()
        return centre - radius, centre, centre + radius

    def universal(self) -> Tensor:
        """Middle of the intersection of all boxes ``[1, D]``; in none of them for sure where that is empty."""
        low, _, high = self.boxes(range(self.tasks))
        return (low.amax(0) + high.amin(0))[None] / 2

    def forward(self, embedding: Tensor) -> Tensor:
        """Weights of the target of each embedding, flat."""
        return self.last(self.first(embedding).relu())  # type: ignore[no-any-return]

    def weights(self, box: Triple, rounding: Rounding = "fast") -> Triple:
        """Lower ends, those of the box's centre, and upper ends: an enclosure of what every embedding of it gives."""
        low, middle, high = box
        low, high = interval_linear(low, high, self.first.weight, self.first.bias, act="relu", rounding=rounding)
        low, high = interval_linear(low, high, self.last.weight, self.last.bias, rounding=rounding)
        return low, self(middle), high

    def target(self, x: Tensor, weights: Triple, outputs: slice = slice(None), rounding: Rounding = "fast") -> Triple:
        """Lower, middle and upper logits ``[N, outputs]`` for flat weights of one target; x >= 0 ``[N, inputs]``."""
        h, at = (x, x, x), 0
        for k, n in pairwise(self.sizes):
            weight, bias = ([w[at + a : at + b] for w in weights] for a, b in ((0, n * k), (n * k, n * k + n)))
            h = interval_linear_iw(h, [w.view(n, k) for w in weight], bias, rounding=rounding)
            at += n * k + n
            if at < len(weights[0]):
                h = (h[0].relu(), h[1].relu(), h[2].relu())
        low, middle, high = (z[:, outputs] for z in h)
        return low, middle, high


def one(weights: Triple, t: int = 0) -> Triple:
    """Those of row t."""
    return weights[0][t], weights[1][t], weights[2][t]


def worst(logits: Triple, y: Tensor) -> Tensor:
    """Worst-case logits of the intervals: the lower end at the label, the upper one elsewhere."""
    return torch.where(F.one_hot(y, logits[0].shape[1]).bool(), logits[0], logits[2])


def moved(now: Triple, before: Triple, hold: Hold) -> Tensor:
    """Squared distance that the earlier tasks' weights went, or ("inside") by which they left their intervals."""
    if hold == "inside":
        outside = (before[0] - now[0]).relu().square() + (now[2] - before[2]).relu().square()
        return outside.sum(1).mean()
    return sum((a - b).square().sum(1).mean() for a, b in zip(now, before, strict=True)) / 3  # type: ignore[return-value]


def train(
    model: Hypernetwork, data: Any, *, recipe: Recipe, task: int = 0, beta: float = 0.3, hold: Hold = "all ends",
    kappa: float = 0.5, outputs: slice = slice(None), **run: Any,
) -> Trained:  # fmt: skip
    """Learn one task; the tasks before it keep their embeddings, and nearly their weights.

    Args:
        data: a map-style dataset of ``(x, y)``, x ``[inputs]`` >= 0 and y counted from the first of ``outputs``.
        task: from 0 on, in turn.
        beta, hold: weight and kind of the regulariser.
        kappa: share of the clean cross-entropy after the first half, while which it falls from 1 and the box grows.
        outputs: the target's outputs that are this task's classes.

    Raises:
        ValueError: naming `data`.
    """
    unsharded("methods.hyperinterval", recipe, run.get("where"))
    sized(data)
    if float(data[0][0].min()) < 0:
        checks.fail("methods.hyperinterval", "data", "of inputs >= 0", float(data[0][0].min()))
    earlier = list(range(task))
    device = run.get("device") or next(model.parameters()).device
    with torch.no_grad():
        before = model.to(device).weights(model.boxes(earlier)) if task else None
    for part in (model.embeddings, model.shares):
        for t, parameter in enumerate(part):
            parameter.requires_grad_(t == task)

    def loss(model: Hypernetwork, batch: Any, step: int) -> Tensor:
        grown = min(1.0, 2 * step / recipe.steps)
        x, y = batch
        logits = model.target(x, one(model.weights(model.boxes([task], grown))), outputs)
        share = 1 - (1 - kappa) * grown
        value = share * F.cross_entropy(logits[1], y) + (1 - share) * F.cross_entropy(worst(logits, y), y)
        return value if before is None else value + beta * moved(model.weights(model.boxes(earlier)), before, hold)

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(model, loss, loader, recipe, key=[task, beta, hold], **run)


@torch.no_grad()
def certified(
    model: Hypernetwork, x: Tensor, y: Tensor, task: int, outputs: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Which samples the box's centre gets right, and which every embedding of the box does, by sound enclosures."""
    logits = model.target(x, one(model.weights(model.boxes([task]), "sound")), outputs, "sound")
    sure = logits[0].gather(1, y[:, None])[:, 0] > logits[2].scatter(1, y[:, None], -torch.inf).amax(1)
    return logits[1].argmax(1) == y, sure
