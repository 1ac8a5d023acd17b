"""SRAT (arXiv 2107.13639): adversarial training on classes of unequal size, by class weights and separated features.

``(1 / n) sum_i w_{y_i} CE(f(x'_i), y_i) + lambda L_sep``, ``w_c ~ (1 - beta) / (1 - beta^{n_c})`` with mean 1 over the
classes, L_sep the supervised contrastive loss of the normalised features before the last layer at the adversarial
examples: ``-(1 / |P_i|) sum_{p in P_i} log softmax_{a != i}(h_i h_a / T)_p``, P_i the others of the same label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import checks
from .._common.classify import labels as labels_of
from .._common.features import outputs
from .._common.loop import Recipe, Trained
from .._common.place import ALONE, Place, gathered
from ._robust import PIXELS, Clip, cross_entropy, labels, pgd_maker, train_by


def class_weights(counts: Tensor, beta: float = 0.99) -> Tensor:
    """By the effective number of samples, from counts ``[..., classes]``; mean 1. Classes without samples get 0.

    Raises:
        ValueError: naming `beta`.
    """
    checks.number("methods.srat", "beta", beta, low=0.0, high=1 - 1e-9)
    n = counts.double()
    found = torch.where(n > 0, (1 - beta) / (1 - beta ** n.clamp_min(1)), 0.0)
    return (found * (n > 0).sum(-1, keepdim=True) / found.sum(-1, keepdim=True)).to(torch.get_default_dtype())


def separation(h: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """The supervised contrastive loss of features ``[..., N, D]``, a value a sample; 0 for one without a partner."""
    h = F.normalize(h.float(), dim=-1)
    own = torch.eye(h.shape[-2], dtype=torch.bool, device=h.device)
    logp = (h @ h.mT / temperature).masked_fill(own, -torch.inf).log_softmax(-1).masked_fill(own, 0.0)
    partner = (y.unsqueeze(-1) == y.unsqueeze(-2)) & ~own
    return -(logp * partner).sum(-1) / partner.sum(-1).clamp_min(1)


def srat_loss(
    model: Any, x: Tensor, x_adv: Tensor, y: Any, *, weights: Tensor, separate: float | Tensor, temperature: float,
    where: Place = ALONE,
) -> Tensor:  # fmt: skip
    """A value a sample; weights ``[..., classes]``. Of several processes each separates the features of all."""
    h, z = outputs(model, x_adv)
    found = weights.to(z).gather(-1, labels(y)) * cross_entropy(z, labels(y))
    if not isinstance(separate, Tensor) and not separate:
        return found
    apart = separation(gathered(h, where), gathered(labels(y), where), temperature)
    return found + separate * (apart if where.world == 1 else apart.mean(-1, keepdim=True))


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, eps: float = 8 / 255, attack_steps: int = 10, beta: float = 0.99,
    separate: float = 1.0, temperature: float = 0.1, ramp: float = 0.0, clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Train a classifier whose last layer is a Linear on a map-style dataset of ``(x, y)`` with unequal classes.

    Args:
        eps, attack_steps, ramp, clip: as of `adversarial_training.train`.
        beta: of the class weights; 0 for equal ones.
        separate, temperature: lambda and T of the separation loss; ``separate=0`` is reweighting alone.
    """
    weights = class_weights(torch.bincount(labels_of(data)), beta)

    def loss(model: Any, x: Tensor, x_adv: Tensor, y: Any) -> Tensor:
        return srat_loss(model, x, x_adv, y, weights=weights, separate=separate, temperature=temperature,
                         where=run.get("where") or ALONE)  # fmt: skip

    return train_by(model, data, loss, recipe, make=pgd_maker(eps, steps=attack_steps, clip=clip), ramp=ramp, **run)
