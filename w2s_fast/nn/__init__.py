"""Drop-in torch.nn modules over the ops."""

from .sparse_lowrank import ModelSize, Replaced, SparseLowRankLinear, model_size, replace_linear

__all__ = ["ModelSize", "Replaced", "SparseLowRankLinear", "model_size", "replace_linear"]
