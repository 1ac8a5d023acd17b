"""Weak-to-strong generalization (arXiv 2312.09390): a strong model learns a task from a weak model's labels.

Strong models learn from the weak model's soft labels by cross-entropy, by the product of both models' predictions, or
with the confidence loss, which adds the student's own hardened prediction as a target: balanced by the weak labels'
prior or by the batch's median, with the ramp of the authors' code or the paper's linear one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ... import confidence_ramp, w2s_confidence_loss
from .._common.batches import shuffled
from .._common.classify import WithTargets, as_list, inputs_of, logits, predicted
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import ALONE, gathered


class Loss(NamedTuple):
    """Arguments of `w2s_confidence_loss` and `confidence_ramp`; coef: 0.75 for the paper's largest students."""

    kind: Literal["xent", "product", "logconf"] = "logconf"
    coef: float = 0.5
    balance: Literal["weak_prior", "median"] = "weak_prior"
    ramp: Literal["official", "linear"] = "official"

    def of(self, z: Tensor, weak: Tensor, step: int, steps: int) -> Tensor:
        """The loss of a batch at a step; the warm-ups are those of the authors' code and of the paper."""
        coef = confidence_ramp(step, steps, self.coef, 0.1 if self.ramp == "official" else 0.2, self.ramp)
        return w2s_confidence_loss(z, weak, kind=self.kind, coef=coef, balance=self.balance)


def recovered(accuracy: float, weak: float, ceiling: float) -> float:
    """Performance gap recovered: 0 is the weak supervisor, 1 a strong model trained on the ground truth."""
    return (accuracy - weak) / (ceiling - weak) if ceiling != weak else float("nan")


def train_on(
    model: nn.Module, data: Any, soft: Tensor, *, recipe: Recipe, loss: Loss | None = None, **run: Any
) -> Trained:
    """Train on the inputs of ``data`` with soft labels ``[N, C]``; `Loss` sees the batch of all processes at once."""
    chosen, where = loss or Loss(), run.get("where") or ALONE
    steps = recipe.steps

    def value(model: nn.Module, batch: Any, step: int) -> Tensor:
        item, weak = batch
        # the thresholds are statistics of the whole batch, so each process sees the logits of all
        z = gathered(logits(model, inputs_of(item)).float(), where)
        return chosen.of(z, gathered(weak, where), step, steps)

    loader = shuffled(WithTargets(data, soft), recipe.batch, seed=recipe.seed, where=where)
    return run_loop(model, value, loader, recipe, **run)


def train(
    model: nn.Module, weak: nn.Module, data: Any, *, recipe: Recipe,
    kind: Literal["xent", "product", "logconf"] = "logconf", coef: float = 0.5,
    balance: Literal["weak_prior", "median"] = "weak_prior",
    ramp: Literal["official", "linear"] = "official", **run: Any,
) -> Trained:  # fmt: skip
    """Train the strong ``model`` on the labels that ``weak`` gives to ``data``, a map-style dataset; no ground truth.

    Args:
        model, weak: modules of the same inputs that return logits ``[N, C]``, or models of transformers.
        data: items ``(x, ...)``, or mappings of a model's arguments, ``labels`` among them not looked at.
        kind, coef, balance, ramp: see `Loss`; the median is a threshold between two classes.
    """
    soft = predicted(as_list(weak)[0], data).softmax(1)
    return train_on(model, data, soft, recipe=recipe, loss=Loss(kind, coef, balance, ramp), **run)


def transfer(weak: nn.Module, strong: nn.Module, data: Any, *, recipe: Recipe, **settings: Any) -> Trained:
    """`train` with the supervisor first."""
    return train(strong, weak, data, recipe=recipe, **settings)
