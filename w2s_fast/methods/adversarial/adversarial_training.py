"""Adversarial training: on PGD's examples (arXiv 1706.06083), TRADES (arXiv 1901.08573), MART.

PGD-AT: ``CE(f(x'), y)``. TRADES: ``CE(f(x), y) + beta KL(p || q)``, p and q the probabilities at x and x', where the
attack raises that divergence. MART: ``-log q_y - log(1 - max_{k != y} q_k) + lambda (1 - p_y) KL(p || q)``. Any maker
of examples and any loss: `train_by`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import checks
from ...attacks import PGD, frozen, outputs
from .._common.loop import Recipe, Trained
from ._robust import PIXELS, Clip, Maker, Robust, cross_entropy, divergence, labels, pgd_maker, train_by

Kind = Literal["pgd", "half", "trades", "mart"]


def at_loss(model: Any, x: Tensor, x_adv: Tensor, y: Any) -> Tensor:
    """Cross-entropy at the adversarial examples, a value a sample."""
    return cross_entropy(outputs(model, x_adv), labels(y))


def half_loss(model: Any, x: Tensor, x_adv: Tensor, y: Any) -> Tensor:
    """Half of it, and half of the cross-entropy at x."""
    return (at_loss(model, x, x_adv, y) + cross_entropy(outputs(model, x), labels(y))) / 2


def trades_loss(model: Any, x: Tensor, x_adv: Tensor, y: Any, *, beta: float = 6.0) -> Tensor:
    """TRADES, a value a sample; gradients through both outputs."""
    z, z_adv = outputs(model, x), outputs(model, x_adv)
    return cross_entropy(z, labels(y)) + beta * divergence(z, z_adv)


def mart_loss(model: Any, x: Tensor, x_adv: Tensor, y: Any, *, weight: float = 5.0) -> Tensor:
    """MART, a value a sample."""
    z, z_adv, label = outputs(model, x), outputs(model, x_adv), labels(y).unsqueeze(-1)
    q = z_adv.softmax(-1)
    other = q.scatter(-1, label, 0.0).amax(-1)
    boosted = cross_entropy(z_adv, label.squeeze(-1)) - torch.log(1.0001 - other + 1e-12)
    return boosted + weight * (1 - z.softmax(-1).gather(-1, label).squeeze(-1)) * divergence(z, z_adv)


def trades_maker(eps: float, **attack: Any) -> Maker:
    """PGD that raises ``KL(p || q)`` from a point beside x (0.001 normal), p fixed, in evaluation mode."""

    def make(model: Any, x: Tensor, y: Any, share: float) -> Tensor:
        found = PGD(model, share * eps, loss="kl", start="gauss", **attack)
        with torch.no_grad(), frozen(found.model):
            p = outputs(found.model, x).softmax(-1)
        return found(x, p)

    return make


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, kind: Kind = "pgd", eps: float = 8 / 255, attack_steps: int = 10,
    beta: float = 6.0, weight: float = 5.0, ramp: float = 0.0, norm: Literal["linf", "l2"] = "linf",
    clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Adversarial training of any classifier.

    Args:
        data: a DataLoader, or a map-style dataset, of ``(x, y)``.
        kind: "pgd"; "half" of it and half clean; "trades"; "mart".
        eps, attack_steps, norm, clip: of the attack; a step is ``2.5 eps / attack_steps`` long.
        beta: TRADES' weight of the divergence.
        weight: MART's lambda.
        ramp: share of the updates over which the radius rises.

    Raises:
        ValueError: naming `kind`.
    """
    checks.choice("methods.adversarial_training", "kind", kind, ("pgd", "half", "trades", "mart"))
    attack: dict[str, Any] = {"steps": attack_steps, "norm": norm, "clip": clip}
    make = trades_maker(eps, **attack) if kind == "trades" else pgd_maker(eps, **attack)
    losses: dict[str, Robust] = {
        "pgd": at_loss, "half": half_loss, "trades": partial(trades_loss, beta=beta),
        "mart": partial(mart_loss, weight=weight),
    }  # fmt: skip
    return train_by(model, data, losses[kind], recipe, make=make, ramp=ramp, **run)
