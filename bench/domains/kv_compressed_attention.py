"""Compressed attention, its compression and both: blocks of image transformers at several resolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..domain import Domain, Random, Sizes, Way


def _attention_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    h, d = sizes["H"], sizes["D"]
    return tuple(random(sizes["B"], tokens, h, d) for tokens in (sizes["N"], sizes["M"], sizes["M"]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _width(sizes: Sizes) -> int:
    return sizes["H"] * sizes["D"]


def _grid_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    c, side = _width(sizes), 2 * sizes["half"]
    taps = random(c, 1, 2, 2, scale=0.025, offset=0.25)
    return (random(sizes["B"], side * side, 3 * c), taps, random(c, scale=0.1), random(c, scale=0.1, offset=1.0),
            random(c, scale=0.1))  # fmt: skip


def _compressed(sizes: Sizes, qkv: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> list[Tensor]:
    c, side = _width(sizes), 2 * sizes["half"]
    found = []
    for z in qkv.unflatten(2, (3, c)).unbind(2)[1:]:
        grid = z.reshape(-1, side, side, c).permute(0, 3, 1, 2)
        small = F.conv2d(grid, taps, bias, stride=2, groups=c).flatten(2).transpose(1, 2)
        found.append(F.layer_norm(small, (c,), gain, offset, 1e-5))
    return found


def _compression(sizes: Sizes) -> dict[str, Way]:
    side = 2 * sizes["half"]

    def ours(qkv: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> Any:
        return w2s_fast.kv_compress(qkv, (side, side), 2, weight=taps, bias=bias, norm_weight=gain, norm_bias=offset)

    return {"ours": ours, "eager": lambda *tensors: tuple(_compressed(sizes, *tensors))}


def _whole(sizes: Sizes) -> dict[str, Way]:
    c, side, heads = _width(sizes), 2 * sizes["half"], sizes["H"]

    def ours(qkv: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> Any:
        return w2s_fast.kv_compressed_attention(
            qkv, (side, side), 2, heads, weight=taps, bias=bias, norm_weight=gain, norm_bias=offset
        )

    def plain(qkv: Tensor, *params: Tensor) -> Tensor:
        taken = (qkv[..., :c], *_compressed(sizes, qkv, *params))
        return _sdpa(*(t.unflatten(2, (heads, sizes["D"])) for t in taken)).flatten(2)

    return {"ours": ours, "eager": plain}


HEADS = {"H": (1, 16), "D": (16, 128)}
GRID = {"B": (1, 4), "half": (2, 32), **HEADS}


def _grid_elements(sizes: Sizes) -> float:
    return 12.0 * sizes["B"] * sizes["half"] ** 2 * _width(sizes)


DOMAINS = [
    Domain(
        "compressed_attention", {"B": (1, 4), "N": (16, 4096), "M": (8, 1024), **HEADS}, _attention_inputs,
        lambda sizes: {"ours": w2s_fast.compressed_attention, "eager": _sdpa},
        lambda s: 4.0 * s["B"] * s["N"] * s["M"] * _width(s), lambda s: float(s["B"] * s["N"] * _width(s)),
        trained=(0, 1, 2),
    ),
    Domain("kv_compress", GRID, _grid_inputs, _compression, lambda s: _grid_elements(s), _grid_elements,
           trained=(0, 1, 2, 3, 4), allowed=(2e-3, 1e-1)),
    Domain("kv_compressed_attention", GRID, _grid_inputs, _whole,
           lambda s: 16.0 * s["B"] * s["half"] ** 4 * _width(s), _grid_elements, trained=(0, 1, 2, 3, 4),
           allowed=(2e-3, 1e-1)),
]  # fmt: skip
