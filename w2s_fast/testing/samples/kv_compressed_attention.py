"""Samples of key-value compressed attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Maker = Callable[[Make], Inputs]


def _parameters(m: Make, c: int, ratio: int, both: bool = False, norm: bool = True) -> dict[str, Any]:
    """Taps around the mean, a bias, and a LayerNorm that is not the identity."""
    lead = (2,) if both else ()
    taps = m.logits(*lead, c, ratio, ratio, scale=0.3 / ratio, offset=ratio**-2)
    found = {"weight": taps, "bias": m.logits(*lead, c, scale=0.1)}
    if norm:
        found["norm_weight"] = m.logits(c, scale=0.1, offset=1.0)
        found["norm_bias"] = m.logits(c, scale=0.1)
    return found


def _qkv(m: Make, batch: int, tokens: int, c: int, scale: float = 1.0) -> Tensor:
    return m.logits(batch, tokens, 3 * c, scale=scale)


def _conv(batch: int, grid: tuple[int, int], c: int, ratio: int, *given: Any, **kwargs: Any) -> Maker:
    """qkv and parameters for mode conv; ``given`` are further positional arguments (the number of heads)."""

    def make(m: Make) -> Inputs:
        x = _qkv(m, batch, grid[0] * grid[1], c)
        return (x, grid, ratio, *given), {**_parameters(m, c, ratio), **kwargs}

    return make


def _mode(mode: str, grid: tuple[int, int], c: int, ratio: int, *given: Any, **kwargs: Any) -> Maker:
    def make(m: Make) -> Inputs:
        return (_qkv(m, 2, grid[0] * grid[1], c), grid, ratio, *given), {"mode": mode, **kwargs}

    return make


def _separate(m: Make) -> Inputs:
    """Taps and bias of their own for k and v, a qkv of four dimensions that is a slice of a wider tensor."""
    x = m.logits(2, 24, 3, 40)[:, :, :, 3:36]
    return (x, (6, 4), 2), {**_parameters(m, 33, 2, both=True, norm=False), "num_heads": 3}


def _permuted(m: Make) -> Inputs:
    """Batch and tokens swapped in memory; no LayerNorm; taps without a bias."""
    x = m.logits(20, 3, 51).transpose(0, 1)
    return (x, (4, 5), 2), {"weight": m.logits(17, 1, 2, 2, scale=0.3), "normalize": False}


COMPRESS: dict[str, Maker] = {
    "conv": _conv(2, (4, 6), 48, 2),
    "conv-odd": _conv(1, (9, 10), 37, 2),
    "conv-ratio-3": _conv(1, (7, 9), 20, 3),
    "conv-ratio-4": _conv(1, (8, 12), 130, 4),
    "separate": _separate,
    "permuted": _permuted,
    "mean": _mode("mean", (6, 5), 19, 2),
    "mean-norm": _mode("mean", (6, 6), 24, 3, normalize=True),
    "uniform": _mode("uniform", (5, 6), 19, 2),
    "nearest-norm": _mode("nearest", (5, 7), 33, 3, normalize=True),
    "stride": _mode("stride", (5, 7), 18, 4),
    "ratio-1": _conv(1, (2, 3), 8, 1, weight=None, bias=None, norm_weight=None, norm_bias=None),
    "one-window": _conv(1, (2, 2), 16, 2),
    "empty": _conv(0, (4, 4), 8, 2),
}


def _attention(batch: int, n: int, keys: int, heads: int, d: int, scale: float = 1.0, **kw: Any) -> Maker:
    def make(m: Make) -> Inputs:
        q, k, v = (m.logits(batch, t, heads, d, scale=scale) for t in (n, keys, keys))
        return (q, k, v), dict(kw)

    return make


def _heads_first(m: Make) -> Inputs:
    """(B, H, N, D), with q permuted and v a slice; the result is a view."""
    q = m.logits(2, 30, 3, 24, scale=1.0).transpose(1, 2)
    return (q, m.logits(2, 3, 21, 24, scale=1.0), m.logits(2, 3, 21, 30, scale=1.0)[..., 3:27]), {"layout": "bhnd"}


def _of_qkv(m: Make) -> Inputs:
    """Views of one packed qkv, keys from fewer tokens."""
    x = m.logits(2, 19, 3, 2, 72, scale=1.0)
    return (x[:, :, 0], x[:, :7, 1], x[:, :7, 2]), {}


def _large(m: Make) -> Inputs:
    """Scores near 1e4, in 16 bit beyond what their squares could hold: the largest key of each query takes all."""
    q, k = m.logits(1, 9, 2, 64, scale=30.0), m.logits(1, 33, 2, 64, scale=40.0)
    return (q, k, m.logits(1, 33, 2, 64, scale=1.0)), {"scale": 1.0}


def _strided_last(m: Make) -> Inputs:
    """Head dimension not contiguous: copied."""
    return (m.logits(1, 8, 2, 5, scale=1.0).transpose(1, 3), m.logits(1, 3, 2, 8), m.logits(1, 3, 2, 8)), {}


ATTENTION: dict[str, Maker] = {
    "d72": _attention(1, 53, 37, 2, 72),
    "d64-lse": _attention(2, 48, 64, 1, 64, return_lse=True),
    "d80": _attention(1, 33, 19, 1, 80),
    "d128": _attention(1, 20, 70, 1, 128),
    "d256": _attention(1, 17, 9, 1, 256),
    "d32-more-keys": _attention(1, 5, 151, 2, 32, scale=2.0),
    "d5": _attention(2, 7, 6, 3, 5),
    "one-key": _attention(1, 7, 1, 2, 72),
    "one-query": _attention(2, 1, 40, 2, 24),
    "d1": _attention(1, 3, 4, 1, 1),
    "scale": _attention(1, 9, 11, 1, 16, scale=1.5),
    "heads-first": _heads_first,
    "of-qkv": _of_qkv,
    "strided-last": _strided_last,
    "large": _large,
    "empty": _attention(0, 4, 3, 2, 8),
}


def _norms(m: Make) -> Inputs:
    """Both QK norms; the one of k has no bias."""
    x, vector = _qkv(m, 2, 24, 36), [m.logits(36, scale=0.1, offset=1.0) for _ in range(2)]
    pairs = {"q_norm": (vector[0], m.logits(36, scale=0.1)), "k_norm": (vector[1], None)}
    return (x, (4, 6), 2, 2), {**_parameters(m, 36, 2), **pairs}


def _k_norm(m: Make) -> Inputs:
    pair = m.logits(24, scale=0.1, offset=1.0), m.logits(24, scale=0.1)
    return (_qkv(m, 1, 16, 24), (4, 4), 1, 3), {"k_norm": pair}


PATH: dict[str, Maker] = {
    "conv": _conv(2, (4, 6), 48, 2, 2),
    "d72": _conv(1, (8, 8), 144, 2, 2),
    "odd": _conv(1, (9, 10), 24, 2, 3),
    "ratio-4": _conv(1, (8, 8), 40, 4, 1),
    "mean": _mode("mean", (6, 5), 20, 2, 2),
    "stride": _mode("stride", (5, 7), 18, 4, 2),
    "uniform-norm": _mode("uniform", (5, 7), 16, 2, 2, normalize=True),
    "ratio-1": _mode("conv", (5, 4), 24, 1, 2),
    "norms": _norms,
    "k-norm": _k_norm,
    "one-token": _mode("conv", (1, 1), 8, 1, 1),
    "empty": _conv(0, (4, 4), 8, 2, 2),
}


def _fold(mode: str) -> Maker:
    def make(m: Make) -> Inputs:
        found = _parameters(m, 6, 2, norm=False) if mode == "conv" else {}
        return (m.logits(18, 5), m.logits(18), 2, mode), found

    return make


SAMPLES: list[Sample] = [
    *(Sample("kv_compress", name, make) for name, make in COMPRESS.items()),
    *(Sample("compressed_attention", name, make) for name, make in ATTENTION.items()),
    *(Sample("kv_compressed_attention", name, make) for name, make in PATH.items()),
    # k' is rounded to 16 bit before the scores, so their float32 lse can be held to float32 rounding in float32 only
    Sample("kv_compressed_attention", "lse", _conv(1, (6, 4), 48, 2, 2, return_lse=True), dtypes=(torch.float32,)),
    Sample("fold_kv_projection", "mean", _fold("mean"), dtypes=(torch.float32,)),
    Sample("fold_kv_projection", "conv", _fold("conv"), dtypes=(torch.float32,)),
]
