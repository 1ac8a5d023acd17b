"""Adversarial training and what has been built on it: a maker of examples, a loss, one loop, one evaluation."""

from ._robust import pgd_maker, train_by
from .adversarial_training import at_loss, half_loss, mart_loss, trades_loss, trades_maker
from .evaluation import Robustness, evaluate, transfer

__all__ = ["Robustness", "at_loss", "evaluate", "half_loss", "mart_loss", "pgd_maker", "trades_loss", "trades_maker",
           "train_by", "transfer"]  # fmt: skip
