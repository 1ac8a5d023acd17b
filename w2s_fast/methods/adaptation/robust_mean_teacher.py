"""Robust mean teacher (arXiv 2211.13081): a classifier adapts to the stream of inputs that it is asked about.

For every batch, with the student's logits a, those of a randomly changed view a' and the mean teacher's e: symmetric
cross-entropy ``SCE(a, e) = -(1 - alpha) sum q log p - alpha sum p log q``, p = softmax(a), q = softmax(e), as
``(SCE(a, e) + SCE(a', e)) / 2``; a contrastive loss that pulls each sample's two features and its nearest source
prototype together; and cross-entropy on labelled source samples, where there are any. Answers are the sum of both
models' logits before the step. Batch-norm takes the batch's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ... import checks
from ...ops.linear_loss.kd import kd_loss
from ...ops.prototypes.class_stats import class_stats
from ...ops.prototypes.prototype_distance import prototype_distance
from .._common.batches import Beside, shuffled
from .._common.classify import inputs_of, labels_of, logits
from .._common.contrastive import supcon
from .._common.ema import MeanTeacher
from .._common.features import Body, collected, last_linear, outputs
from .._common.loop import Recipe, Trained, moved, unsharded
from .._common.loop import train as run_loop
from .._common.place import ALONE, Place, gathered, generator
from .._common.views import View, default_view


def sce(a: Tensor, e: Tensor, alpha: float = 0.5) -> Tensor:
    """Mean symmetric cross-entropy of logits ``[N, C]``, e without a gradient; alpha 0 is cross-entropy with
    softmax(e).

    d/da of a row is ``(1 - alpha) (p - q) - alpha p (log q - sum_c p_c log q_c)``.
    """
    return kd_loss(a, [("logits", e)], kind="sce", beta_sce=alpha)[0]


def prototypes_of(model: nn.Module, data: Any, batch: int = 256) -> Tensor:
    """Class means ``[C, D]`` of the features of a labelled map-style dataset; a class without samples is left out."""
    rows, y = collected(Body(model), data, batch)
    classes, index = y.unique(return_inverse=True)
    return class_stats(rows, index, len(classes)).means().to(rows.dtype)


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Evaluation mode, but for batch-norm."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return model


class RobustMeanTeacher:
    """Test-time adaptation of any classifier whose last Linear is its head; `step` answers a batch and learns from it.

    Args:
        model: adapted in place.
        prototypes: ``[C, D]`` of source features (`prototypes_of`); None to contrast the two views alone.
        rate: of Adam.
        alpha: of `sce`.
        contrast, replay: weights of the contrastive loss and of the source samples.
        momentum: of the mean teacher.
        tau: temperature of the contrastive loss.
        width: of the projector's two layers.
        view: makes the changed view.
        where: of several processes (`methods.place`); the contrastive loss sees the samples of all.

    Raises:
        ValueError, TypeError: naming `alpha`, `momentum` or `prototypes`.
    """

    def __init__(
        self, model: nn.Module, *, prototypes: Tensor | None = None, rate: float = 1e-3, alpha: float = 0.5,
        contrast: float = 1.0, replay: float = 1.0, momentum: float = 0.999, tau: float = 0.1, width: int = 128,
        view: View = default_view, seed: int = 0, where: Place | None = None,
    ) -> None:  # fmt: skip
        dim = last_linear(model).in_features
        if prototypes is not None and (prototypes.ndim != 2 or prototypes.shape[1] != dim):
            checks.fail("methods.RobustMeanTeacher", "prototypes", f"[C, {dim}]", list(prototypes.shape))
        self.alpha = checks.number("methods.RobustMeanTeacher", "alpha", alpha, low=0.0, high=1.0)
        self.model, self.prototypes, self.view, self.where = model, prototypes, view, where or ALONE
        self.contrast, self.replay, self.tau = contrast, replay, tau
        device = last_linear(model).weight.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width)).to(device)
        self.teacher = MeanTeacher(model, momentum)
        self.generator = generator(seed, self.where)
        self.optimizer = torch.optim.Adam([*model.parameters(), *self.projector.parameters()], rate)

    def loss(self, inputs: Any, source: Any = None) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the answers ``[N, C]``; ``source``: a batch of ``(inputs, label)``."""
        use_batch_statistics(self.model)
        own = outputs(self.model, inputs)
        other = outputs(self.model, self.view(inputs, self.generator))
        with torch.no_grad():
            told = logits(use_batch_statistics(self.teacher.model), inputs)
        value = 0.5 * (sce(own.logits, told, self.alpha) + sce(other.logits, told, self.alpha))
        if self.contrast:
            rows = [own.features, other.features]
            if self.prototypes is not None:
                known = self.prototypes.to(own.features)
                nearest = prototype_distance(own.features.detach(), known, metric="cosine", return_distance=False)
                rows.append(known[nearest.indices[:, 0]])
            z = normalize(self.projector(torch.cat(rows)))
            same = (torch.arange(len(told), device=z.device) + self.where.rank * len(told)).repeat(len(rows))
            value = value + self.contrast * supcon(gathered(z, self.where), gathered(same, self.where), self.tau)
        if self.replay and source is not None:
            value = value + self.replay * cross_entropy(logits(self.model, inputs_of(source)), labels_of(source))
        return value, own.logits.detach() + told

    def step(self, inputs: Any, source: Any = None) -> Tensor:
        """Answers ``[N, C]`` (the sum of student and teacher), then one step on this batch."""
        value, answers = self.loss(inputs, source)
        self._update(value)
        return answers

    def warm_up(self, batches: Iterable[Any]) -> None:
        """Before the stream: on source inputs, student after teacher by `sce`, the rate rising linearly from 0."""
        known, rate = list(batches), self.optimizer.param_groups[0]["lr"]
        for i, batch in enumerate(known):
            self.optimizer.param_groups[0]["lr"] = rate * (i + 1) / len(known)
            inputs = inputs_of(batch)
            with torch.no_grad():
                told = logits(use_batch_statistics(self.teacher.model), inputs)
            self._update(sce(logits(use_batch_statistics(self.model), inputs), told, self.alpha))

    def _update(self, value: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        self.teacher.update(self.model)


def train(
    model: nn.Module, data: Any, labelled: Any = None, *, recipe: Recipe, alpha: float = 0.5, contrast: float = 1.0,
    replay: float = 1.0, momentum: float = 0.999, tau: float = 0.1, view: Callable[..., Tensor] = default_view,
    **run: Any,
) -> Trained:  # fmt: skip
    """Adapt ``model`` to the inputs of ``data``, a map-style dataset; labels of it are not looked at.

    Args:
        labelled: source samples ``(x, y)``; without them neither prototypes nor replay.
        alpha, contrast, replay, momentum, tau, view: see `RobustMeanTeacher`.
    """
    unsharded("methods.robust_mean_teacher", recipe, run.get("where"))
    where = run.get("where")
    known = prototypes_of(model, labelled) if labelled is not None else None
    mean = RobustMeanTeacher(model, prototypes=known, alpha=alpha, contrast=contrast, replay=replay, momentum=momentum,
                             tau=tau, view=view, seed=recipe.seed, where=where)  # fmt: skip
    source = Beside(labelled, recipe.batch, seed=recipe.seed, where=where) if labelled is not None else None

    def loss(both: nn.Module, batch: Any, step: int) -> Tensor:
        mean.teacher.follow(model, step)
        inputs = inputs_of(batch)
        beside = None if source is None else moved(source.at(step), last_linear(model).weight.device)
        return mean.loss(inputs, beside)[0]

    also = {"teacher": mean.teacher, "views": mean.generator, **run.pop("also", {})}
    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=where)
    return run_loop(nn.ModuleList((model, mean.projector)), loss, loader, recipe, also=also, **run)
