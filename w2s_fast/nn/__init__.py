"""Drop-in torch.nn modules over the ops."""

from .kv_compressed_attention import KVCompressedAttention
from .pixart import PixArtBlock, PixArtSigma

__all__ = ["KVCompressedAttention", "PixArtBlock", "PixArtSigma"]
