"""diffusers: key-value compression for PixArt's transformer."""

from ... import checks

with checks.extra("diffusers"):
    import diffusers  # noqa: F401

from .kv_compression import KVCompressedAttnProcessor, KVCompressedPixArtTransformer2DModel, enable_kv_compression

__all__ = ["KVCompressedAttnProcessor", "KVCompressedPixArtTransformer2DModel", "enable_kv_compression"]
