"""Drop-in torch.nn modules over the ops."""

from .contrastive import ClipLoss, SigLipLoss, gather_columns
from .hyper_linear import hyper_linear
from .hypernet import MIP, mip, mip_encode
from .interval import Ball, Choices, IntervalModule, IntervalPass, bound, layer_table, verify
from .kv_compressed_attention import KVCompressedAttention
from .pixart import PixArtBlock, PixArtSigma
from .prototypes import ProtoHead
from .s4 import S4
from .s4d import S4D
from .sparse_lowrank import ModelSize, Replaced, SparseLowRankLinear, model_size, replace_linear
from .sparsity import (
    nm_mask,
    pack_mask,
    sparsify,
    ste_nm_linear,
    straight_through,
    supermask,
    supermask_linear,
    topk_mask,
    unpack_mask,
)

__all__ = [
    "MIP",
    "S4",
    "S4D",
    "Ball",
    "Choices",
    "ClipLoss",
    "IntervalModule",
    "IntervalPass",
    "KVCompressedAttention",
    "ModelSize",
    "PixArtBlock",
    "PixArtSigma",
    "ProtoHead",
    "Replaced",
    "SigLipLoss",
    "SparseLowRankLinear",
    "bound",
    "gather_columns",
    "hyper_linear",
    "layer_table",
    "mip",
    "mip_encode",
    "model_size",
    "nm_mask",
    "pack_mask",
    "replace_linear",
    "sparsify",
    "ste_nm_linear",
    "straight_through",
    "supermask",
    "supermask_linear",
    "topk_mask",
    "unpack_mask",
    "verify",
]
