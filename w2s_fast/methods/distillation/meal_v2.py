"""MEAL V2 (arXiv 2009.08453): a student learns from an ensemble of teachers alone, without a label.

The target is the mean of the teachers' softmax outputs, the loss its cross-entropy with the student's,
``-sum_c q_c log p_c``, q = (1 / M) sum_m softmax(z_m), plus a discriminator between the student's logits and the mean
of the teachers' that is optimised together with the student, in the same direction. No hard label, no temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled, sized
from .._common.classify import as_list, inputs_of, logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


class Discriminator(nn.Sequential):
    """Logits ``[N, C]`` to two outputs, student or teacher; ReLU behind every layer, the last too, as published."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (classes, 8, 4, 2)
            super().__init__(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))

    def loss(self, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """Binary cross-entropy against (1, 0) for the student's rows and (0, 1) for the teachers' mean logits."""
        mean = torch.stack(list(teachers)).mean(0)
        found: Tensor = self(torch.cat((student, mean)))
        target = torch.eye(2, dtype=found.dtype, device=found.device).repeat_interleave(len(student), 0)
        return binary_cross_entropy_with_logits(found, target)


def ensemble_loss(student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of the student with the mean of the teachers' softmax outputs."""
    return kd_loss(student, [("logits", z) for z in teachers], kind="ce_soft")[0]


def train(
    model: nn.Module, teacher: nn.Module | Sequence[nn.Module], data: Any, *, recipe: Recipe, discriminate: bool = True,
    **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` on the outputs of one or several teachers for the inputs of ``data``, a map-style dataset.

    Args:
        data: items are ``(x, ...)``, or mappings of a model's arguments; labels are not looked at.
        discriminate: with the discriminator.
    """
    teachers = as_list(teacher)
    sized(data)
    first = inputs_of(data[0])
    device = next((p.device for p in teachers[0].parameters()), torch.device("cpu"))
    with torch.no_grad():
        one = {n: torch.as_tensor(v)[None].to(device) for n, v in first.items()} if isinstance(first, dict) else \
            first[None].to(device)  # fmt: skip
        judge = Discriminator(logits(teachers[0], one).shape[1], recipe.seed)

    def loss(pair: Any, batch: Any) -> Tensor:
        inputs = inputs_of(batch)
        with torch.no_grad():
            told = [logits(one, inputs) for one in teachers]
        made = logits(pair[0], inputs)
        value = ensemble_loss(made, told)
        return value + pair[1].loss(made, told) if discriminate else value

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(nn.ModuleList((model, judge)), loss, loader, recipe, **run)
