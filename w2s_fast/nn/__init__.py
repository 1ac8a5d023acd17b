"""Drop-in torch.nn modules over the ops."""

from .interval import IntervalModule, IntervalPass, bound, verify
from .kv_compressed_attention import KVCompressedAttention
from .pixart import PixArtBlock, PixArtSigma
from .sparse_lowrank import ModelSize, Replaced, SparseLowRankLinear, model_size, replace_linear

__all__ = [
    "IntervalModule",
    "IntervalPass",
    "KVCompressedAttention",
    "ModelSize",
    "PixArtBlock",
    "PixArtSigma",
    "Replaced",
    "SparseLowRankLinear",
    "bound",
    "model_size",
    "replace_linear",
    "verify",
]
