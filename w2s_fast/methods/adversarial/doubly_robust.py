"""Doubly robust reweighting (arXiv 2308.00311): adversarial training that weighs the samples with the largest losses.

``max_w sum_i w_i l_i - r sum_i w_i log(M w_i)`` over the simplex has the solution ``w = softmax(l / r)`` and the value
``r log mean exp(l / r)``, whose gradient is ``sum_i w_i grad l_i``, w held fixed. l_i is the cross-entropy at PGD's
example, M the batch. The paper's inner attack, a bilevel problem with a log barrier, is PGD here.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ... import checks
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ._robust import PIXELS, Clip, batches_of, labels, pgd_maker, total
from .adversarial_training import at_loss

OP = "methods.doubly_robust"


def weights(losses: Tensor, r: float) -> Tensor:
    """``M softmax(l / r)`` over the last dimension, detached: mean 1.

    Raises:
        ValueError: naming `r`.
    """
    checks.number(OP, "r", r, low=0.0, open_low=True)
    return losses.shape[-1] * (losses.detach() / r).softmax(-1)


def value(losses: Tensor, r: float) -> Tensor:
    """``r log mean exp(l / r)``: between the mean loss (r large) and the largest (r small).

    Raises:
        ValueError: naming `r`.
    """
    checks.number(OP, "r", r, low=0.0, open_low=True)
    return r * ((losses / r).logsumexp(-1) - math.log(losses.shape[-1]))


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, eps: float = 8 / 255, attack_steps: int = 10, r: float = 2.0,
    warm: float = 0.33, ramp: float = 0.0, clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Train any classifier on ``(x, y)``.

    Args:
        eps, attack_steps, ramp, clip: as of `adversarial_training.train`.
        r: small values follow the largest loss alone.
        warm: share of the updates with equal weights before: without them small r ends at chance.
    """
    make = pgd_maker(eps, steps=attack_steps, clip=clip)

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        x, y = batch[0], batch[1]
        x_adv = make(model, x, y, min(1.0, (step + 1) / max(1.0, ramp * recipe.steps)))
        losses = at_loss(model, x, x_adv, labels(y))
        return total(losses if step < warm * recipe.steps else weights(losses, r) * losses)

    return run_loop(model, loss, batches_of(data, recipe, run), recipe, **run)
