"""Prototype-sample relation distillation (arXiv 2303.14771): continual learning that stores no sample.

``L = SupCon(z) + beta L_p + gamma L_d`` on two views of a batch. z is a projection of the features h, ``L_p = mean(1 -
cos(stopgrad(h), W[y]))`` moves the prototypes W of the present task alone, and ``L_d`` keeps, for every earlier task's
prototypes W_s, ``softmax(h W_s^T / |W_s|)`` of each sample where the snapshot from before the task had it (KL; h is not
normalised, as in the authors' code). Gradients of L_d reach encoder and old prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, normalize

from ... import checks
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels, labels_of
from .._common.contrastive import supcon
from .._common.features import Body, last_linear
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.views import View, default_view, two


def relation_distill(
    h: Tensor, heads: Sequence[Tensor], old_h: Tensor, old_heads: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """Sum over heads of the mean KL(snapshot || model) of softmax over a head's prototypes; features ``[N, D]``, heads
    ``[C_s, D]``. The authors' code has no factor temperature^2."""
    value = h.new_zeros(())
    for own, old in zip(heads, old_heads, strict=True):
        p = (h @ normalize(own).T / temperature).log_softmax(1)
        q = (old_h @ normalize(old).T / temperature).log_softmax(1)
        value = value + kl_div(p, q, reduction="batchmean", log_target=True)
    return value


class Prd(nn.Module):
    """An encoder with a projector and the prototypes of every task.

    Batch-norm's running statistics follow the last task, with which earlier ones are then asked: that forgets, whatever
    the loss keeps. Take an encoder without it, or ask in training mode.

    Args:
        model: any classifier whose last Linear is its head; its features are trained, the head is not used.
        hidden, out: widths of the projector.
        beta, gamma, tau, temperature: of the loss.
        view: makes a view.
    """

    def __init__(
        self, model: nn.Module, *, hidden: int = 512, out: int = 128, beta: float = 2.0, gamma: float = 4.0,
        tau: float = 0.1, temperature: float = 1.0, view: View = default_view, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body, self.width = Body(model), last_linear(model).in_features
        self.beta, self.gamma, self.tau, self.temperature, self.view = beta, gamma, tau, temperature, view
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(nn.Linear(self.width, hidden), nn.ReLU(), nn.Linear(hidden, out))
        self.projector.to(last_linear(model).weight)
        self.heads = nn.ParameterList()
        self.old_body: nn.Module | None = None
        self.old_heads: list[Tensor] = []

    def begin(self, classes: int) -> int:
        """A task of this many classes: new prototypes, and a snapshot of the encoder and of the earlier ones.

        Returns:
            The task's number.
        """
        if len(self.heads):
            self.old_body = copy.deepcopy(self.body).requires_grad_(False)
            self.old_heads = [head.detach().clone() for head in self.heads]
        drawn = torch.randn(classes, self.width, generator=self.generator)
        self.heads.append(nn.Parameter(drawn.to(last_linear(self.body).weight) / self.width**0.5))
        return len(self.heads) - 1

    def loss(self, inputs: Any, y: Tensor) -> Tensor:
        """Of a batch of the present task, labels ``[N]`` from 0."""
        x, twice = two(inputs, self.view, self.generator), y.repeat(2)
        h, head = self.body(x), self.heads[-1]
        value = supcon(normalize(self.projector(h)), twice, self.tau)
        value = value + self.beta * (1 - cosine_similarity(h.detach(), head[twice])).mean()
        if self.old_body is None:
            return value
        with torch.no_grad():
            old_h = self.old_body(x)
        kept = relation_distill(h, list(self.heads)[:-1], old_h, self.old_heads, self.temperature)
        return value + self.gamma * kept

    def forward(self, inputs: Any, task: int | None = None) -> Tensor:
        """Cosines with the prototypes of a task ``[N, C_t]``, or with those of all tasks, one behind the other."""
        heads = torch.cat(list(self.heads)) if task is None else self.heads[task]
        return normalize(self.body(inputs)) @ normalize(heads).T

    def fit(self, data: Any, recipe: Recipe, *, prototype_rate: float | None = None, **run: Any) -> Trained:
        """Learn the next task from ``(x, label)``, labels from 0.

        Args:
            data: a map-style dataset, such as a task of `class_tasks`.
            recipe: of the optimizers "sgd" and "adamw".
            prototype_rate: of the prototypes, which have neither momentum nor decay under SGD; default the recipe's.

        Raises:
            ValueError: naming `data` or `recipe`.
        """
        if recipe.optimizer not in ("sgd", "adamw"):
            checks.fail("methods.Prd.fit", "recipe", "of the optimizer 'sgd' or 'adamw'", recipe.optimizer)
        y = labels(data)
        if int(y.min()) != 0 or len(y.unique()) != int(y.max()) + 1:
            checks.fail("methods.Prd.fit", "data", "of labels 0, 1, ... without a gap", y.unique().tolist())
        self.begin(int(y.max()) + 1)
        own = {id(head) for head in self.heads}

        def make(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            network: dict[str, Any] = {"params": [p for p in parameters if id(p) not in own]}
            heads = {"params": list(self.heads), "lr": rate if prototype_rate is None else prototype_rate}
            if recipe.optimizer == "adamw":
                return torch.optim.AdamW([network, {**heads, "weight_decay": 0.0}], lr=rate, weight_decay=recipe.decay)
            return torch.optim.SGD([{**network, "momentum": 0.9, "weight_decay": recipe.decay}, heads], lr=rate)

        loader = shuffled(data, recipe.batch, seed=recipe.seed + len(self.heads), where=run.get("where"))
        also = {"views": self.generator, **run.pop("also", {})}
        return run_loop(self, lambda one, batch: self.loss(inputs_of(batch), labels_of(batch)), loader,
                        recipe.but(optimizer=make), also=also, **run)  # fmt: skip
