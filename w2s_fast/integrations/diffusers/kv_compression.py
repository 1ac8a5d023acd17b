"""Key-value compression (PixArt-Sigma, arXiv 2403.04692) in diffusers' `PixArtTransformer2DModel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from ... import checks
from ...nn.kv_compressed_attention import (
    Affine,
    Norm,
    Taps,
    average_windows,
    check_compression,
    compression_arguments,
    within,
)
from ...ops.kv_compressed_attention.kv_compressed_attention import kv_compressed_attention

_OP = "integrations.diffusers.enable_kv_compression"
#: Whether `from_pretrained` is at work: it builds the model on the meta device, and fills what the checkpoint names.
_LOADING: ContextVar[bool] = ContextVar("loading", default=False)


class KVCompressedAttnProcessor(nn.Module):
    """Attention processor that compresses keys and values of a token grid R x R to one.

    ``sr`` and ``norm`` (mode conv, ratio above 1) are its parameters; ``grid`` is set before each forward pass of the
    transformer. It works with adapters on the projections, which it calls as they are, and with fused ones.
    """

    def __init__(self, like: Tensor, ratio: int, mode: str = "conv") -> None:
        super().__init__()
        self.ratio, self.mode = ratio, mode
        self.fused = False
        self.grid: tuple[int, int] | None = None
        self.sr: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        if ratio > 1 and mode == "conv":
            dim, device, dtype = like.shape[0], like.device, like.dtype
            self.sr = Taps(dim, dim, ratio, ratio, groups=dim, device=device, dtype=dtype)
            self.norm = Norm(dim, device=device, dtype=dtype)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Average each window."""
        if self.sr is None or self.norm is None:
            return
        if _LOADING.get():
            for module in (self.sr, self.norm):
                for name, parameter in module._parameters.items():  # past accelerate, which keeps new ones on meta
                    if parameter is not None and parameter.is_meta:
                        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        average_windows(self.sr, self.norm)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Self-attention of ``(B, N, C)`` without a mask.

        Raises:
            ValueError: naming attention_mask and encoder_hidden_states.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            checks.fail(_OP, "attention_mask and encoder_hidden_states", "None in compressed self-attention", "tensors")
        if self.grid is None:
            raise RuntimeError(f"w2s_fast.{_OP}: the transformer's forward must run, not a block's alone.")
        if self.fused:
            qkv = attn.to_qkv(hidden_states)
        else:
            qkv = torch.cat([project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)], 2)
        out: Tensor = attn.to_out[1](attn.to_out[0](self._attend(qkv, attn)))
        return out

    def _attend(self, qkv: Tensor, attn: Any) -> Tensor:
        assert self.grid is not None
        grid, arguments = self.grid, compression_arguments(self.sr, self.norm)

        def attend(taps: Affine | None, norm: Affine | None) -> Any:
            return kv_compressed_attention(
                qkv, grid, self.ratio, attn.heads, mode=self.mode, scale=attn.scale, **arguments(taps, norm)
            )

        return within((self.sr, self.norm), attend)


class _CompressedAttention(Attention):  # type: ignore[misc]
    """An `Attention` that keeps its compression where the whole model is given diffusers' own processors.

    `fuse_qkv_projections`, `unfuse_qkv_projections` and `set_default_attn_processor` do so.
    """

    def set_processor(self, processor: Any) -> None:
        own = self.processor
        if isinstance(own, KVCompressedAttnProcessor) and not isinstance(processor, KVCompressedAttnProcessor):
            if not isinstance(processor, (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)):
                found, hint = type(processor).__name__, "Switch the block's compression off first, with ratio=1."
                checks.fail(_OP, "processor", "diffusers' default or fused one at a compressed block", found, hint)
            own.fused = isinstance(processor, FusedAttnProcessor2_0)
            return
        super().set_processor(processor)


class _AtGrid:
    """A block as it was called, for the pass that a checkpointed backward repeats: by then the grid may be another."""

    def __init__(self, block: Any, grid: tuple[int, int]) -> None:
        self.block, self.grid = block, grid

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.block.attn1.processor.grid = self.grid
        return self.block(*args, **kwargs)


class _KeepGrids:
    """diffusers' function for gradient checkpointing, each block with its grid."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        grid = getattr(block.attn1.processor, "grid", None)
        return self.inner(block if grid is None else _AtGrid(block, grid), *args, **kwargs)


def _tell_grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each forward pass: hand every processor the token grid."""
    latents, patch = args[0] if args else kwargs["hidden_states"], transformer.config.patch_size
    for block in transformer.transformer_blocks:
        if isinstance(block.attn1.processor, KVCompressedAttnProcessor):
            block.attn1.processor.grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
    function = getattr(transformer, "_gradient_checkpointing_func", None)
    if transformer.gradient_checkpointing and function is not None and not isinstance(function, _KeepGrids):
        transformer._gradient_checkpointing_func = _KeepGrids(function)


def _compress(block: Any, ratio: int, mode: str, training: bool) -> list[nn.Parameter]:
    """Set or, with ratio 1, take away a block's compression; its parameters."""
    attn, earlier = block.attn1, block.attn1.processor
    if isinstance(earlier, KVCompressedAttnProcessor):
        fused, attn.__class__ = earlier.fused, Attention
    else:
        fused = isinstance(earlier, FusedAttnProcessor2_0)
    if ratio == 1:
        if isinstance(earlier, KVCompressedAttnProcessor):
            attn.set_processor(FusedAttnProcessor2_0() if fused else AttnProcessor2_0())
        return []
    processor = KVCompressedAttnProcessor(attn.to_k.weight, ratio, mode).train(training)
    processor.fused = fused
    attn.set_processor(processor)
    attn.__class__ = _CompressedAttention
    return list(processor.parameters())


def enable_kv_compression(
    transformer: Any, layers: Iterable[int] = range(14, 28), ratio: int = 2, mode: str = "conv"
) -> list[nn.Parameter]:
    """Compress keys and values in the self-attention of some blocks of a `PixArtTransformer2DModel`.

    The taps start as averages, so that a short fine-tune suffices (the paper: usable after 100 steps). The settings go
    into the model's config and the parameters into its state: ``save_pretrained`` keeps both,
    `KVCompressedPixArtTransformer2DModel.from_pretrained` reads them back. Fusing and unfusing the projections
    (``fuse_qkv_projections``), before or after, leaves the compression as it is.

    Args:
        transformer: changed in place.
        layers: blocks, default the deep half of PixArt-Sigma's 28, which costs the least quality.
        ratio: R; 1 leaves the attention as it is, or takes its compression away.
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
        made += _compress(blocks[index], ratio, mode, transformer.training)
    if _tell_grid not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(_tell_grid, with_kwargs=True)
    settings = {**(transformer.config.get("kv_compression") or {}), **{str(i): [ratio, mode] for i in chosen}}
    transformer.register_to_config(kv_compression={i: kept for i, kept in settings.items() if kept[0] != 1})
    return made


class KVCompressedPixArtTransformer2DModel(PixArtTransformer2DModel):  # type: ignore[misc]
    """`PixArtTransformer2DModel` that is built with the compression its config names, so that it can be loaded.

    ``from_pretrained(folder, kv_compression={"14": [2, "conv"], ...})`` also takes an uncompressed checkpoint: taps
    that it has no values for average each window.

    Raises:
        ValueError: naming `kv_compression`.
    """

    def __init__(self, *args: Any, kv_compression: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, setting in (kv_compression or {}).items():
            if not str(index).isdigit() or not isinstance(setting, (list, tuple)) or len(setting) != 2:
                wanted = "a dict of block to (ratio, mode)"
                checks.fail("integrations.diffusers", "kv_compression", wanted, f"{index!r}: {setting!r}")
            enable_kv_compression(self, [int(index)], *setting)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`."""
        token = _LOADING.set(True)
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            _LOADING.reset(token)


def _with_compression(function: Any) -> inspect.Signature:
    """The signature that diffusers reads the config's names from, with ours."""
    found = inspect.signature(function)
    extra = inspect.Parameter("kv_compression", inspect.Parameter.KEYWORD_ONLY, default=None)
    return found.replace(parameters=[*found.parameters.values(), extra])


KVCompressedPixArtTransformer2DModel.__init__.__signature__ = _with_compression(  # type: ignore[attr-defined]
    PixArtTransformer2DModel.__init__
)
