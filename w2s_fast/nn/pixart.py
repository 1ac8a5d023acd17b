"""The PixArt-Sigma diffusion transformer (arXiv 2403.04692) over the fused ops, with its official parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .. import checks
from ..hooks import hooked
from ..ops.diffusion.adaln_modulate import adaln_modulate
from ..ops.diffusion.gate_residual import gate_residual
from ..ops.diffusion.gate_residual_adaln import gate_residual_adaln
from ..ops.kv_compressed_attention.compressed_attention import compressed_attention
from .kv_compressed_attention import KVCompressedAttention

#: A modulation vector as a block's table row ``(C,)`` and the shared ``(B, C)``.
Pair = tuple[Tensor, Tensor]


def position_embedding(dim: int, grid: tuple[int, int], base: float, interpolation: float) -> Tensor:
    """Sine and cosine of the column, then of the row, ``(H W, dim)`` float32.

    A row h has the coordinate ``h / (H / base) / interpolation``, a column likewise, so that every resolution is mapped
    to the coordinates of the first one; frequencies ``10000^(-k / (dim / 4))``.

    Args:
        dim: a multiple of 4.
        grid: (H, W) tokens.
        base: tokens a side of the resolution the model is configured for.
        interpolation: that resolution over the one where it is 1 (512 pixels).

    Raises:
        ValueError: naming `dim`.
    """
    if dim % 4:
        checks.fail("nn.position_embedding", "dim", "a multiple of 4", dim)
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def one(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] / (count / base) / interpolation * frequency
        return torch.cat((angle.sin(), angle.cos()), 1).float()

    rows, columns = (one(count) for count in grid)
    height, width = grid
    return torch.cat((columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)), 2).flatten(0, 1)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters."""
    return next(module.parameters()).dtype


class Mlp(nn.Module):
    """``fc2(gelu_tanh(fc1(x)))``."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., out)``."""
        made: Tensor = self.fc2(self.act(self.fc1(x)))
        return made


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens; padded text tokens are masked."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x ``(B, N, C)``, y ``(B, L, C)``, mask ``(B, L)``, True for text."""
        q = self.q_linear(x).unflatten(2, (self.num_heads, -1))
        k, v = self.kv_linear(y).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        if mask is None:
            made = compressed_attention(q, k, v)
            assert isinstance(made, Tensor)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            made = scaled_dot_product_attention(q, k, v, mask[:, None, None].bool()).transpose(1, 2)
        out: Tensor = self.proj(made.flatten(2))
        return out


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and MLP; all blocks share one conditioning, each adds its own table to it.

    Args:
        dim, num_heads: C and heads.
        mlp_ratio: hidden size of the MLP over C.
        ratio, mode, qk_norm: see `KVCompressedAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, ratio: int = 1, mode: str = "conv",
        qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attn = KVCompressedAttention(dim, num_heads, ratio=ratio, mode=mode, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def modulations(self, t: Tensor) -> list[Pair]:
        """shift, scale, gate of the attention, then of the MLP, from the conditioning ``(B, 6, C)``; never summed."""
        return list(zip(self.scale_shift_table.unbind(0), t.unbind(1), strict=True))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """x ``(B, N, C)``, text y ``(B, L, C)``, conditioning t ``(B, 6, C)``, mask ``(B, L)``; like x."""
        shift, scale, *_ = self.modulations(t)
        x, made, gate = self.residual(x, adaln_modulate(x, shift, scale), y, t, grid, mask)
        return gate_residual(x, made, gate)

    def residual(
        self, x: Tensor, h: Tensor, y: Tensor, t: Tensor, grid: tuple[int, int], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Pair]:
        """The block up to its last addition, which its caller may fuse with the next block's modulation.

        ``h`` is the modulated x. Returns x, what is to be added to it, and that one's gate.
        """
        _, _, gate_a, shift, scale, gate = self.modulations(t)
        x = gate_residual(x, self.attn(h, grid), gate_a)
        x, h = gate_residual_adaln(x, self.cross_attn(x, y, mask), None, shift, scale)
        return x, self.mlp(h), gate


class TimeEmbedding(nn.Module):
    """Cosines and sines of the time label at 128 frequencies, then an MLP."""

    def __init__(self, dim: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """``(B)`` to ``(B, dim)``."""
        half = self.features // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t.float()[:, None] * frequency
        made: Tensor = self.mlp(torch.cat((angle.cos(), angle.sin()), 1).to(dtype_of(self)))
        return made


class CaptionEmbedding(nn.Module):
    """Text features to C by an MLP; in training a share of the captions becomes the learned empty one."""

    y_embedding: Tensor

    def __init__(self, features: int, dim: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.y_proj = Mlp(features, dim, dim)
        self.register_buffer("y_embedding", torch.randn(tokens, features) / features**0.5)

    def forward(self, y: Tensor) -> Tensor:
        """``(B, L, features)`` to ``(B, L, dim)``."""
        if self.training and self.dropout:
            empty = torch.rand(len(y), 1, 1, dtype=torch.float32, device=y.device) < self.dropout
            y = torch.where(empty, self.y_embedding[: y.shape[1]].to(y.dtype), y)
        made: Tensor = self.y_proj(y)
        return made


class FinalLayer(nn.Module):
    """Parameters of the last modulation and of the projection to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def modulations(self, t: Tensor) -> list[Pair]:
        """shift and scale from the time embedding ``(B, C)``."""
        return [(row, t) for row in self.scale_shift_table.unbind(0)]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x ``(B, N, C)`` and time embedding ``(B, C)`` to patches."""
        shift, scale = self.modulations(t)
        made: Tensor = self.linear(adaln_modulate(x, shift, scale))
        return made


class PatchEmbedding(nn.Module):
    """Patches to C."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H patch, W patch)`` to ``(B, H W, dim)``."""
        made: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return made


class PixArtSigma(nn.Module):
    """PixArt-Sigma; ``load_state_dict`` takes the official checkpoints' tensors, see `forward` for inputs.

    Loading an uncompressed checkpoint into a compressed model: ``strict=False``, the taps keep their averaging init.
    The position embedding is no parameter; a checkpoint's ``pos_embed`` is dropped.

    Args:
        latent_size: side of the latents the model is configured for (image / 8).
        in_channels, out_channels: of the latents; out is twice in where a variance is predicted too.
        patch: side of a token.
        dim, depth, num_heads, mlp_ratio, qk_norm: of the blocks.
        caption_features, caption_tokens, caption_dropout: of the text.
        compressed: blocks with compression.
        ratio, mode: of their compression.
        interpolation: of the position embedding; default ``latent_size / 64``, 1 for 512 pixels.

    Raises:
        ValueError, TypeError: naming `mlp_ratio`, `dim`.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import PixArtSigma
        >>> model = PixArtSigma(8, dim=16, depth=2, num_heads=2, caption_features=5, compressed=[1])
        >>> model(torch.zeros(1, 4, 8, 8), torch.tensor([7]), torch.zeros(1, 3, 5)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(
        self, latent_size: int = 128, *, in_channels: int = 4, out_channels: int = 8, patch: int = 2, dim: int = 1152,
        depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, qk_norm: bool = False,
        caption_features: int = 4096, caption_tokens: int = 300, caption_dropout: float = 0.1,
        compressed: Iterable[int] = (), ratio: int = 2, mode: str = "conv", interpolation: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("patch", patch), ("depth", depth),
            ("caption_features", caption_features), ("caption_tokens", caption_tokens),
        ):  # fmt: skip
            checks.integer("nn.PixArtSigma", name, value, low=1)
        checks.number("nn.PixArtSigma", "mlp_ratio", mlp_ratio, low=1 / dim)
        if dim % 4:
            checks.fail("nn.PixArtSigma", "dim", "a multiple of 4", dim)
        self.patch, self.out_channels = patch, out_channels
        self.set_resolution(latent_size, interpolation)
        self.x_embedder = PatchEmbedding(patch, in_channels, dim)
        self.t_embedder = TimeEmbedding(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedding(caption_features, dim, caption_tokens, caption_dropout)
        self.blocks = nn.ModuleList(
            PixArtBlock(dim, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(dim, patch * patch * out_channels)
        self._initialise()
        self.enable_kv_compression(compressed, ratio, mode)
        self.register_load_state_dict_pre_hook(_drop_position_embedding)

    def set_resolution(self, latent_size: int, interpolation: float | None = None) -> None:
        """Configure for another latent size, a multiple of the patch; no parameter depends on it.

        Raises:
            ValueError, TypeError: naming `latent_size`, `interpolation`.
        """
        checks.integer("nn.PixArtSigma", "latent_size", latent_size, low=self.patch)
        if latent_size % self.patch:
            checks.fail("nn.PixArtSigma", "latent_size", f"a multiple of the patch {self.patch}", latent_size)
        if interpolation is not None:
            checks.number("nn.PixArtSigma", "interpolation", interpolation, low=0.0, open_low=True)
        self.base_size = latent_size // self.patch
        self.interpolation = latent_size / 64 if interpolation is None else interpolation

    def enable_kv_compression(
        self, layers: Iterable[int] | None = None, ratio: int = 2, mode: str = "conv"
    ) -> list[nn.Parameter]:
        """Compress keys and values of these blocks (default the deeper half); returns the new parameters.

        Raises:
            ValueError, TypeError: naming `layers`.
        """
        chosen = range(len(self.blocks) // 2, len(self.blocks)) if layers is None else layers
        made: list[nn.Parameter] = []
        for index in chosen:
            checks.integer("nn.PixArtSigma", "layers", index, low=0, high=len(self.blocks) - 1)
            block: Any = self.blocks[index]
            made += block.attn.compress(ratio, mode)
        return made

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict noise (and variance).

        Args:
            x: ``(B, in_channels, H, W)`` latents, H and W multiples of the patch; any size and shape.
            timestep: ``(B)`` labels, or one for all: ``(1)`` or ``()``.
            y: ``(B, L, caption_features)`` text features, or ``(B, 1, L, ...)`` as in official code.
            mask: ``(B, L)``, nonzero for text; None where no token is padding.

        Returns:
            ``(B, out_channels, H, W)``.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        y = y.squeeze(1) if isinstance(y, Tensor) and y.ndim == 4 else y
        self._check(x, timestep, y, mask)
        timestep = timestep.reshape(-1)
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        dtype = dtype_of(self)
        tokens = self.x_embedder(x.to(dtype))
        dim = tokens.shape[2]
        position = position_embedding(dim, (height, width), self.base_size, self.interpolation)
        tokens = tokens + position.to(tokens.device, dtype)
        t = self.t_embedder(timestep)
        conditioning = self.t_block(t).unflatten(1, (6, dim))
        text = self.y_embedder(y)
        mask = None if mask is None else mask.reshape(len(x), -1) != 0
        patches = self._patches(tokens, text, conditioning, t, (height, width), mask)
        patches = patches.unflatten(1, (height, width)).unflatten(3, (self.patch, self.patch, -1))
        made: Tensor = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return made

    def _check(self, x: Any, timestep: Any, y: Any, mask: Any) -> None:
        op, channels = "nn.PixArtSigma", self.x_embedder.proj.in_channels
        tokens, features = self.y_embedder.y_embedding.shape
        checks.is_float_tensor(op, "x", x)
        checks.is_float_tensor(op, "y", y)
        if x.ndim != 4 or x.shape[1] != channels or any(n < 1 or n % self.patch for n in x.shape[2:]):
            wanted = f"of shape (B, {channels}, H, W), H and W multiples of the patch {self.patch}"
            checks.fail(op, "x", wanted, tuple(x.shape))
        batch = x.shape[0]
        if tuple(checks.is_tensor(op, "timestep", timestep).shape) not in ((batch,), (1,), ()):
            checks.fail(op, "timestep", f"of shape ({batch},), (1,) or ()", tuple(timestep.shape))
        if y.ndim != 3 or y.shape[0] != batch or y.shape[1] < 1 or y.shape[2] != features:
            checks.fail(op, "y", f"of shape ({batch}, L, {features}), L >= 1", tuple(y.shape))
        if self.training and self.y_embedder.dropout and y.shape[1] > tokens:
            checks.fail(op, "y", f"of at most caption_tokens = {tokens} tokens in training", y.shape[1])
        if mask is not None and checks.is_tensor(op, "mask", mask).numel() != batch * y.shape[1]:
            checks.fail(op, "mask", f"of shape ({batch}, {y.shape[1]})", tuple(mask.shape))

    def _patches(
        self, x: Tensor, text: Tensor, conditioning: Tensor, t: Tensor, grid: tuple[int, int], mask: Tensor | None
    ) -> Tensor:
        """All blocks and the last layer: each addition is one pass with the modulation that follows it, unless somebody
        waits for the call of one of them."""
        stages: list[Any] = [*self.blocks]
        if not all(_is_plain(module) for module in (*stages, self.final_layer)):
            for block in stages:
                x = block(x, text, conditioning, grid, mask)
            patches: Tensor = self.final_layer(x, t)
            return patches
        shift, scale, *_ = stages[0].modulations(conditioning)
        h = adaln_modulate(x, shift, scale)
        for block, following in zip(stages, [*stages[1:], None], strict=True):
            x, made, gate = block.residual(x, h, text, conditioning, grid, mask)
            after = self.final_layer.modulations(t) if following is None else following.modulations(conditioning)
            x, h = gate_residual_adaln(x, made, gate, after[0], after[1])
        patches = self.final_layer.linear(h)
        return patches

    def _initialise(self) -> None:
        """The official initialisation; the output and the text's contribution start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        small = (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1], self.y_embedder.y_proj.fc1,
                 self.y_embedder.y_proj.fc2)  # fmt: skip
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's call is its forward and nothing else: no hook, no wrapper (FSDP2, checkpointing, compile)."""
    own = type(module) in (PixArtBlock, FinalLayer) and "forward" not in module.__dict__
    return own and not hooked(module) and module._compiled_call_impl is None


def _drop_position_embedding(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}pos_embed", None)
