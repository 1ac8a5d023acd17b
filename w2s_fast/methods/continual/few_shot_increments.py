"""Tricks for few-shot class-incremental learning (arXiv 2403.14392): a frozen encoder that new classes only join.

The base session trains an encoder with cosine logits ``scale cos(f(x), w_c)``; later sessions add the mean of their
few samples' features as a row w and change nothing else. Tricks of the base session: a supervised contrastive loss
beside the cross-entropy; rows fixed to a simplex equiangular tight frame of all the classes that will ever come;
pictures turned by 90, 180 and 270 degrees as classes of their own; self-supervised pre-training, which is the
contrastive loss with every sample a class. The paper's tuning of a part of the encoder in later sessions is not here:
how the part is chosen was not found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ... import checks
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.contrastive import supcon
from .._common.features import Body, last_linear, outputs
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop
from .._common.place import ALONE, gathered, generator
from .._common.views import default_view, two
from .nearest_mean import NearestMean


def simplex_frame(classes: int, width: int, seed: int = 0) -> Tensor:
    """``[K, D]`` rows of unit norm with cosines ``-1 / (K - 1)``: ``sqrt(K / (K - 1)) (I - 11^T / K) U^T``.

    Raises:
        ValueError: naming `width` (smaller than `classes`) or `classes` (below 2).
    """
    checks.integer("methods.simplex_frame", "classes", classes, low=2)
    checks.integer("methods.simplex_frame", "width", width, low=classes)
    drawn = torch.randn(width, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = torch.linalg.qr(drawn).Q
    centre = torch.eye(classes, dtype=torch.float64) - 1 / classes
    rows: Tensor = (classes / (classes - 1)) ** 0.5 * centre @ u.T
    return rows.float()


def with_turns(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[N, C, H, H]`` and their three turns, labels ``y + classes * turn``: four times as many of both."""
    turned = [x.rot90(turn, (-2, -1)) for turn in range(4)]
    return torch.cat(turned), torch.cat([y + classes * turn for turn in range(4)])


class Cosine(nn.Module):
    """``scale cos(h, w_c)``: features ``[N, D]`` to logits ``[N, K]``.

    Args:
        rows: ``[K, D]``.
        fixed: not trained.
    """

    def __init__(self, rows: Tensor, *, scale: float = 16.0, fixed: bool = False) -> None:
        super().__init__()
        self.rows, self.scale = nn.Parameter(rows.clone(), requires_grad=not fixed), scale

    def forward(self, h: Tensor) -> Tensor:
        """``[N, K]``."""
        return self.scale * normalize(h) @ normalize(self.rows).T


def pretrain(
    model: nn.Module, data: Any, *, recipe: Recipe, tau: float = 0.1, view: Callable[..., Tensor] = default_view,
    **run: Any,
) -> Trained:  # fmt: skip
    """Self-supervised: two views of a sample find each other in the batch; labels are not looked at."""
    where = run.get("where") or ALONE
    draw = generator(recipe.seed, where)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = two(inputs_of(batch), view, draw)
        own = torch.arange(len(x) // 2, device=x.device).repeat(2) + where.rank * len(x)
        h = normalize(outputs(model, x).features)
        return supcon(gathered(h, where), gathered(own, where), tau)

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(model, loss, loader, recipe, also={"views": draw, **run.pop("also", {})}, **run)


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, classes: int = 0, contrast: float = 1.0, tau: float = 0.1,
    frame: int = 0, turns: bool = False, scale: float = 16.0, view: Callable[..., Tensor] = default_view, **run: Any,
) -> Trained:  # fmt: skip
    """The base session: train the features of a classifier whose last Linear is its head, which is not used.

    Args:
        data: map-style, ``(x, label)``, labels from 0.
        classes: of the base session; 0 for the head's number.
        contrast: weight of the supervised contrastive loss, 0 for none; the paper's temperature ``tau`` is 0.07.
        frame: number of classes of a fixed simplex frame; 0 for trained rows.
        turns: turned pictures as further classes.
        view: two views of every sample are trained on.
    """
    unsharded("methods.few_shot_increments", recipe, run.get("where"))
    head = last_linear(model)
    base, where = classes or head.out_features, run.get("where") or ALONE
    draw = generator(recipe.seed, where)
    if frame:
        rows = simplex_frame(max(frame, base * (4 if turns else 1)), head.in_features, recipe.seed)
    else:
        rows = torch.randn(base * (4 if turns else 1), head.in_features, generator=draw)
    classifier = Cosine(rows.to(head.weight), scale=scale, fixed=frame > 0)

    def loss(both: Any, batch: Any) -> Tensor:
        x, y = two(inputs_of(batch), view, draw), labels_of(batch).repeat(2)
        x, y = with_turns(x, y, base) if turns else (x, y)
        h = outputs(both[0], x).features
        value = cross_entropy(both[1](h), y)
        if not contrast:
            return value
        return value + contrast * supcon(gathered(normalize(h), where), gathered(y, where), tau)

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(nn.ModuleList((model, classifier)), loss, loader, recipe,
                    also={"views": draw, **run.pop("also", {})}, **run)  # fmt: skip


class Increments(nn.Module):
    """A frozen encoder and the class means of every session; `fit` adds the samples of one, answers are by cosine.

    Args:
        model: a classifier whose last Linear is its head.
        classes: all that will ever come.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.nearest = NearestMean(Body(model), classes, last_linear(model).in_features)

    def fit(self, data: Any, batch: int = 256) -> None:
        """A session of ``(x, label)``, labels being the classes' numbers among all."""
        self.nearest.fit(data, batch)

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """Cosines ``[N, K]``; -inf for classes that have not come."""
        self.nearest.body.eval()
        head = self.nearest.head
        found = normalize(self.nearest.body(inputs)) @ normalize(head.means).float().T
        return found.masked_fill(head.count == 0, -torch.inf)
