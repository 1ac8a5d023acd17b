"""Key-value compression (PixArt-Sigma, arXiv 2403.04692) in diffusers' `PixArtTransformer2DModel`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ... import checks
from ...nn.kv_compressed_attention import averaging_compression, check_compression, compression_arguments
from ...ops.kv_compressed_attention.kv_compressed_attention import kv_compressed_attention

_OP = "integrations.diffusers.enable_kv_compression"


class KVCompressedAttnProcessor(nn.Module):
    """Attention processor that compresses keys and values of a token grid R x R to one.

    ``sr`` and ``norm`` (mode conv, ratio above 1) are its parameters; ``grid`` is set before each forward pass of the
    transformer. It works with adapters on the projections, which it calls as they are.
    """

    def __init__(self, like: Tensor, ratio: int, mode: str = "conv") -> None:
        super().__init__()
        self.ratio, self.mode = ratio, mode
        self.grid: tuple[int, int] | None = None
        self.sr: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        if ratio > 1 and mode == "conv":
            self.sr, self.norm = averaging_compression(ratio, like)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Self-attention of ``(B, N, C)`` without a mask."""
        if encoder_hidden_states is not None or attention_mask is not None:
            checks.fail(_OP, "attention_mask and encoder_hidden_states", "None in compressed self-attention", "tensors")
        if self.grid is None:
            raise RuntimeError(f"w2s_fast.{_OP}: the transformer's forward must run, not a block's alone.")
        qkv = torch.cat([project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)], 2)
        made = kv_compressed_attention(
            qkv, self.grid, self.ratio, attn.heads, mode=self.mode, scale=attn.scale,
            **compression_arguments(self.sr, self.norm),
        )  # fmt: skip
        out: Tensor = attn.to_out[1](attn.to_out[0](made))
        return out


def _tell_grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each forward pass: hand every processor the token grid."""
    latents, patch = args[0] if args else kwargs["hidden_states"], transformer.config.patch_size
    for block in transformer.transformer_blocks:
        if isinstance(block.attn1.processor, KVCompressedAttnProcessor):
            block.attn1.processor.grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)


def enable_kv_compression(
    transformer: Any, layers: Iterable[int] = range(14, 28), ratio: int = 2, mode: str = "conv"
) -> list[nn.Parameter]:
    """Compress keys and values in the self-attention of some blocks of a `PixArtTransformer2DModel`.

    The taps start as averages, so that a short fine-tune suffices (the paper: usable after 100 steps). The settings go
    into the model's config and the parameters into its state: ``save_pretrained`` keeps both,
    `KVCompressedPixArtTransformer2DModel.from_pretrained` reads them back.

    Args:
        transformer: changed in place.
        layers: blocks, default the deep half of PixArt-Sigma's 28, which costs the least quality.
        ratio: R; 1 leaves the attention as it is.
        mode: see `w2s_fast.kv_compress`; only ``"conv"`` has parameters.

    Returns:
        The new parameters, for an optimizer.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> from diffusers import PixArtTransformer2DModel
        >>> from w2s_fast.integrations.diffusers import enable_kv_compression
        >>> model = PixArtTransformer2DModel(2, 8, num_layers=2, cross_attention_dim=16, sample_size=8)
        >>> sum(p.numel() for p in enable_kv_compression(model, layers=[1], ratio=2))
        112
    """
    if not isinstance(transformer, PixArtTransformer2DModel):
        checks.fail(_OP, "transformer", "a PixArtTransformer2DModel", type(transformer).__name__, error=TypeError)
    check_compression(_OP, ratio, mode)
    chosen, blocks = list(layers), transformer.transformer_blocks
    for index in chosen:
        checks.integer(_OP, "layers", index, low=0, high=len(blocks) - 1)
    made: list[nn.Parameter] = []
    for index in chosen:
        attn = blocks[index].attn1
        if attn.norm_q is not None or attn.group_norm is not None or attn.residual_connection:
            checks.fail(_OP, "transformer", "without norms or residuals in its attention", f"block {index} with one")
        processor = KVCompressedAttnProcessor(attn.to_k.weight, ratio, mode).train(transformer.training)
        attn.set_processor(processor)
        made += processor.parameters()
    if _tell_grid not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(_tell_grid, with_kwargs=True)
    earlier = dict(transformer.config.get("kv_compression") or {})
    transformer.register_to_config(kv_compression={**earlier, **{str(i): [ratio, mode] for i in chosen}})
    return made


class KVCompressedPixArtTransformer2DModel(PixArtTransformer2DModel):  # type: ignore[misc]
    """`PixArtTransformer2DModel` that is built with the compression its config names, so that it can be loaded."""

    def __init__(self, *args: Any, kv_compression: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, (ratio, mode) in (kv_compression or {}).items():
            enable_kv_compression(self, [int(index)], ratio, mode)


def _with_compression(function: Any) -> inspect.Signature:
    """The signature that diffusers reads the config's names from, with ours."""
    found = inspect.signature(function)
    extra = inspect.Parameter("kv_compression", inspect.Parameter.KEYWORD_ONLY, default=None)
    return found.replace(parameters=[*found.parameters.values(), extra])


KVCompressedPixArtTransformer2DModel.__init__.__signature__ = _with_compression(  # type: ignore[attr-defined]
    PixArtTransformer2DModel.__init__
)
