"""Self-attention with key-value compression as a module, with PixArt-Sigma's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.kv_compressed_attention.kv_compressed_attention import kv_compressed_attention

Affine = tuple[Tensor, Tensor | None]
Use = Callable[[Tensor, Tensor | None], Tensor]


def check_compression(op: str, ratio: int, mode: str) -> None:
    """Errors of a compression's settings.

    Raises:
        ValueError, TypeError: naming `ratio`, `mode`.
    """
    checks.integer(op, "ratio", ratio, low=1)
    checks.choice(op, "mode", mode, ("conv", "mean", "uniform", "nearest", "stride"))


class Taps(nn.Conv2d):
    """A convolution that hands on its parameters inside its own call: hooks that make, bring or cast them act there."""

    def forward(self, given: Use | Tensor) -> Tensor:
        """``given(weight, bias)``, or of a tensor the convolution."""
        return super().forward(given) if isinstance(given, Tensor) else given(self.weight, self.bias)


class Norm(nn.LayerNorm):
    """Likewise a LayerNorm."""

    def forward(self, given: Use | Tensor) -> Tensor:
        """``given(weight, bias)``, or of a tensor the norm."""
        return super().forward(given) if isinstance(given, Tensor) else given(self.weight, self.bias)


def within(modules: Sequence[nn.Module | None], use: Callable[..., Any]) -> Tensor:
    """``use`` of a (weight, bias) for each module, None for None, inside the call of those that hand theirs on."""

    def enter(place: int, found: tuple[Affine | None, ...]) -> Tensor:
        if place == len(modules):
            inside: Tensor = use(*found)
            return inside

        def further(weight: Tensor, bias: Tensor | None) -> Tensor:
            return enter(place + 1, (*found, (weight, bias)))

        module: Any = modules[place]
        if module is None:
            return enter(place + 1, (*found, None))
        made: Tensor = module(further) if isinstance(module, (Taps, Norm)) else further(module.weight, module.bias)
        return made

    return enter(0, ())


def averaging_compression(ratio: int, like: Tensor) -> tuple[Taps, Norm]:
    """Taps and LayerNorm for the rows of ``like``, of its dtype and device, that average each window at first."""
    dim = like.shape[0]
    taps = Taps(dim, dim, ratio, ratio, groups=dim, device=like.device, dtype=like.dtype)
    norm = Norm(dim, device=like.device, dtype=like.dtype)
    average_windows(taps, norm)
    return taps, norm


@torch.no_grad()
def average_windows(taps: nn.Conv2d, norm: nn.LayerNorm) -> None:
    """The initial values; not by `torch.nn.init`, which loaders of checkpoints switch off."""
    assert taps.bias is not None
    taps.weight.fill_(1 / (taps.kernel_size[0] * taps.kernel_size[1]))
    taps.bias.zero_()
    norm.weight.fill_(1.0)
    norm.bias.zero_()


class KVCompressedAttention(nn.Module):
    """Attention of N queries over keys and values compressed R x R to one (PixArt-Sigma, arXiv 2403.04692).

    Projection, optional QK norm, `w2s_fast.kv_compressed_attention`, projection. Parameters: ``qkv``, ``proj``; in mode
    conv with a ratio above 1 the taps ``sr`` and the LayerNorm ``norm``, shared by keys and values; with ``qk_norm``
    ``q_norm`` and ``k_norm`` over all channels.

    Args:
        dim: C.
        num_heads: a divisor of C.
        ratio: R; 1 is plain attention.
        mode: of the compression, see `w2s_fast.kv_compress`.
        qk_norm: LayerNorm of q and k.

    Raises:
        ValueError, TypeError: naming `dim`, `num_heads`.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import KVCompressedAttention
        >>> KVCompressedAttention(8, 2, ratio=2)(torch.zeros(1, 24, 8), (4, 6)).shape
        torch.Size([1, 24, 8])
    """

    def __init__(
        self, dim: int, num_heads: int, *, ratio: int = 1, mode: str = "conv", qk_norm: bool = False
    ) -> None:
        super().__init__()
        checks.integer("nn.KVCompressedAttention", "dim", dim, low=1)
        checks.integer("nn.KVCompressedAttention", "num_heads", num_heads, low=1)
        if dim % num_heads:
            checks.fail("nn.KVCompressedAttention", "num_heads", f"a divisor of dim {dim}", num_heads)
        self.num_heads, self.ratio, self.mode = num_heads, 1, mode
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = Norm(dim) if qk_norm else None
        self.k_norm = Norm(dim) if qk_norm else None
        self.sr: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        self.compress(ratio, mode)

    def compress(self, ratio: int, mode: str = "conv") -> list[nn.Parameter]:
        """Set the compression from here on; returns the new parameters, initialised to average each window."""
        check_compression("nn.KVCompressedAttention", ratio, mode)
        self.mode = mode
        self.ratio, self.sr, self.norm = ratio, None, None
        if ratio == 1 or mode != "conv":
            return []
        self.sr, self.norm = averaging_compression(ratio, self.proj.weight)
        return [*self.sr.parameters(), *self.norm.parameters()]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` of a grid (H, W), N = H W, row by row; the result is like x."""
        qkv, arguments = self.qkv(x), compression_arguments(self.sr, self.norm)

        def attend(taps: Affine | None, norm: Affine | None, q_norm: Affine | None, k_norm: Affine | None) -> Any:
            return kv_compressed_attention(
                qkv, grid, self.ratio, self.num_heads, mode=self.mode, **arguments(taps, norm),
                q_norm=q_norm, k_norm=k_norm,
            )  # fmt: skip

        out: Tensor = self.proj(within((self.sr, self.norm, self.q_norm, self.k_norm), attend))
        return out


def compression_arguments(
    taps: nn.Conv2d | None, norm: nn.LayerNorm | None
) -> Callable[[Affine | None, Affine | None], dict[str, Any]]:
    """Of its two modules' parameters the arguments of the compression ops.

    Raises:
        ValueError: naming sr and norm.
    """
    if taps is None or norm is None:
        return lambda *_: {}
    if not isinstance(taps, nn.Conv2d) or not isinstance(norm, nn.LayerNorm):
        # an adapter has the weight of its base, and what it adds would be left out silently
        found = f"{type(taps).__name__} and {type(norm).__name__}"
        checks.fail("nn.KVCompressedAttention", "sr and norm", "nn.Conv2d and nn.LayerNorm, without an adapter", found)
    eps = norm.eps

    def arguments(taps: Affine | None, norm: Affine | None) -> dict[str, Any]:
        assert taps is not None and norm is not None
        return dict(zip(("weight", "bias", "norm_weight", "norm_bias"), (*taps, *norm), strict=True), eps=eps)

    return arguments
