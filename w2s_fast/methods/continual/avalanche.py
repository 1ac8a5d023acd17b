"""Avalanche: methods for class streams that store no sample, as plugins of its strategies.

A plugin answers by class number ``[N, classes]``, whatever order a benchmark's classes come in; classes that have not
come are at -inf (a loss of such a class is infinite). Where a benchmark gives task labels, only classes of a sample's
task are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...checks import extra
from .._common.features import Body, last_linear
from .nearest_mean import NearestMean
from .prd import Prd

with extra("avalanche"):
    from avalanche.training.plugins import SupervisedPlugin

__all__ = ["NearestMeanPlugin", "PrdPlugin"]


class _ByClass(SupervisedPlugin):  # type: ignore[misc]
    """What both share: which classes came with which task label."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = checks.integer(f"methods.continual.avalanche.{type(self).__name__}", "classes", classes, low=1)
        self.of_task: dict[int, list[int]] = {}

    def _note(self, strategy: Any) -> list[int]:
        """The classes of the experience in rising order."""
        experience = strategy.experience
        found = sorted(int(c) for c in experience.classes_in_this_experience)
        name = f"methods.continual.avalanche.{type(self).__name__}"
        if found and found[-1] >= self.classes:
            checks.fail(name, "classes", f"above the classes of the experience, {found}", self.classes)
        for label in experience.task_labels if hasattr(experience, "task_labels") else [0]:
            known = self.of_task.setdefault(int(label), [])
            known += [c for c in found if c not in known]
        return found

    def _of_tasks(self, strategy: Any, scores: Tensor) -> Tensor:
        """Scores of the classes of every sample's task."""
        if not hasattr(strategy.experience, "task_labels"):
            return scores
        out = torch.ones_like(scores, dtype=torch.bool)
        for label in strategy.mb_task_id.unique().tolist():
            mine = torch.ones(self.classes, dtype=torch.bool, device=scores.device)
            mine[self.of_task.get(label, [])] = False
            out[strategy.mb_task_id == label] = mine
        return scores.masked_fill(out, -torch.inf)


class NearestMeanPlugin(_ByClass):
    """Nearest mean on frozen features (arXiv 2210.04428) in place of training: `methods.continual.nearest_mean`.

    Works with any strategy over a classifier whose last Linear is its head: the model is frozen as it is, no gradient
    step is made, every experience adds its samples to the class means, and evaluation answers by the nearest mean.

    Args:
        classes: all that will ever come.

    Raises:
        ValueError: naming `classes`.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.nearest: NearestMean | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the experience's samples; the strategy's own loop ends before its first step."""
        self._note(strategy)
        if self.nearest is None:
            head = last_linear(strategy.model)
            self.nearest = NearestMean(Body(strategy.model), self.classes, head.in_features).to(head.weight.device)
        self.nearest.fit([(x, y) for x, y, *_ in strategy.adapted_dataset], strategy.train_mb_size)
        strategy.stop_training()

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The answers are negative squared distances."""
        if self.nearest is not None:
            strategy.mb_output = self._of_tasks(strategy, self.nearest(strategy.mb_x))


class PrdPlugin(_ByClass):
    """Prototype-sample relation distillation (arXiv 2303.14771) as the loss of a strategy whose model is a `Prd`.

    An experience is a task: it gets prototypes, which the strategy's optimizer takes up as a group without momentum and
    decay, and the snapshot before it is what the loss holds on to. The strategy's own criterion is only reported.

    Args:
        classes: all that will ever come.
        prototype_rate: of the prototypes; by default the strategy's.

    Raises:
        ValueError: naming `classes` or `prototype_rate`; TypeError: a model that is no `Prd`.
    """

    def __init__(self, classes: int, prototype_rate: float | None = None) -> None:
        super().__init__(classes)
        if prototype_rate is not None:
            checks.number("methods.continual.avalanche.PrdPlugin", "prototype_rate", prototype_rate, low=0.0)
        self.prototype_rate = prototype_rate
        self.group: dict[str, Any] | None = None
        self.order: list[int] = []  # the class of every prototype
        self.present: list[int] = []

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """New prototypes, before the strategy looks for parameters that its optimizer has not got."""
        if not isinstance(strategy.model, Prd):
            checks.fail("methods.continual.avalanche.PrdPlugin", "strategy", "one whose model is a methods Prd",
                        type(strategy.model).__name__, error=TypeError)  # fmt: skip
        self.present = self._note(strategy)
        again = sorted(set(self.present) & set(self.order))
        if again:
            checks.fail("methods.continual.avalanche.PrdPlugin", "classes", "in one experience each", f"again {again}")
        strategy.model.begin(len(self.present))
        self.order += self.present
        if self.group is not None:  # Avalanche finds no place for new parameters among several groups
            first, *rest = strategy.optimizer.param_groups
            first["params"] += self.group["params"]
            strategy.optimizer.param_groups[:] = [first, *(group for group in rest if group is not self.group)]

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The prototypes as a group of their own, behind the strategy's."""
        optimizer, heads = strategy.optimizer, list(strategy.model.heads)
        own = {id(head) for head in heads}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        rate = optimizer.param_groups[0]["lr"] if self.prototype_rate is None else self.prototype_rate
        still = {"momentum": 0.0} if "momentum" in optimizer.param_groups[0] else {}
        optimizer.add_param_group({"params": heads, "lr": rate, "weight_decay": 0.0, **still})
        self.group = optimizer.param_groups[-1]

    def _by_class(self, strategy: Any) -> None:
        scores = strategy.mb_output
        out = scores.new_full((len(scores), self.classes), -torch.inf)
        out[:, self.order] = scores
        strategy.mb_output = self._of_tasks(strategy, out)

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Cosines with the prototypes, by class number."""
        self._by_class(strategy)

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The same."""
        self._by_class(strategy)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The method's loss in place of the criterion's."""
        number = torch.full((self.classes,), -1, device=strategy.mb_y.device)
        number[self.present] = torch.arange(len(self.present), device=strategy.mb_y.device)
        strategy.loss = strategy.model.loss(strategy.mb_x, number[strategy.mb_y])
