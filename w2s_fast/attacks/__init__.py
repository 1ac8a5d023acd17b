"""Adversarial attacks on any model that is differentiable in its input, called as ``attack(x, y)``.

    attack = PGD(model, 8 / 255, alpha=2 / 255, steps=10)
    x_adv = attack(x, y)

Restarts, targets, any loss, radii of their own for channels; several models at once (`Stacked`, `Ensemble`). The model
is as it was afterwards: modes, flags, gradients, batch-norm statistics.
"""

from .autopgd import AutoPGD
from .base import Attack
from .losses import LOSSES
from .pgd import PGD
from .stack import Ensemble, Stacked
from .state import frozen, outputs

__all__ = ["LOSSES", "PGD", "Attack", "AutoPGD", "Ensemble", "Stacked", "frozen", "outputs"]
