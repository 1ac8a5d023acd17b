"""Drop-in torch.nn modules over the ops."""

from .interval import IntervalModule, bound, verify
from .sparse_lowrank import ModelSize, Replaced, SparseLowRankLinear, model_size, replace_linear

__all__ = [
    "IntervalModule",
    "ModelSize",
    "Replaced",
    "SparseLowRankLinear",
    "bound",
    "model_size",
    "replace_linear",
    "verify",
]
